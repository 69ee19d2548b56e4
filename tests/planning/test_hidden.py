"""No operation of a step takes more memory for itself than is listed."""

from collections import defaultdict

import pytest

from tests.planning.measured import Case, simulated, watched

MEGABYTE = 2**20
CASES = {
    "fast": Case("llama", "nf4", "bfloat16", {"gradient_checkpointing": True}, (700, 400)),
    "plain": Case("qwen3", None, "float32", {"fast_kernels": False, "lora_dropout": 0.1}, (500, 300)),
    "plain, 4 bits": Case("gemma3_text", "nf4", "bfloat16", {"fast_kernels": False}, (500, 300)),
}


def taken_inside(found, names) -> dict[str, int]:
    """The most that operations held while they ran, beyond what they left behind: {name: bytes}."""
    events = sorted(found.profiler.kineto_results.events(), key=lambda event: (event.start_ns(), -event.duration_ns()))
    most = defaultdict(int)
    name, end, held, peak = None, 0, 0, 0
    for event in events:
        if name is not None and event.start_ns() > end:
            most[name] = max(most[name], peak - max(held, 0))
            name = None
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
        elif name is None and event.name() in names:
            name, end, held, peak = event.name(), event.end_ns(), 0, 0
    return most


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_there_is_no_other_hidden_temporary_of_a_megabyte(name):
    case = CASES[name]
    plan = simulated(case)
    listed = defaultdict(int)
    for block in plan.blocks:
        if block.phase == "workspace":
            short = block.operation.split(".")
            listed[f"{short[0]}::{short[1]}"] = max(listed[f"{short[0]}::{short[1]}"], block.bytes)
    _, found = watched(case)
    hidden = taken_inside(found, plan.operations)
    assert {op: bytes for op, bytes in hidden.items() if bytes > listed[op] + MEGABYTE} == {}
