"""What preflight says of a run is true of it: sound runs pass unchanged, and each planted mistake is found."""

import json

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.models.llama.modeling_llama import LlamaMLP

from lora_sft import finetune, preflight
from lora_sft.cli import main
from lora_sft.errors import VerificationError
from lora_sft.kernels import projection
from lora_sft.model.tiny import tiny_tokenizer
from lora_sft.training import run as running
from lora_sft.training import trainer as training
from lora_sft.training.saving import Start
from lora_sft.training.trainer import Trainer
from tests.conftest import FEW, HARBOUR, logged, sums
from tests.families import tiny
from tests.test_adapter_kinds import moe_base  # noqa: F401 - a fixture
from tests.training.test_isolation import LEAKING

NAMES = [
    "documents stay apart",
    "accumulation",
    "gradient",
    "stop token",
    "save and load",
    "fast path equals plain path",
    "room on disk",
    "export",
]
EXPERTS = {
    "lora_target_modules": "q_proj",
    "lora_target_parameters": "mlp.experts.gate_up_proj,mlp.experts.down_proj",
}
SOUND = {
    "float32": {"load_in_4bit": False},
    "bfloat16 on nf4": {"bf16": True},
    "int8": {"load_in_8bit": True},
    "dropout": {"lora_dropout": 0.2},
    "dora": {"use_dora": True},
    "rslora with patterns": {
        "use_rslora": True,
        "lora_rank_pattern": {"q_proj": 4},
        "lora_alpha_pattern": {"k_proj": 64},
    },
    "modules to save": {"lora_modules_to_save": "lm_head,embed_tokens"},
    "modules to save in bfloat16": {"lora_modules_to_save": "lm_head", "bf16": True},
    "new tokens": {"new_tokens": "<a>,<b>"},
    "packing": {"packing": True},
    "plain parts": {"fast_kernels": False},
    "packing of plain parts": {"packing": True, "fast_kernels": False},
    "adapter in bfloat16": {"adapter_dtype": "bfloat16", "bf16": True, "optim": "adamw_8bit"},
    "checkpointing": {"gradient_checkpointing": True},
    "label smoothing": {"label_smoothing": 0.1},
    "mica": {"lora_init": "mica"},
    "eva": {"lora_init": "eva"},
    "one row": {},
    "router loss": EXPERTS | {"training_args": {"router_aux_loss_coef": 0.01}},
    "experts": EXPERTS,
    "experts in bfloat16": EXPERTS | {"bf16": True, "load_in_4bit": False},
}


def proofs_of(folder) -> dict[str, dict]:
    return {proof["name"]: proof for proof in json.loads((folder / "manifest.json").read_text())["preflight"]}


def holds(folder) -> dict[str, bool | None]:
    return {name: proof["holds"] for name, proof in proofs_of(folder).items()}


@pytest.fixture
def where(base, moe_base):  # noqa: F811
    return lambda settings: moe_base if "lora_target_parameters" in settings else base


@pytest.mark.parametrize("kind", SOUND)
def test_sound_runs_pass(kind, where, tmp_path):
    settings, rows = SOUND[kind], sums(1) if kind == "one row" else sums(8)
    run = finetune(where(settings), rows, output_dir=tmp_path / "run", **FEW | {"max_steps": 1} | settings)
    found = holds(run.output_dir)
    assert list(found) == NAMES
    assert all(found[name] for name in ("accumulation", "gradient", "stop token", "save and load", "room on disk"))
    assert found["documents stay apart"] is (None if settings == {"fast_kernels": False} else True)
    assert found["fast path equals plain path"] is (None if "fast_kernels" in settings else True)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer")
@pytest.mark.parametrize("kind", ["dora", "new tokens", "modules to save"])
def test_sound_runs_pass_with_tied_embeddings(kind, tied_base, tmp_path):
    run = finetune(tied_base, sums(8), output_dir=tmp_path / "run", **FEW | {"max_steps": 1} | SOUND[kind])
    assert {name for name, is_so in holds(run.output_dir).items() if not is_so} == {"export"}


