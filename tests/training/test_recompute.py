"""Recomputing layers changes memory and time, and nothing else: same losses, gradients, dropout, resumed runs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lora_sft import finetune
from lora_sft.chat.labels import Example
from lora_sft.config import RunConfig
from lora_sft.errors import ModelError, SettingError
from lora_sft.kernels.swap import Swaps
from lora_sft.model.adapter import attach, too_coarse, train_in
from lora_sft.model.base import BaseSpec, load_base
from lora_sft.training.activations import Activations, layers_of, measure
from lora_sft.training.batching import Batching, lay_end_to_end
from lora_sft.training.evaluation import pad
from lora_sft.training.fast import PARTS
from lora_sft.training.loss import forward_loss
from lora_sft.training.offload import HostCopies
from lora_sft.training.recompute import choose_rung, ladder, largest_batch, recompute, switch_on
from lora_sft.training.state import read_state
from lora_sft.training.trainer import build_trainer, training_arguments
from tests.conftest import FEW, sums
from tests.training.test_resume import SAVED, adapter, broken_off

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.08,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, **WINDOW)),
    "moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **EXPERTS)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=512, n_embd=64, n_layer=4, n_head=4, n_positions=512, initializer_range=0.08)
    ),
}
IN_FLOAT32, IN_NF4 = BaseSpec(""), BaseSpec("", quantization="nf4", double_quant=True, dtype="bfloat16")


def adapted(kind, folder, spec=IN_FLOAT32, dropout=0.0, **settings):
    """A tiny model in training mode, whose adapter does something."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    if spec.quantization:
        model.save_pretrained(folder)
        model = load_base(BaseSpec(**vars(spec) | {"name": str(folder)}))
    targets = {"target_modules": "all-linear"}
    if kind == "moe":  # fused experts are parameters; PEFT has no dropout on them
        experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        targets = {"target_modules": ["q_proj", "v_proj"], "target_parameters": None if dropout else experts}
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=dropout, **targets | settings)
    model = attach(model, lora, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def rows(longest=40) -> list[Example]:
    """Random documents, the second half of each learned."""
    random = np.random.default_rng(0)
    ids = [random.integers(3, 500, size).tolist() for size in (longest, longest // 2, longest - 3)]
    return [Example(row, [-100] * (len(row) // 2) + row[len(row) // 2 :]) for row in ids]


def loss_of(model, batch, in_bfloat16=False):
    torch.manual_seed(7)  # of the dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
        return forward_loss(model, batch)[0].value


def loss_and_gradients(model, batch, in_bfloat16=False):
    loss = loss_of(model, batch, in_bfloat16)
    loss.backward()
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.item(), found


def bytes_held(run) -> tuple[torch.Tensor, int]:
    """What a forward pass returns, and the bytes that the allocator gave and did not get back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        loss = run()
    return loss, sum(event.self_cpu_memory_usage for event in found.key_averages())


# --- the same arithmetic --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is")  # PEFT sets it right
@pytest.mark.parametrize("spec", [IN_FLOAT32, IN_NF4], ids=["float32", "nf4"])
@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_the_same_to_the_bit(kind, spec, tmp_path):
    for dropout in (0.0, 0.2):
        model = adapted(kind, tmp_path, spec, dropout)
        layers = layers_of(model)
        assert len(layers) == 4
        for batch in (pad(rows(), 0), lay_end_to_end(rows())):
            loss, gradients = loss_and_gradients(model, batch, spec.dtype == "bfloat16")
            assert all(gradient.any() for gradient in gradients.values())
            for count, host in ((1, None), (2, None), (4, None), (4, HostCopies())):
                with Swaps() as swaps:
                    switch_on(layers[:count], swaps, host)
                    again, others = loss_and_gradients(model, batch, spec.dtype == "bfloat16")
                assert again == loss
                assert others.keys() == gradients.keys()
                assert all(torch.equal(others[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("spec", [IN_FLOAT32, IN_NF4], ids=["float32", "nf4"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_fast_parts_are_recomputed_to_the_bit_and_predicted(kind, spec, tmp_path):
    model, in_bfloat16 = adapted(kind, tmp_path, spec), spec.dtype == "bfloat16"
    with Swaps() as fast:
        assert any(swap(model, fast).engaged for swap in PARTS)
        for batch in (pad(rows(200), 0), lay_end_to_end(rows(200))):
            loss, gradients = loss_and_gradients(model, batch, in_bfloat16)
            found = measure(model, lambda batch=batch: loss_of(model, batch, in_bfloat16))
            for count in (2, 4):
                with Swaps() as swaps:
                    switch_on(layers_of(model)[:count], swaps)
                    again, held = bytes_held(lambda batch=batch: loss_of(model, batch, in_bfloat16))
                    again.backward()
                assert again.item() == loss
                assert all(torch.equal(model.get_parameter(name).grad, one) for name, one in gradients.items())
                assert found.held(count) == pytest.approx(held, rel=0.03)
                model.zero_grad()


def test_dropout_falls_otherwise_in_every_layer_and_the_generator_goes_on_as_without(tmp_path):
    model = adapted("llama", tmp_path, dropout=0.5)
    batch = pad(rows(), 0)
    loss_and_gradients(model, batch)
    plain = torch.rand(3)
    with Swaps() as swaps:
        switch_on(layers_of(model), swaps)
        loss_and_gradients(model, batch)
    assert torch.equal(torch.rand(3), plain)


def test_what_is_recomputed_is_the_forward_that_was_swapped_in(tmp_path):
    model, called = adapted("llama", tmp_path), []
    layer = layers_of(model)[1]
    own = layer.forward

    def forward(*args, **kwargs):
        called.append(torch.is_grad_enabled())
        return own(*args, **kwargs)

    with Swaps() as swaps:
        swaps.forward(layer, forward)
        switch_on(layers_of(model), swaps)
        loss_and_gradients(model, pad(rows(), 0))
        assert called == [True, True]
        model.eval()
        loss_and_gradients(model, pad(rows(), 0))
        with torch.no_grad():
            loss_of(model.train(), pad(rows(), 0))
        assert len(called) == 4, "in evaluation and without gradients nothing is recomputed"
    assert "forward" not in vars(layer)


def test_nothing_is_computed_below_the_first_adapter(tmp_path):
    model = adapted("llama", tmp_path, target_modules=["v_proj"], layers_to_transform=[2, 3])
    seen = []
    for layer in layers_of(model):
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad))
    with Swaps() as swaps:
        switch_on(layers_of(model), swaps)
        _, gradients = loss_and_gradients(model, pad(rows(), 0))
    assert seen == [False, False, False, True]
    assert all(".layers.2." in name or ".layers.3." in name for name in gradients)


# --- what is held ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [IN_FLOAT32, IN_NF4], ids=["float32", "nf4"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "moe", "gpt2"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is")
def test_what_is_predicted_is_what_is_held(kind, spec, tmp_path):
    """Within two per cent, whatever is recomputed."""
    model, batch, in_bfloat16 = adapted(kind, tmp_path, spec, 0.1), pad(rows(200), 0), spec.dtype == "bfloat16"
    found = measure(model, lambda: loss_of(model, batch, in_bfloat16))
    for count in range(5):
        with Swaps() as swaps:
            switch_on(layers_of(model)[:count], swaps)
            loss, held = bytes_held(lambda: loss_of(model, batch, in_bfloat16))
            assert found.held(count) == pytest.approx(held, rel=0.02)
            del loss
    assert found.held(4) < found.held(0) / 4


def test_measuring_leaves_everything_as_it_was_and_holds_nothing(tmp_path):
    model, batch = adapted("llama", tmp_path, dropout=0.1), pad(rows(), 0)
    before, random = loss_and_gradients(model, batch), torch.get_rng_state()
    _, held = bytes_held(lambda: measure(model, lambda: forward_loss(model, batch)[0].value))
    assert held < 10_000
    assert torch.equal(torch.get_rng_state(), random)
    assert all("forward" not in vars(module) for module in model.modules())
    after = loss_and_gradients(model, batch)
    assert after[0] == before[0]
    assert all(torch.equal(after[1][name], before[1][name]) for name in before[1])


def test_of_layers_that_are_alike_two_are_computed(tmp_path):
    """The first has an input without gradient, and keeps less than the others."""
    model, ran = adapted("llama", tmp_path), []
    for number, layer in enumerate(layers_of(model)):
        layer.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    found = measure(model, lambda: forward_loss(model, pad(rows(), 0))[0].value)
    assert ran == [0, 1]
    assert found.kept[0] < found.kept[1] == found.kept[2] == found.kept[3]


@pytest.mark.parametrize("on_host", [True, False])
def test_inputs_of_layers_that_are_on_the_host_are_nowhere_else(on_host, tmp_path):
    model, inputs = adapted("llama", tmp_path), []
    for layer in layers_of(model):
        layer.register_forward_pre_hook(lambda _, args: inputs.append(StorageWeakRef(args[0].untyped_storage())))
    with Swaps() as swaps:
        switch_on(layers_of(model), swaps, HostCopies() if on_host else None)
        loss = loss_of(model, pad(rows(), 0))
    is_held = [not one.expired() for one in inputs]
    assert is_held == ([False, False, False, True] if on_host else [True] * 4), "the last one is needed at once"
    loss.backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_inputs_of_layers_leave_its_memory_and_come_back_in_time(tmp_path):
    model = adapted("llama", tmp_path, dropout=0.1).cuda()
    batch = {name: value.cuda() for name, value in pad(rows(500), 0).items()}
    found, held = [], []
    for host in (None, HostCopies()):
        with Swaps() as swaps:
            switch_on(layers_of(model), swaps, host)
            for _ in range(3):
                before = torch.cuda.memory_allocated()
                loss = loss_of(model, batch)
                torch.cuda.synchronize()
                held.append(torch.cuda.memory_allocated() - before)
                loss.backward()
                found.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
                model.zero_grad(set_to_none=True)
    inputs = 3 * 1500 * 64 * 4  # of three layers
    assert held[2] - held[-1] >= 0.9 * inputs
    for others in found[1:]:
        for name, one in found[0].items():
            torch.testing.assert_close(others[name], one)


def test_the_input_of_the_layer_before_is_fetched_ahead():
    host, tensors = HostCopies(), [torch.randn(3, requires_grad=True) for _ in range(3)]
    with_copies = []
    for number, tensor in enumerate(tensors):
        with host.keeping(number)():
            with_copies.append(tensor * tensor)
    sent = host._latest
    sum(with_copies).sum().backward()
    assert all(torch.equal(tensor.grad, 2 * tensor) for tensor in tensors)
    assert sent.previous is not None
    assert host._latest is None
    again = HostCopies()
    first = again._send(tensors[0], None)
    second = again._send(tensors[1], first)
    assert first.arriving is None
    assert torch.equal(again._fetch(second), tensors[1])
    assert torch.equal(first.arriving[0], tensors[0])


# --- the choice -----------------------------------------------------------------------------------------

TEN_LAYERS = Activations(kept=[100 << 20] * 10, inputs=[4 << 20] * 10, outside=50 << 20)


@pytest.mark.parametrize(
    ("free", "mode", "recomputed", "words"),
    [
        (2000, "none", 0, "no recomputation (needs 1.1 GiB for activations, 2.0 GiB are free)"),
        (1000, "selective", 2, "the first 2 of 10 layers are recomputed (needs 908 MiB for activations, 1000 MiB"),
        (300, "selective", 9, "the first 9 of 10 layers are recomputed (needs 236 MiB"),
        (235, "offload", 10, "all layers are recomputed, their inputs are kept in the memory of the host (needs 212"),
        (100, "offload", 10, "should memory run out, halve per_device_train_batch_size"),
    ],
)
def test_the_first_rung_that_fits_is_taken_and_said(free, mode, recomputed, words):
    rung, said = choose_rung(ladder(TEN_LAYERS, can_offload=True), free << 20, 10)
    assert (rung.mode, rung.recomputed) == (mode, recomputed)
    assert words in said


def test_full_recomputation_is_a_rung_where_the_loss_decides():
    """A large vocabulary: at the peak the logits are there, and nothing of the last layer has to be."""
    rungs = ladder(Activations([100] * 4, [4] * 4, outside=1000), can_offload=False)
    assert [rung.mode for rung in rungs] == ["none", "selective", "selective", "selective", "full"]
    assert [rung.needed for rung in rungs] == [2400, 2304, 2208, 2112, 2016]


def test_the_micro_batch_in_which_most_is_computed():
    lengths = [10, 10, 90, 10, 60, 60]
    assert sorted(largest_batch(lengths, Batching(2, 100, order="sequential"))) == [2, 3]
    assert sorted(largest_batch(lengths, Batching(2, 100, order="sequential", one_row=True))) == [4, 5]


def asked_for(model, asked, monkeypatch, free=None, **options):
    if free is not None:
        monkeypatch.setattr("lora_sft.training.recompute.free_bytes", lambda device: free)
    swaps = Swaps()
    batch = pad(rows(200), 0)
    mode = recompute(model, asked, lambda: forward_loss(model, batch)[0].value, swaps, **options)
    count = sum("forward" in vars(layer) for layer in layers_of(model))
    swaps.undo()
    return mode, count


def test_unset_it_goes_by_what_is_free_in_every_process(tmp_path, monkeypatch, capfd):
    model = adapted("llama", tmp_path)
    assert asked_for(model, None, monkeypatch, free=1 << 30) == ("none", 0)
    assert "memory: no recomputation (needs" in capfd.readouterr().err
    needed = ladder(measure(model, lambda: loss_of(model, pad(rows(200), 0))), can_offload=False)[2].needed
    first_step = 12 * sum(one.numel() for one in model.parameters() if one.requires_grad)  # gradients and moments
    assert asked_for(model, None, monkeypatch, free=needed + first_step) == ("selective", 2)
    assert asked_for(model, None, monkeypatch, free=needed + first_step - 1) == ("selective", 3)
    assert asked_for(model, None, monkeypatch, free=1 << 10) == ("selective", 3)
    assert "should memory run out" in capfd.readouterr().err
    another = {"over_ranks": lambda here: [here, (here[0], 1 << 10)]}
    assert asked_for(model, None, monkeypatch, free=1 << 30, **another) == ("selective", 3)


def test_what_is_asked_for_is_done(tmp_path, monkeypatch, capfd):
    model = adapted("llama", tmp_path)
    assert asked_for(model, False, monkeypatch) == ("none", 0)
    assert asked_for(model, "selective", monkeypatch) == ("selective", 2)
    assert asked_for(model, True, monkeypatch) == ("full", 4)
    assert asked_for(model, "offload", monkeypatch) == ("full", 4)
    assert "offload has nothing to do on the CPU" in capfd.readouterr().err


def test_a_model_that_came_with_checkpointing_has_ours_instead(tmp_path, monkeypatch):
    model = adapted("llama", tmp_path)
    model.base_model.model.activation_checkpointing_enable()
    assert asked_for(model, False, monkeypatch) == ("none", 0)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_a_model_without_known_layers_is_trained_as_it_is(capfd):
    model = torch.nn.Linear(2, 2)
    model.device = torch.device("cpu")
    assert recompute(model, None, lambda: None, Swaps()) == "none"
    assert "no recomputation (this model's layers are not known)" in capfd.readouterr().err
    with pytest.raises(ModelError, match="this model's layers are not known; set it to false"):
        recompute(model, True, lambda: None, Swaps())


# --- whole runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"bf16": True, "packing": True}], ids=["float32", "packed bfloat16"])
def test_every_mode_trains_the_same_adapter(base, tmp_path, settings):
    found = {
        str(mode): adapter(
            finetune(
                base,
                sums(12),
                output_dir=tmp_path / str(mode),
                **FEW | {"lora_dropout": 0.1, "gradient_checkpointing": mode} | settings,
            ).output_dir
        )
        for mode in (None, False, True, "selective", "offload")
    }
    assert len(set(found.values())) == 1


@pytest.mark.parametrize("mode", ["selective", True])
def test_a_run_that_recomputes_resumes_to_the_bit(base, tmp_path, mode):
    settings = {"gradient_checkpointing": mode}
    whole = finetune(base, sums(12), output_dir=tmp_path / "whole", **SAVED | settings).output_dir
    folder = broken_off(base, tmp_path / "run", **settings)
    finetune(base, sums(12), output_dir=folder, **SAVED | settings)
    assert adapter(folder) == adapter(whole)


def test_the_embeddings_need_no_gradient(tokenizer, tmp_path):
    model, asked = adapted("llama", tmp_path), []
    model.get_input_embeddings().register_forward_hook(lambda *call: asked.append(call[2].requires_grad))
    config = RunConfig(gradient_checkpointing=True, output_dir=str(tmp_path / "run"), max_steps=1, save_strategy="no")
    arguments = training_arguments(config, "cpu", "float32", has_eval_data=False)
    trainer = build_trainer(model, SimpleNamespace(tokenizer=tokenizer), rows(), [], config, arguments, [])
    trainer.train()
    assert asked
    assert not any(asked)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_small_optimizers_train_and_resume_to_the_bit(base, tmp_path, optim):
    """At rank 64 every matrix has the 4,096 weights from which on bitsandbytes keeps its moments in 8 bits."""
    settings = {"optim": optim, "lora_r": 64}
    whole = finetune(base, sums(12), output_dir=tmp_path / "whole", **SAVED | settings).output_dir
    folder = broken_off(base, tmp_path / "run", **settings)
    moments = tensors_in(read_state(folder / "checkpoint-4")["optimizer"]["state"][0])
    assert any(moment.dtype == torch.uint8 and moment.numel() >= 4096 for moment in moments) == ("8bit" in optim)
    finetune(base, sums(12), output_dir=folder, **SAVED | settings)
    assert adapter(folder) == adapter(whole)


def tensors_in(state) -> list[torch.Tensor]:
    """All of them, however deep."""
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in tensors_in(value)]
    return [state] if isinstance(state, torch.Tensor) else []


# --- the adapter's dtype --------------------------------------------------------------------------------


def test_steps_that_round_to_nothing_are_counted():
    weights = torch.cat([torch.randn(1000) * 10.0**power for power in range(-4, 2)]).bfloat16()
    for step in (1e-5, 2e-4, 3e-2):
        away = (weights.float() + step * weights.float().sign()).bfloat16()  # its step, away from zero
        assert too_coarse(weights, step) == pytest.approx(int((away == weights).sum()), abs=3)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_32bit"])
def test_an_adapter_in_bfloat16_trains_and_resumes_to_the_bit(base, tmp_path, optim, capfd):
    settings = {
        "adapter_dtype": "bfloat16",
        "bf16": True,
        "optim": optim,
        "lora_r": 64,
        "use_dora": optim == "adamw_8bit",
    }
    whole = finetune(base, sums(12), output_dir=tmp_path / "whole", **SAVED | settings | {"logging_steps": 1})
    assert "are so large that a step of 0.005 rounds to nothing" in capfd.readouterr().err
    dtypes = {
        name.rpartition("lora_")[2].partition(".")[0]: parameter.dtype
        for name, parameter in whole.model.named_parameters()
        if "lora_" in name
    }
    assert {dtypes["A"], dtypes["B"]} == {torch.bfloat16}
    assert dtypes.get("magnitude_vector", torch.float32) == torch.float32
    folder = broken_off(base, tmp_path / "run", **settings)
    state = read_state(folder / "checkpoint-4")["optimizer"]["state"]
    assert all(tensor.dtype != torch.bfloat16 for tensor in tensors_in(state))
    finetune(base, sums(12), output_dir=folder, **SAVED | settings)
    assert adapter(folder) == adapter(whole.output_dir)
    assert whole.metrics["last_loss"] < whole.metrics["first_loss"]


def test_bfloat16_is_refused_where_it_would_be_wrong():
    with pytest.raises(ValueError, match="lora_init pissa changes the base by exactly its start"):
        RunConfig(adapter_dtype="bfloat16", lora_init="pissa", load_in_4bit=False)
    with pytest.raises(ValueError, match="optim adamw_torch_fused would keep its moments in bfloat16 too"):
        RunConfig(adapter_dtype="bfloat16")
    config = RunConfig(adapter_dtype="bfloat16", optim="adamw_8bit")
    for dtype in ("float32", "float16"):
        with pytest.raises(SettingError, match=f"would round the products of the adapter in a run in {dtype}"):
            training_arguments(config, "cpu", dtype, has_eval_data=False)
    training_arguments(config, "cpu", "bfloat16", has_eval_data=False)


def test_why_torchs_adamw_is_refused_in_bfloat16():
    """A decay of 0.1 % rounds to nothing: after one large gradient the second moment stays where it was."""
    left = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.nn.Parameter(torch.ones(4, dtype=dtype))
        optimizer = torch.optim.AdamW([weight], lr=1e-3)
        for step in range(2000):
            weight.grad = torch.full_like(weight, 1.0 if step == 0 else 0.0)
            optimizer.step()
        left[dtype] = optimizer.state[weight]["exp_avg_sq"][0].item()
    assert left[torch.float32] == pytest.approx(1e-3 * 0.999**1999, rel=1e-3)
    assert left[torch.bfloat16] == pytest.approx(1e-3, rel=0.01)


def test_float32_is_left_alone(tmp_path, capfd):
    model = adapted("llama", tmp_path)
    train_in(model, "float32", 1e-4)
    assert {one.dtype for one in model.parameters() if one.requires_grad} == {torch.float32}
    assert capfd.readouterr().err == ""
