"""Mappings, YAML and command-line words become one RunConfig; what is wrong is said in one sentence."""

import subprocess
import sys

import pytest
import yaml

from lora_sft.config import RunConfig, other_names, sections
from lora_sft.dialect import MEANINGS
from lora_sft.errors import SettingError
from lora_sft.settings import commented_yaml, from_words, read_file, resolve, to_yaml


def test_a_later_layer_wins():
    assert resolve({"seed": 1, "lora_r": 4}, {"seed": 2}).model_dump(include={"seed", "lora_r"}) == {
        "seed": 2,
        "lora_r": 4,
    }


@pytest.mark.parametrize(
    "words",
    [
        ["--learning-rate", "3e-4"],
        ["--learning_rate", "3e-4"],
        ["learning_rate=3e-4"],
        ["--learning-rate=3e-4"],
        ["--lr", "3e-4"],
    ],
)
def test_a_setting_can_be_written_in_many_ways(words):
    assert resolve(from_words(words)).learning_rate == 3e-4


@pytest.mark.parametrize(
    ("words", "value"), [(["--bf16"], True), (["--no-bf16"], False), (["--bf16", "true"], True), (["bf16=no"], False)]
)
def test_a_switch_can_be_written_in_many_ways(words, value):
    assert resolve(from_words([*words, "seed=1"])).bf16 is value


def test_lists_and_mappings_on_the_command_line():
    config = resolve(from_words(["--lora-target-modules", "q_proj,v_proj", "--lora-rank-pattern", "{q_proj: 4}"]))
    assert config.lora_target_modules == ["q_proj", "v_proj"]
    assert config.lora_rank_pattern == {"q_proj": 4}


@pytest.mark.parametrize("words", [["save_strategy=no"], ["--save-strategy", "no"]])
def test_a_bare_no_is_a_cadence_and_not_false(words):
    assert resolve(from_words(words)).save_strategy == "no"


def test_a_regex_stays_a_regex_and_one_name_is_a_list():
    assert resolve({"lora_target_modules": r".*\.[qk]_proj"}).lora_target_modules == r".*\.[qk]_proj"
    assert resolve({"lora_target_modules": "q_proj"}).lora_target_modules == ["q_proj"]
    assert resolve({"lora_target_modules": "all-linear"}).lora_target_modules == "all-linear"


def test_a_path_that_looks_like_a_number_stays_a_path():
    assert resolve(from_words(["--output-dir", "007", "--model", "1e5"])).output_dir == "007"


def test_an_unknown_name_is_an_error_with_the_nearest_known_one():
    with pytest.raises(SettingError, match='unknown setting "lerning_rate"; did you mean learning_rate'):
        resolve({"lerning_rate": 1e-4})


def test_a_name_of_training_arguments_is_passed_on_aloud(capsys):
    config = resolve({"adam_beta2": 0.95, "training_args": {"adam_beta1": 0.8}})
    assert config.training_args == {"adam_beta1": 0.8, "adam_beta2": 0.95}
    assert "adam_beta2 is passed on to TrainingArguments" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(other_names()))
def test_every_name_of_other_trainers_leads_to_a_setting_of_ours(name):
    assert other_names()[name] in RunConfig.model_fields
    assert name not in RunConfig.model_fields
    assert name not in MEANINGS


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"adapter": "qlora"}, {"load_in_4bit": True}),
        ({"quantization_bit": 8}, {"load_in_8bit": True}),
        ({"cutoff_len": 512}, {"max_length": 512}),
        ({"sequence_len": 512}, {"max_length": 512}),
        ({"micro_batch_size": 3}, {"per_device_train_batch_size": 3}),
        ({"lora_rank": 5}, {"lora_r": 5}),
        ({"val_set_size": 0.1}, {"eval_size": 0.1}),
        ({"sample_packing": False}, {}),
        ({"base_model": "m"}, {"model_name_or_path": "m"}),
        ({"train_on_inputs": False}, {}),
        ({"lora_target_linear": True}, {"lora_target_modules": "all-linear"}),
        ({"excess_length_strategy": "truncate"}, {"truncation": "cut"}),
        ({"datasets": [{"path": "a.jsonl", "type": "chat_template"}]}, {"dataset": "a.jsonl"}),
        ({"bf16": "auto"}, {"bf16": None}),
        ({"use_gradient_checkpointing": "unsloth"}, {"gradient_checkpointing": "offload"}),
        ({"dtype": "bfloat16"}, {"bf16": True}),
    ],
)
def test_other_trainers_words_are_translated(theirs, ours):
    assert resolve(theirs) == RunConfig(**ours)