def test_trained_biases_come_back(tmp_path, harbour_texts):
    tokenizer = tiny_tokenizer(harbour_texts, 512)
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
    config = GPT2Config(vocab_size=len(tokenizer), eos_token_id=2, bos_token_id=1, pad_token_id=0, **shape)
    model = GPT2LMHeadModel(config)
    settings = {"lora_target_modules": "c_attn", "lora_config": {"bias": "all", "fan_in_fan_out": True}}
    run = finetune(model, sums(4), tokenizer=tokenizer, output_dir=tmp_path / "run", **FEW | settings)
    found = proofs_of(run.output_dir)
    assert found["gradient"]["holds"]
    assert found["save and load"]["words"].startswith("17 tensors come back")  # A and B of two layers, and 13 biases


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_dropout": 0.1, "gradient_accumulation_steps": 2},
        {"fast_kernels": False},
        {"packing": True, "bf16": True, "lora_modules_to_save": "lm_head"},
        {"load_in_8bit": True},
        {"use_dora": True, "new_tokens": "<a>"},
        {"neftune_noise_alpha": 5.0, "lora_init": "pissa"},
        EXPERTS,
    ],
    ids=lambda settings: "+".join(settings),
)
def test_a_run_is_the_same_to_the_bit_with_the_proofs_and_without(settings, where, tmp_path):
    runs = [
        finetune(where(settings), sums(8), output_dir=tmp_path / str(on), preflight=on, **FEW | settings)
        for on in (True, False)
    ]
    one, other = ((run.output_dir / "adapter_model.safetensors").read_bytes() for run in runs)
    assert one == other
    timed = ("seconds", "tokens_per_second", "peak_bytes")
    lines = [
        [{name: value for name, value in line.items() if not name.endswith(timed)} for line in logged(run.output_dir)]
        for run in runs
    ]
    assert lines[0] == lines[1]
    assert json.loads((runs[1].output_dir / "manifest.json").read_text())["preflight"] == []
    assert sorted(file.name for file in runs[0].output_dir.iterdir()) == sorted(
        file.name for file in runs[1].output_dir.iterdir()
    )


# --- planted mistakes -------------------------------------------------------------------------------------


@pytest.fixture
def train(base, tmp_path):
    """Trains with a mistake planted → the words of the error; nothing but an empty folder may be left."""

    def train(**settings) -> str:
        with pytest.raises(VerificationError) as error:
            finetune(base, sums(8), output_dir=tmp_path / "run", **FEW | settings)
        assert error.value.exit_code == 3
        assert not (tmp_path / "run").exists()
        return str(error.value)

    return train


@pytest.fixture
def change_model(monkeypatch):
    """Has a function change the model when its adapter is attached."""

    def plant(change) -> None:
        real = running.build_model

        def build(*args):
            model = real(*args)
            change(model)
            return model

        monkeypatch.setattr(running, "build_model", build)

    return plant


def layer_of(model, name):
    return next(
        module for path, module in model.named_modules() if path.endswith(name) and isinstance(module, LoraLayer)
    )


def detached(model) -> None:
    """The adapter of one layer adds to its output, but without a gradient."""
    layer = layer_of(model, "layers.1.mlp.up_proj")
    kind = type(layer)

    class Detached(kind):
        def forward(self, x):
            plain = self.base_layer(x)
            return plain + (kind.forward(self, x) - plain).detach()

    layer.__class__ = Detached


@pytest.mark.parametrize("fast", [True, False])
def test_an_adapter_that_no_gradient_reaches_is_found(fast, change_model, train):
    change_model(detached)
    words = train(fast_kernels=fast, load_in_4bit=False)
    assert "preflight: gradient: does not reach model.layers.1.mlp.up_proj; reaches 13 of 14 adapters" in words
    assert "preflight: false trains regardless" in words


def test_an_adapter_that_was_frozen_is_found(change_model, train):
    change_model(lambda model: layer_of(model, "layers.0.self_attn.q_proj").requires_grad_(False))
    assert "does not reach model.layers.0.self_attn.q_proj" in train()


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_a_weight_of_the_base_that_would_be_trained_is_found(name, change_model, train):
    change_model(lambda model: model.get_base_model().get_parameter(name).requires_grad_(True))
    assert f"preflight: gradient: also reaches {name}; reaches 14 of 14 adapters" in train(load_in_4bit=False)


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.1}, {"bf16": True}, {"packing": True}], ids=str)
def test_a_loss_that_is_divided_by_each_micro_batchs_own_tokens_is_found(settings, monkeypatch, train):
    real = training.forward_loss
    monkeypatch.setattr(
        training, "forward_loss", lambda model, batch, count=None, smoothing=0.0: real(model, batch, None, smoothing)
    )
    assert "preflight: accumulation: 2 micro-batches of one row and one of 2 differ by" in train(**settings)


def test_a_loss_that_is_divided_once_more_is_found(monkeypatch, train):
    monkeypatch.setattr(Trainer, "loss_is_scaled_for_ga", False)
    assert "differ by 0.5 in the loss and 0.5 in the gradients" in train()


def a_save_that(change):
    real = Start.save

    def save(self, model, folder):
        real(self, model, folder)
        change(folder)

    return save


def without_one(folder) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, folder / "adapter_model.safetensors")


def one_rounded(folder) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    name = list(tensors)[-1]
    tensors[name] = tensors[name].bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors")


