"""Several adapters are added up exactly; TIES and DARE act on the true updates."""

import pytest
import torch
from peft.utils.merge_utils import ties

from lora_sft.errors import ModelError, SettingError
from lora_sft.merging import combine, merged
from lora_sft.merging.combine import Blend
from lora_sft.merging.merge import merge
from lora_sft.merging.merged import open_merged
from lora_sft.model.base import BaseSpec
from tests.merging.shapes import load_live, save_adapter, save_base

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

NAME = "model.layers.0.self_attn.q_proj.weight"
SETTINGS = {"target_modules": ["q_proj", "up_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Two of unequal rank and scale."""
    folder = tmp_path_factory.mktemp("adapters")
    return [
        save_adapter(base, folder / "a", SETTINGS, seed=1),
        save_adapter(base, folder / "b", {**SETTINGS, "r": 6, "use_rslora": True}, seed=2),
    ]


def update_of(base, adapter):
    """PEFT's own, float32."""
    live = load_live(base, adapter)
    return live.base_model.model.model.layers[0].self_attn.q_proj.get_delta_weight("default").detach()


def merged_update(base, adapters, blend, monkeypatch=None):
    opened = open_merged(adapters, BaseSpec(str(base)), blend=blend)
    return opened.tensor(NAME) - opened.base.stored[NAME].read()


def test_a_weighted_sum_is_exact(base, adapters):
    found = merged_update(base, adapters, Blend((0.7, -0.3)))
    a, b = (update_of(base, adapter) for adapter in adapters)
    torch.testing.assert_close(found, 0.7 * a - 0.3 * b, rtol=0, atol=1e-6)


def test_a_sum_is_compared_with_the_adapters_side_by_side(base, adapters, tmp_path):
    result = merge(adapters, tmp_path / "merged", weights=[0.7, -0.3])
    assert result["verified"]["how"] == "logits"
    assert result["verified"]["adapter_effect"] > 1e-3
    assert result["verified"]["mean_kl"] < 1e-9


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_ties_is_that_of_peft_on_the_true_updates(base, adapters, density, monkeypatch):
    monkeypatch.setattr(combine, "PIECE", 64 * 5)  # a few rows at a time
    monkeypatch.setattr(merged, "PIECE", 64 * 7)
    found = merged_update(base, adapters, Blend((0.8, 0.4), "ties", density))
    updates = [update_of(base, adapter) for adapter in adapters]
    torch.testing.assert_close(found, ties(updates, torch.tensor([0.8, 0.4]), density), rtol=0, atol=1e-6)


def test_dare_drops_by_lot_and_keeps_the_mean(base, adapters, monkeypatch):
    one = merged_update(base, adapters[:1], Blend((1.0,), "dare_linear", 0.25))
    update = update_of(base, adapters[0])
    assert (one != 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    kept = one.abs() > 1e-6
    torch.testing.assert_close(one[kept], 4 * update[kept], rtol=1e-3, atol=1e-6)
    assert torch.equal(one, merged_update(base, adapters[:1], Blend((1.0,), "dare_linear", 0.25)))
    assert not torch.equal(one, merged_update(base, adapters[:1], Blend((1.0,), "dare_linear", 0.25, seed=1)))
    monkeypatch.setattr(merged, "PIECE", 64 * 7)  # the lot does not depend on how many rows are computed together
    again = merged_update(base, adapters[:1], Blend((1.0,), "dare_linear", 0.25))
    torch.testing.assert_close(one, again, rtol=0, atol=1e-6)


def test_dare_ties_keeps_what_the_majority_wants(base, adapters, tmp_path):
    result = merge(adapters, tmp_path / "merged", combination="dare_ties", density=0.5)
    assert result["verified"]["how"] == "tensors"
    assert result["verified"]["holds"]
    with pytest.raises(SettingError, match="no adapter that it could be compared with"):
        merge(adapters, tmp_path / "other", combination="ties", verify="logits")


@pytest.mark.parametrize("kind", ["dora", "head"])
def test_what_is_more_than_an_update_is_not_added_up(base, adapters, kind, tmp_path):
    settings = {"dora": {"use_dora": True}, "head": {"modules_to_save": ["lm_head"]}}[kind]
    other = save_adapter(base, tmp_path / "other", SETTINGS | settings)
    with pytest.raises(ModelError, match="trained whole or by DoRA, and cannot be weighted or added to others"):
        open_merged([adapters[0], other], BaseSpec(str(base)))


def test_wrong_wishes_are_refused(base, adapters, tmp_path):
    with pytest.raises(SettingError, match="1 weights for 2 adapters"):
        merge(adapters, tmp_path / "merged", weights=[1.0])
    with pytest.raises(SettingError, match="combination 'slerp' is not one of linear, ties"):
        merge(adapters, tmp_path / "merged", combination="slerp")
    with pytest.raises(SettingError, match="density 0 is not above 0"):
        merge(adapters, tmp_path / "merged", combination="ties", density=0)


def test_adapters_of_different_bases_have_no_sum(adapters, tmp_path):
    other = save_base("llama", tmp_path / "base")
    strange = save_adapter(other, tmp_path / "adapter", SETTINGS)
    with pytest.raises(ModelError, match="they have no sum"):
        merge([adapters[0], strange], tmp_path / "merged")
