"""A streamed merge is the adapter on its base: every kind of adapter, every family, read back from what was written."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_sft.export.merged import open_merged
from lora_sft.export.write import write_model
from lora_sft.model.base import BaseSpec
from tests.export.shapes import ADDED, FAMILIES, SHAPES, load_live, save_adapter, save_base

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning")

IDS = torch.tensor([[5, 3, 90, 17, 2, 44, 61, 8]])


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {family: save_base(family, folder / family) for family in FAMILIES}


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("name", SHAPES)
def test_a_merge_is_the_adapter_on_its_base(name, bases, tmp_path):
    family, settings = SHAPES[name]
    base, vocabulary = bases[family], ADDED.get(name, 0)
    adapter = save_adapter(base, tmp_path / "adapter", settings, vocabulary=vocabulary)
    ids = torch.tensor([[5, 96, 90, 97, 2]]) if vocabulary else IDS
    live = load_live(base, adapter, vocabulary)
    expected = logits_of(live, ids)
    with live.disable_adapter():
        assert (logits_of(live, ids) - expected).abs().max() > 0.05, "the adapter must do something"
    (tmp_path / "merged").mkdir()
    write_model(open_merged(adapter, BaseSpec(str(base))), tmp_path / "merged", "float32")
    merged, report = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    torch.testing.assert_close(logits_of(merged, ids), expected, rtol=0, atol=1e-5)
