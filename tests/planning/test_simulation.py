"""What is followed on tensors without storage, held against torch itself."""

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from lora_sft.kernels.standing import StandIn, kind_of, standing_for
from lora_sft.planning.simulation import Simulation
from lora_sft.planning.ways import Ways
from tests.planning.measured import highest

ON_CPU, ON_GPU = StandIn("cpu"), StandIn("cuda", (8, 9))


def peak(found: Simulation) -> int:
    held = most = 0
    for event in found.events:
        held += found.blocks[event].bytes if event >= 0 else -found.blocks[~event].bytes
        most = max(most, held)
    return most


def test_lifetimes_are_those_of_the_real_tensors():
    def work(device):
        a = torch.ones(1000, device=device)
        b = a + 1
        del a
        c = b.view(10, 100)[:5]
        del b
        return (c * 2).sum()

    with Simulation(ON_CPU) as found:
        work("meta")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as real:
        work("cpu")
    assert peak(found) == 8000
    assert highest(real) == pytest.approx(8000, abs=64), "and a few scalars"


def test_integers_and_booleans_keep_their_values():
    with Simulation(ON_CPU):
        borders = torch.tensor([0, 3, 7]).to("meta")
        assert borders.diff().tolist() == [3, 4]
        mask = torch.arange(6, device="meta") > 3
        assert mask.any()
        assert not mask.all()
        assert torch.ones(6, 2, device="meta")[mask].shape == (2, 2)
        assert mask.nonzero().flatten().tolist() == [4, 5]
        counted = torch.zeros(3, dtype=torch.int64, device="meta")
        counted[1:] += 5
        assert counted.tolist() == [0, 5, 5]


def test_numbers_of_weights_are_not_made_up():
    with Simulation(ON_CPU), pytest.raises(NotImplementedError, match="numbers that only the real weights have"):
        float(torch.empty(3, device="meta").sum())


def test_gradients_are_added_up_in_place_as_they_are_without_a_mode():
    """Beneath a dispatch mode autograd would make a third tensor for the sum of two."""

    def work(device):
        x = torch.ones(1000, device=device, requires_grad=True)
        y = (x * 2).exp() + (x * 3).exp()
        y.sum().backward()
        return x.grad

    with Simulation(ON_CPU) as found:
        work("meta")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as real:
        work("cpu")
    assert peak(found) == pytest.approx(highest(real), abs=64)


@pytest.mark.parametrize("has_mask", [False, True])
def test_attention_is_computed_as_the_device_does(has_mask):
    def operations(device):
        query = torch.empty(1, 4, 64, 32, device="meta", dtype=torch.bfloat16)
        mask = torch.ones(1, 1, 64, 64, dtype=torch.bool, device="meta") if has_mask else None
        with standing_for(device), Ways(device), Simulation(device) as found:
            F.scaled_dot_product_attention(query, query, query, attn_mask=mask, is_causal=not has_mask)
        return {name for name in found.operations if "attention" in name}

    on_gpu = "efficient_attention" if has_mask else "flash_attention"
    assert operations(ON_CPU) == {"aten::_scaled_dot_product_flash_attention_for_cpu"}
    assert operations(ON_GPU) == {f"aten::_scaled_dot_product_{on_gpu}"}
    old = operations(StandIn("cuda", (7, 5)))
    assert old == {"aten::_scaled_dot_product_efficient_attention"}, "flash attention needs Ampere"


def test_autocast_is_that_of_a_real_layer():
    def dtypes(device):
        layer = torch.nn.Linear(8, 8, device=device)
        with torch.autocast("cpu", torch.bfloat16):
            once, twice = layer(torch.ones(2, 8, device=device)), layer(torch.ones(2, 8, device=device))
            return once.dtype, twice.dtype, (once.float() @ twice.float().t()).dtype, once.softmax(-1).dtype

    with Ways(ON_CPU), Simulation(ON_CPU) as found:
        assert dtypes("meta") == dtypes("cpu")
        cast = [block for block in found.blocks if "_to_copy" in block.operation and block.bytes == 2 * 64]
    assert len(cast) == 1, "a trained weight is cast once"


def test_tensors_without_storage_go_the_ways_of_what_they_stand_for():
    meta = torch.device("meta")
    assert kind_of(meta) == "cpu"
    with standing_for(ON_GPU):
        assert kind_of(meta) == "cuda"
        assert kind_of(torch.device("cpu")) == "cpu"
