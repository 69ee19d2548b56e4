"""The dtype of the arithmetic, and what is said of it."""

import pytest
import torch

from lora_sft.model.device import choose_dtype


@pytest.mark.parametrize(
    ("capabilities", "bf16", "why"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, None, "on the CPU; bf16: true is several times as fast on this one"),
        ({"avx512_bf16": False, "amx_bf16": True}, None, "on the CPU; bf16: true is several times as fast on this one"),
        ({"avx512_bf16": True}, False, "on the CPU"),
        ({}, None, "on the CPU"),
    ],
)
def test_a_processor_with_instructions_for_bfloat16_is_told_of(monkeypatch, capabilities, bf16, why):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert choose_dtype(bf16, None, "cpu") == ("float32", why)


def test_a_torch_that_cannot_tell_says_nothing(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert choose_dtype(None, None, "cpu") == ("float32", "on the CPU")
