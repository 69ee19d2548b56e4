"""What was measured → a picture of it, drawn by matplotlib, which comes with the extra `dev`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLORS = {"TRL": "#b45f3c", "TRL, float32 adapter": "#d9a441", "ours": "#2f6f8f"}


def refuse_without_plots() -> None:
    """Asked before the slow part.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: `pip install matplotlib`, or leave --plot out and use --json")


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")


def _write(figure: Any, file: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def color_of(side: str) -> str:
    """One color for each library."""
    return COLORS.get(side, COLORS["ours"] if side.startswith("ours") else COLORS["TRL"])


def plot_races(cases: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Bars of every side in every case: times as fast as the first, and memory as a share of the first."""
    figure, axes = _panels(2, len(cases), 3 * len(cases), 6)
    for column, case in enumerate(cases):
        sides = [line["side"] for line in case["lines"]]
        colors = [color_of(side) for side in sides]
        speed, memory = axes[0][column], axes[1][column]
        middle = [line["ratio"]["middle"] for line in case["lines"]]
        reach = [
            [line["ratio"]["middle"] - line["ratio"]["low"] for line in case["lines"]],
            [line["ratio"]["high"] - line["ratio"]["middle"] for line in case["lines"]],
        ]
        speed.bar(range(len(sides)), middle, yerr=reach, color=colors, capsize=3)
        memory.bar(range(len(sides)), [line["memory"] for line in case["lines"]], color=colors)
        speed.set_title(case["case"], fontsize=9)
        speed.set_xticks([])
        memory.set_xticks(range(len(sides)), sides, rotation=30, ha="right", fontsize=7)
    axes[0][0].set_ylabel("times as fast")
    axes[1][0].set_ylabel("memory of a step, share")
    _write(figure, file)


def plot_scaling(found: Mapping[str, Sequence[Mapping[str, Any]]], file: Path) -> None:
    """Lines of both sides: seconds of a step above, its memory below, against each of the four."""
    figure, axes = _panels(2, len(found), 3 * len(found), 6)
    for column, (against, points) in enumerate(found.items()):
        for row, (what, scale, label) in enumerate(
            (("seconds", 1.0, "seconds of a step"), ("risen_bytes", 1e-6, "memory of a step, MB"))
        ):
            for side in ("TRL", "ours"):
                numbers = [one[side][what] * scale for one in points]
                axes[row][column].plot(
                    [one["value"] for one in points], numbers, "o-", color=color_of(side), label=side
                )
            axis = axes[row][column]
            axis.set(xscale="log", yscale="log", xlabel=against)
            axis.minorticks_off()
            axis.set_xticks([one["value"] for one in points], [f"{one['value']:,}" for one in points], fontsize=7)
            axes[row][0].set_ylabel(label)
    axes[0][0].legend()
    _write(figure, file)


def plot_curves(curves: Mapping[str, Sequence[Sequence[float]]], file: Path) -> None:
    """Losses of all sides over each other, and how far the others and TRL's other seeds are from TRL's first."""
    figure, axes = _panels(2, 1, 7, 7)
    for side, seeds in curves.items():
        for number, losses in enumerate(seeds):
            label = side if number == 0 else None
            axes[0][0].plot(
                losses, color=color_of(side), label=label, linewidth=1, linestyle=("-", "--", ":")[number % 3]
            )
    for number, losses in enumerate(curves["TRL"][1:], 1):
        gap = [abs(a - b) for a, b in zip(losses, curves["TRL"][0], strict=True)]
        axes[1][0].plot(gap, color="#999999", linewidth=1, label=f"TRL, seed {number}, from TRL, seed 0")
    for side in list(curves)[1:]:
        gap = [abs(a - b) for a, b in zip(curves[side][0], curves["TRL"][0], strict=True)]
        axes[1][0].plot(gap, color=color_of(side), linewidth=1, label=f"{side} from TRL, seed 0")
    axes[0][0].set_ylabel("loss, nats")
    axes[1][0].set(yscale="log", xlabel="step", ylabel="distance, nats")
    for row in axes:
        row[0].legend(fontsize=7)
    _write(figure, file)