def test_a_translation_is_said_aloud(capsys):
    resolve({"cutoff_len": 512, "adapter": "qlora"})
    said = capsys.readouterr().err
    assert "cutoff_len is max_length here" in said
    assert "adapter: qlora is load_in_4bit: True" in said


@pytest.mark.parametrize(
    "refused",
    [
        {"train_on_inputs": True},
        {"stage": "dpo"},
        {"adapter": "ia3"},
        {"overwrite_output_dir": True},
    ],
)
def test_what_we_do_not_do_is_refused_and_not_ignored(refused):
    with pytest.raises(SettingError, match="is not something we do"):
        resolve(refused)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hub_token": "hf_secret"}, "hub_token: `lora-sft export hub` uploads"),
        ({"training_args": {"push_to_hub": True}}, "push_to_hub: `lora-sft export hub` uploads"),
        ({"training_args": {"packing": True}}, "packing: the rows are prepared before"),
        (
            {"training_args": {"gradient_checkpointing": True}},
            "there is a setting of ours for it, gradient_checkpointing",
        ),
    ],
)
def test_arguments_that_would_have_no_effect_are_refused(settings, words):
    with pytest.raises(SettingError, match=words):
        resolve(settings)


def test_what_stands_inside_a_mapping_is_added_to_an_earlier_layer():
    config = resolve({"training_args": {"adam_beta2": 0.95}}, from_words(["training_args.adam_beta1=0.8"]))
    assert config.training_args == {"adam_beta2": 0.95, "adam_beta1": 0.8}


@pytest.mark.parametrize(
    ("words", "setting", "value"),
    [
        (["--resume-from-checkpoint", "runs/x/checkpoint-3"], "resume_from_checkpoint", "runs/x/checkpoint-3"),
        (["--new-tokens", "[THINK]"], "new_tokens", ["[THINK]"]),
        (["--new-tokens", "<a>, <b>"], "new_tokens", ["<a>", "<b>"]),
        (["--lora-target-modules", "[q_proj, v_proj]"], "lora_target_modules", ["q_proj", "v_proj"]),
        (["--chat-template", "none"], "chat_template", None),
        (["--validation-split-percentage", "5"], "eval_size", 0.05),
        (["--flash-attn", "fa2"], "attn_implementation", "flash_attention_2"),
    ],
)
def test_words_mean_what_people_mean(words, setting, value):
    assert getattr(resolve(from_words(words)), setting) == value


def test_empty_settings_of_others_are_left_out_aloud(capsys):
    assert resolve({"wandb_project": None, "dtype": None, "lora_target": "all", "bias": "none"}).lora_config == {
        "bias": "none"
    }
    assert "wandb_project is empty, and left out" in capsys.readouterr().err


def test_every_refusal_names_its_setting_and_all_are_told_at_once():
    with pytest.raises(SettingError, match=r"2 problems(.|\n)*stage: 'dpo' is not(.|\n)*train_on_inputs: True is not"):
        resolve({"stage": "dpo", "train_on_inputs": True})


def test_one_setting_under_two_names_is_refused():
    with pytest.raises(SettingError, match="max_length is given twice"):
        resolve({"cutoff_len": 512, "max_length": 1024})