def another_alpha(folder) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 15}))


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (without_one, "does not fit its base: Found missing adapter keys"),
        (one_rounded, "1 of 28 tensors changed: model.layers"),
        (another_alpha, "28 tensors come back; the logits of 32 tokens differ by 1"),
    ],
    ids=["a tensor is missing", "a tensor is rounded", "the scaling is another"],
)
def test_an_adapter_that_does_not_come_back_as_it_was_is_found(mistake, words, monkeypatch, train):
    monkeypatch.setattr(Start, "save", a_save_that(mistake))
    found = train()
    assert f"preflight: save and load: {words}" in found.replace("what was saved: the adapter ", "")


def test_biases_that_are_not_saved_are_found(tmp_path, harbour_texts, monkeypatch):
    def without_biases(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(".bias")}
        save_file(kept, folder / "adapter_model.safetensors")

    monkeypatch.setattr(Start, "save", a_save_that(without_biases))
    tokenizer = tiny_tokenizer(harbour_texts, 512)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, n_positions=512, eos_token_id=2)
    model = GPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    settings = {"lora_target_modules": "c_attn", "lora_config": {"bias": "all", "fan_in_fan_out": True}}
    with pytest.raises(VerificationError, match="save and load: 13 of 17 tensors changed"):
        finetune(model, sums(4), tokenizer=tokenizer, output_dir=tmp_path / "run", **FEW | settings)


def test_a_stop_token_at_which_the_model_would_not_stop_is_found(monkeypatch, train):
    def teach_another(model, speech):
        model.generation_config.eos_token_id = 7

    monkeypatch.setattr(running, "teach_stop_tokens", teach_another)
    assert "end with <|im_end|>, but 2 is not in generation_config.eos_token_id: [7]" in train()


def test_a_wrong_fast_part_is_taken_out_and_told(base, tmp_path, monkeypatch):
    real = projection.lora_projections
    monkeypatch.setattr(
        projection, "lora_projections", lambda x, layers: real(x, [layer._replace(scaling=1.0) for layer in layers])
    )
    run = finetune(base, sums(8), output_dir=tmp_path / "run", **FEW)
    proof = proofs_of(run.output_dir)["fast path equals plain path"]
    assert proof["holds"] is None
    assert proof["words"].endswith("they were taken out")


def test_a_model_that_leaks_is_not_packed_and_it_is_told(tokenizer, tmp_path):
    model = tiny("mamba2", LEAKING["mamba2"] | {"vocab_size": 512, "eos_token_id": 2})
    settings = {"packing": True, "lora_target_modules": "in_proj", "max_length": 256}
    run = finetune(model, sums(8), tokenizer=tokenizer, output_dir=tmp_path / "run", **FEW | settings)
    proof = proofs_of(run.output_dir)["documents stay apart"]
    assert proof["holds"] is None
    assert proof["words"] == "each is padded in a row of its own (packing is off, see above)"


# --- what is no mistake -----------------------------------------------------------------------------------


