"""Every name in the adapter settings must match something, and what is trained is told."""

import pytest

from lora_sft.config import RunConfig
from lora_sft.errors import ModelError
from lora_sft.model.adapter import attach, check_targets, count_parameters, describe_trained, lora_config
from lora_sft.model.base import BaseSpec, read_config, skeleton
from lora_sft.model.tiny import tiny_model


@pytest.fixture
def shape(base):
    spec = BaseSpec(str(base))
    return skeleton(read_config(spec), spec)


def test_the_skeleton_has_names_and_shapes_but_no_storage(shape):
    assert all(parameter.is_meta for parameter in shape.parameters())
    assert shape.model.layers[0].self_attn.q_proj.weight.shape == (64, 64)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"lora_target_modules": ["q_proj", "q_porj"]},
            "lora_target_modules: q_porj matches nothing in this model; did you mean q_proj",
        ),
        ({"lora_target_modules": ".*attn_x.*"}, "the regex .* matches no module"),
        ({"lora_target_modules": "(["}, "is no regex"),
        (
            {"lora_target_parameters": ["experts.gate_up_proj"]},
            "lora_target_parameters: experts.gate_up_proj matches nothing",
        ),
        (
            {"lora_modules_to_save": ["head"]},
            "lora_modules_to_save: head matches nothing in this model; did you mean lm_head",
        ),
        ({"lora_rank_pattern": {"xyz": 4}}, "lora_rank_pattern: xyz matches nothing"),
        ({"lora_alpha_pattern": {"xyz": 4}}, "lora_alpha_pattern: xyz matches nothing"),
        ({"lora_target_modules": ["lm_head"]}, r"train it whole with lora_modules_to_save: \[lm_head\]"),
    ],
)
def test_a_name_that_matches_nothing_is_refused(shape, settings, words):
    with pytest.raises(ModelError, match=words):
        check_targets(RunConfig(**settings), shape)


def test_all_wrong_names_are_told_at_once(shape):
    with pytest.raises(ModelError, match="3 problems"):
        check_targets(RunConfig(lora_target_modules=["a", "q_proj", "b"], lora_modules_to_save=["c"]), shape)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_target_modules": ["q_proj", "mlp.up_proj", "model.layers.0.self_attn.k_proj"]},
        {"lora_target_modules": r"model\.layers\.\d+\.mlp\..*"},
        {"lora_rank_pattern": {"q_proj": 4, r"layers\.0\.mlp\.up_proj": 2}},
        {"lora_modules_to_save": ["embed_tokens", "lm_head"]},
    ],
)
def test_names_that_match_are_accepted(shape, settings):
    check_targets(RunConfig(**settings), shape)


def test_settings_reach_peft(shape):
    config = RunConfig(
        lora_r=4, lora_alpha=6, use_rslora=True, lora_rank_pattern={"q_proj": 2}, lora_config={"bias": "all"}
    )
    found = lora_config(config, [], shape)
    assert (found.r, found.lora_alpha, found.use_rslora, found.rank_pattern, found.bias) == (
        4,
        6,
        True,
        {"q_proj": 2},
        "all",
    )
    assert (found.target_modules, str(found.task_type)) == ("all-linear", "CAUSAL_LM")


def test_what_peft_does_not_know_is_refused(shape):
    with pytest.raises(ModelError, match="do not go together"):
        lora_config(RunConfig(lora_config={"no_such_thing": 1}), [], shape)


def test_what_is_trained_is_told():
    model = attach(
        tiny_model(100),
        lora_config(RunConfig(lora_r=2, lora_target_modules=["q_proj", "v_proj"]), [], tiny_model(100)),
        seed=0,
    )
    # Two layers; A is rank × 64, B is outputs × rank, with 64 outputs of q and 32 of v.
    assert count_parameters(model)[0] == 2 * (2 * (64 + 64) + 2 * (64 + 32))
    assert describe_trained(model).endswith(" in q_proj ×2, v_proj ×2")


def test_the_seed_decides_the_start():
    def start(seed):
        model = attach(tiny_model(100), lora_config(RunConfig(), [], tiny_model(100)), seed)
        return next(parameter for name, parameter in model.named_parameters() if "lora_A" in name)

    assert start(1).equal(start(1))
    assert not start(1).equal(start(2))