def test_all_wrong_values_are_told_at_once():
    with pytest.raises(SettingError) as error:
        resolve({"max_length": -5, "lora_alpha": 0, "seed": "x"})
    assert "3 problems" in str(error.value)
    assert all(words in str(error.value) for words in ("max_length: -5", "lora_alpha: 0", "seed: 'x'"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"load_in_4bit": True, "load_in_8bit": True},
        {"bf16": True, "fp16": True},
        {"lora_init": "best"},
        {"lora_init": "pissa", "load_in_4bit": True},
        {"lora_init": "loftq", "load_in_4bit": False},
        {"lora_init": "orthogonal", "lora_r": 3},
        {"lora_target_parameters": "experts.w", "lora_dropout": 0.1},
        {"eval_strategy": "steps"},
        {"early_stopping_patience": 2},
        {"eval_size": 0.1, "eval_dataset": "a.jsonl"},
        {"eval_size": 2.5},
        {"max_steps": 0},
    ],
)
def test_settings_that_contradict_each_other_are_refused(wrong):
    with pytest.raises(SettingError):
        resolve(wrong)


def test_numbers_with_an_exponent_are_numbers(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rate: 2e-4\ntraining_args: {adam_epsilon: 1e-6}\n")
    config = resolve(read_file(tmp_path / "a.yaml"))
    assert (config.learning_rate, config.training_args) == (2e-4, {"adam_epsilon": 1e-6})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nseed: 2\n", "a.yaml:2:1: seed stands twice"),
        ("seed: [1\n", "a.yaml:2:1"),
        ("- seed\n", "holds list"),
        ("x: !!python/name:os.system\n", "a.yaml:1:4"),
    ],
)
def test_a_broken_file_is_told_with_line_and_column(tmp_path, text, words):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SettingError, match=words):
        read_file(tmp_path / "a.yaml")


def test_settings_written_as_yaml_read_back_the_same(tmp_path):
    config = resolve(
        {
            "lora_rank_pattern": {"q_proj": 4},
            "learning_rate": 1e-5,
            "report_to": "tensorboard,wandb",
            "chat_template_kwargs": {"a": None},
        }
    )
    (tmp_path / "run.yaml").write_text(to_yaml(config, "a note"))
    assert resolve(read_file(tmp_path / "run.yaml")) == config


def test_the_commented_file_explains_every_setting_and_its_defaults_are_ours(tmp_path):
    text = commented_yaml()
    for _, fields in sections():
        for name, field in fields.items():
            assert f"# {field.description}\n" in text
            assert f"{name}: " in text
    uncommented = "\n".join(
        line.removeprefix("# ")
        for line in text.splitlines()
        if line.startswith("# ") and ": " in line and line[2:].split(":")[0] in RunConfig.model_fields
    )
    assert resolve(yaml.safe_load(uncommented)) == RunConfig()


def test_every_setting_is_in_the_schema_with_its_help():
    schema = RunConfig.model_json_schema()["properties"]
    assert set(schema) == set(RunConfig.model_fields)
    assert all(entry["description"] for entry in schema.values())


def test_the_names_of_training_arguments_are_found_without_importing_torch():
    code = "import sys, lora_sft.settings as s; s.resolve({'adam_beta1': 1}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_several_sources_are_written_as_they_were_given():
    source = {"path": "b.csv", "weight": 2.0, "columns": {"prompt": "q"}}
    config = resolve({"dataset": ["a.jsonl", source]})
    assert resolve(yaml.safe_load(to_yaml(config))) == config
    assert "dataset: [a.jsonl, {path: b.csv, columns: {prompt: q}, weight: 2.0}]" in to_yaml(config)


def test_axolotls_list_of_datasets_is_ours():
    theirs = [{"path": "a.jsonl", "type": "alpaca"}, {"path": "b/c", "split": "test", "type": "chat_template"}]
    ours = [{"path": "a.jsonl", "layout": "alpaca"}, {"path": "b/c", "split": "test"}]
    assert resolve({"datasets": theirs}) == resolve({"dataset": ours})
    with pytest.raises(SettingError, match="type 'pygmalion' is not something we read"):
        resolve({"datasets": [{"path": "a.jsonl", "type": "pygmalion"}]})