class WithoutUp(LlamaMLP):
    """As layers that take what another layer has computed."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)))


def test_an_adapter_of_a_layer_that_the_model_does_not_use_is_told_and_no_failure(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.model.layers[1].mlp.__class__ = WithoutUp
    tokenizer = AutoTokenizer.from_pretrained(base)
    run = finetune(model, sums(4), tokenizer=tokenizer, output_dir=tmp_path / "run", **FEW)
    proof = proofs_of(run.output_dir)["gradient"]
    assert proof["holds"]
    assert proof["words"].endswith(
        "reaches 13 of 14 adapters, none of 21 frozen weights; "
        "not called by the model on the first rows: model.layers.1.mlp.up_proj"
    )


def test_new_tokens_that_the_first_rows_do_not_hold_are_no_failure(base, tmp_path):
    run = finetune(base, sums(4), output_dir=tmp_path / "run", **FEW | {"new_tokens": "<a>,<b>"})
    proof = proofs_of(run.output_dir)["gradient"]
    assert proof["holds"]
    assert "15 of 16 adapters" in proof["words"]
    assert proof["words"].endswith("; no new token in the first rows: model.embed_tokens")


def test_new_tokens_of_a_tied_base_that_the_first_rows_do_not_hold_are_reached_at_the_head(tied_base, tmp_path):
    run = finetune(tied_base, sums(4), output_dir=tmp_path / "run", **FEW | {"new_tokens": "<a>,<b>"})
    assert "15 of 15 adapters" in proofs_of(run.output_dir)["gradient"]["words"]


def test_rows_that_do_not_end_with_a_stop_token_are_told(base, tmp_path):
    settings = {"truncation": "cut", "max_length": 40, "allow": "no_stop_token", "max_lost_share": 1.0}
    run = finetune(base, sums(12), output_dir=tmp_path / "run", **FEW | settings)
    proof = proofs_of(run.output_dir)["stop token"]
    assert proof["holds"] is None
    data = json.loads((run.output_dir / "manifest.json").read_text())["data"]
    assert data["cut"] == 10  # of which one lost no more than what stands behind its reply
    assert proof["words"].startswith("3 of 12 rows learn to end with <|im_end|>")


def test_no_room_for_a_merge_is_told(base, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "stored_bytes", lambda spec: 2**60)
    run = finetune(base, sums(4), output_dir=tmp_path / "run", **FEW)
    proof = proofs_of(run.output_dir)["room on disk"]
    assert proof["holds"] is None
    assert proof["words"].endswith("are free: merge into a folder on another disk")


def test_a_base_that_holds_nan_is_left_to_the_watch(base, tmp_path):
    from lora_sft.errors import RunError

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.model.norm.weight.data[0] = torch.nan
    tokenizer = AutoTokenizer.from_pretrained(base)
    with pytest.raises(RunError, match=r"NaN or Inf in base_model\.model\.model\.norm\.weight"):
        finetune(model, sums(4), tokenizer=tokenizer, output_dir=tmp_path / "run", **FEW)


def test_what_is_exported_later_is_named(base, tmp_path):
    run = finetune(base, sums(4), output_dir=tmp_path / "run", **FEW | {"export_to": "vllm,adapter"})
    proof = proofs_of(run.output_dir)["export"]
    assert proof == {
        "name": "export",
        "words": "vllm, adapter: nothing of this adapter and base is refused",
        "holds": True,
    }


# --- what a person sees, and what is kept -----------------------------------------------------------------


def test_each_proof_is_a_line_with_its_number(base, tmp_path, capfd):
    finetune(base, sums(8), output_dir=tmp_path / "run", **FEW)
    lines = [line.rstrip() for line in capfd.readouterr().err.splitlines()]
    last = next(place for place, line in enumerate(lines) if line.startswith("preflight: "))
    shown = lines[last - len(NAMES) : last]
    assert [line[7 : 7 + len(name)] for line, name in zip(shown, NAMES, strict=True)] == NAMES
    assert [line.split()[0] for line in shown] == ["holds"] * 7 + ["—"]
    assert lines[last].startswith("preflight: 7 proofs hold (")
    assert "14 of 14 adapters" in shown[2]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<td>gradient</td><td>✓ reaches 14 of 14 adapters" in page


def test_it_can_be_switched_off(base, tmp_path, change_model, capfd):
    change_model(detached)
    run = finetune(base, sums(8), output_dir=tmp_path / "run", preflight=False, **FEW | {"load_in_4bit": False})
    assert run.metrics["steps"] == 3
    assert "proofs hold" not in capfd.readouterr().err
    assert "Proven before" not in (run.output_dir / "report.html").read_text()


def test_the_command_line_ends_with_3(base, change_model, tmp_path, capsys):
    change_model(detached)
    words = ["train", "--model", str(base), "--dataset", str(HARBOUR), "--output-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--max-steps", "1", "--no-load-in-4bit"])
    assert ended.value.code == 3
    assert "fails  gradient" in capsys.readouterr().err


def test_what_a_run_left_that_was_killed_in_its_preflight_is_no_obstacle(base, tmp_path):
    (tmp_path / "run" / ".part").mkdir(parents=True)
    (tmp_path / "run" / ".part" / "adapter_model.safetensors").write_text("half")
    run = finetune(base, sums(4), output_dir=tmp_path / "run", **FEW)
    assert not (run.output_dir / ".part").exists()


class PowerCut:
    """The process dies in step 2."""

    def started(self, total_steps, first_step): ...
    def logged(self, step, metrics): ...
    def ended(self): ...
    def stepped(self, step):
        if step == 2:
            raise KeyboardInterrupt


def test_a_run_that_goes_on_keeps_its_proofs_and_does_not_make_them_again(base, tmp_path, capfd):
    settings = FEW | {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        finetune(base, sums(8), output_dir=tmp_path / "run", **settings | {"listeners": (PowerCut(),)})
    started = json.loads((tmp_path / "run" / "start.json").read_text())["preflight"]
    capfd.readouterr()
    run = finetune(base, sums(8), output_dir=tmp_path / "run", **settings)
    assert json.loads((run.output_dir / "manifest.json").read_text())["preflight"] == started
    words = capfd.readouterr().err
    assert "preflight: not made again: the run goes on with what its 8 proofs were made on" in words
    assert "proofs hold" not in words


def test_with_other_versions_they_are_made_again(base, tmp_path, capfd):
    settings = FEW | {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        finetune(base, sums(8), output_dir=tmp_path / "run", **settings | {"listeners": (PowerCut(),)})
    file = tmp_path / "run" / "start.json"
    started = json.loads(file.read_text())
    file.write_text(json.dumps(started | {"versions": started["versions"] | {"torch": "2.0"}}))
    finetune(base, sums(8), output_dir=tmp_path / "run", **settings)
    assert capfd.readouterr().err.count("proofs hold") == 2
