"""A finished run → `report.html`: one page without any other file, made to look at."""

from collections.abc import Sequence
from html import escape
from typing import Any

from lora_sft.chat.rendering import Rendered
from lora_sft.training.job import Job

WIDTH, HEIGHT, MARGIN = 720, 260, 44

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 760px; margin: 3em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.1em; margin-top: 2em; }
table { border-collapse: collapse; } td { padding: .15em 1.5em .15em 0; vertical-align: top; }
td:first-child { color: #777; } pre { background: #f6f6f4; padding: 1em; white-space: pre-wrap; border-radius: 6px; }
mark { background: #cfeecb; color: inherit; border-radius: 3px; }
svg text { font: 12px system-ui, sans-serif; fill: #777; }
.train { stroke: #2a6fb0; fill: none; } .evaluation { stroke: #c2571a; fill: none; } .axis { stroke: #bbb; }
@media (prefers-color-scheme: dark) { body { background: #1b1b1a; color: #ddd; } pre { background: #262624; }
mark { background: #2f5130; } }
"""


def report_page(job: Job, manifest: dict[str, Any], lines: Sequence[dict[str, Any]], name: str) -> str:
    """The page as HTML.

    Args:
        manifest: as written to `manifest.json`.
        lines: those of `metrics.jsonl`.
        name: of the run.
    """
    result, data, base = manifest["result"], manifest["data"], manifest["base"]
    curves = {
        "train": [(line["step"], line["loss"]) for line in lines if "loss" in line],
        "evaluation": [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line],
    }
    ends = [f"{loss:.4f}" for loss in (result["first_loss"], result["last_loss"]) if loss is not None]
    facts = {
        "steps": f"{result['steps']:,} in {result['seconds']:,.0f} s",
        "training loss": f"{result['train_loss']:.4f} over the run ({' → '.join(ends) or 'not logged'})",
        "evaluation loss": f"{result['eval_loss']:.4f}" if "eval_loss" in result else "not evaluated",
        "conversations": f"{data['examples']:,}, and {data['evaluation_examples']:,} for evaluation",
        "left out": f"{data['dropped_too_long']:,} too long, {data['dropped_without_reply']:,} without a reply; "
        f"{data['cut']:,} cut",
        "tokens learned": f"{result['supervised_tokens']:,} of {result['tokens']:,} seen",
        "base": f"{base['quantization'] or 'not quantized'}, {base['dtype']}, on {manifest['hardware']['device']}",
        "peak memory": _memory(result["peak_bytes"], manifest["memory"]),
    }
    settings = job.config.model_dump(exclude_defaults=True, exclude={"model_name_or_path", "dataset", "output_dir"})
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><meta charset="utf-8"><title>{escape(name)}</title><style>{STYLE}</style>',
            f"<h1>{escape(name)}</h1>",
            _table(facts),
            *(["<h2>Proven before the first step</h2>", _table(_proofs(manifest))] if manifest["preflight"] else []),
            "<h2>Loss</h2>",
            _chart(curves),
            f"<h2>What is learned: {escape(job.train.first.source)}</h2>",
            f"<pre>{_marked(job.train.first.rendered)}</pre>",
            "<h2>Settings that are not the default</h2>",
            _table(settings or {"": "none"}),
            "</html>",
            "",
        ]
    )


def _memory(peak_bytes: int, memory: dict[str, Any]) -> str:
    """What was measured, and what was foretold."""
    words = f"{peak_bytes / 2**30:.2f} GiB"
    if "foretold_bytes" in memory:
        measured = f"{memory['measured_bytes'] / 2**30:.2f} GiB measured ({memory['measured_as']})"
        words += f"; of the training {memory['foretold_bytes'] / 2**30:.2f} GiB foretold, {measured}"
    return words


def _proofs(manifest: dict[str, Any]) -> dict[str, str]:
    """{proof: its number}, with a mark before what holds."""
    marks = {True: "✓ ", False: "✗ "}
    return {proof["name"]: marks.get(proof["holds"], "") + proof["words"] for proof in manifest["preflight"]}


def _table(rows: dict[str, Any]) -> str:
    cells = (f"<tr><td>{escape(str(key))}</td><td>{escape(str(value))}</td></tr>" for key, value in rows.items())
    return f"<table>{''.join(cells)}</table>"


def _marked(rendered: Rendered) -> str:
    """The text, escaped, with what must be produced marked."""
    parts, position = [], 0
    for start, end in rendered.supervised:
        parts += [escape(rendered.text[position:start]), "<mark>", escape(rendered.text[start:end]), "</mark>"]
        position = end
    return "".join([*parts, escape(rendered.text[position:])])


def _chart(curves: dict[str, list[tuple[int, float]]]) -> str:
    """Loss over steps as SVG, a line a curve, with the ends of both axes named."""
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return "<p>Nothing was logged.</p>"
    first, last = min(step for step, _ in points), max(step for step, _ in points)
    low, top = min(loss for _, loss in points), max(loss for _, loss in points)

    def place(step: int, loss: float) -> str:
        across = (step - first) / max(last - first, 1)
        up = (loss - low) / ((top - low) or 1.0)
        return f"{MARGIN + across * (WIDTH - 2 * MARGIN):.1f},{HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN):.1f}"

    drawn = [
        f'<polyline class="{name}" stroke-width="2" points="{" ".join(place(*point) for point in curve)}"/>'
        for name, curve in curves.items()
        if curve
    ]
    names = [
        f'<text x="{WIDTH - MARGIN}" y="{16 + 16 * index}" text-anchor="end">'
        f'<tspan class="{name}" stroke-width="1">━</tspan> {name}</text>'
        for index, (name, curve) in enumerate(curves.items())
        if curve
    ]
    floor = HEIGHT - MARGIN
    return "".join(
        [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss over steps">',
            f'<line class="axis" x1="{MARGIN}" y1="{floor}" x2="{WIDTH - MARGIN}" y2="{floor}"/>',
            f'<line class="axis" x1="{MARGIN}" y1="{MARGIN}" x2="{MARGIN}" y2="{floor}"/>',
            f'<text x="{MARGIN - 6}" y="{MARGIN + 4}" text-anchor="end">{top:.2f}</text>',
            f'<text x="{MARGIN - 6}" y="{floor + 4}" text-anchor="end">{low:.2f}</text>',
            f'<text x="{MARGIN}" y="{floor + 18}">step {first}</text>',
            f'<text x="{WIDTH - MARGIN}" y="{floor + 18}" text-anchor="end">step {last}</text>',
            *drawn,
            *names,
            "</svg>",
        ]
    )
