"""Every setting, once: name, type, default, and the sentence that explains it.

Python keywords, YAML files, command-line flags, `lora-sft schema` and `lora-sft init` are all made from
these fields. Names follow transformers, TRL and PEFT; `also` lists the names that other trainers use for
the same thing. Where the defaults come from is told in `docs/settings.md`.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

Fraction = Annotated[float, Field(ge=0, lt=1)]


def setting(default: Any, help: str, *, also: tuple[str, ...] = ()) -> Any:
    """One setting: its default, its help sentence, and the names that other trainers use for it."""
    return Field(default, description=help, json_schema_extra={"also": list(also)} if also else None)


def _split_names(value: Any) -> Any:
    """`q_proj,v_proj` is two names; `all-linear` and anything with regex characters stays a string."""
    names = _split_list(value)
    plain = isinstance(names, list) and all(re.fullmatch(r"[\w.-]+", str(name)) for name in names)
    return names if plain and value != "all-linear" else value


def _split_list(value: Any) -> Any:
    """`a,b` and `[a, b]` are two names; a lone `[THINK]` is one."""
    if not isinstance(value, str):
        return value
    if re.fullmatch(r"\[[^\[\]]*,[^\[\]]*\]", value):
        value = value[1:-1]
    return [name.strip() for name in value.split(",") if name.strip()]


def _split_pairs(value: Any) -> Any:
    """`prompt=question,completion=answer` is a mapping."""
    if not isinstance(value, str) or not all("=" in pair for pair in value.split(",")):
        return value
    return {name.strip(): other.strip() for name, _, other in (pair.partition("=") for pair in value.split(","))}


Names = Annotated[list[str], BeforeValidator(_split_list)]
Pairs = Annotated[dict[str, str], BeforeValidator(_split_pairs)]
Cadence = Annotated[
    Literal["no", "steps", "epoch"],
    BeforeValidator(lambda value: "no" if value is False else value),  # YAML reads a bare no as false
]
NamesOrRegex = Annotated[str | list[str], BeforeValidator(_split_names)]


RUN_PARTS = ("data", "evaluation_data", "base", "chat_template", "stop_tokens", "processes")
"""What a run is made of besides its settings, in the words of `resume_with_changed`."""


def _read_resume(value: Any) -> Any:
    """The words of the command line as booleans; nothing at all is `auto`."""
    words = {"true": True, "yes": True, "last": True, "false": False, "no": False, "auto": "auto"}
    return "auto" if value is None else words.get(value.lower(), value) if isinstance(value, str) else value


Resume = Annotated[bool | str, BeforeValidator(_read_resume)]


class Section(BaseModel):
    """Base of the groups below. Unknown names are an error, never ignored."""

    # The validator is built at first use, so that commands that only list the settings are quick.
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), defer_build=True)


class ModelSettings(Section):
    """Base model"""

    model_name_or_path: str | None = setting(
        None, "The base model: a folder or a hub name.", also=("model", "base_model", "model_name", "model_id")
    )
    model_revision: str | None = setting(
        None, "Branch, tag or commit of a hub model; the commit is recorded either way.", also=("revision",)
    )
    trust_remote_code: bool = setting(False, "Run Python code that comes with the model. Off unless you read it.")
    load_in_4bit: bool | None = setting(
        None,
        "Store the base in 4 bits (QLoRA). Unset: yes, unless the model is given loaded or another precision is "
        "asked for.",
    )
    load_in_8bit: bool = setting(False, "Store the base in 8 bits (LLM.int8).")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = setting("nf4", "The 4-bit number format.", also=("quant_type",))
    bnb_4bit_use_double_quant: bool = setting(
        True,
        "Quantize the scales of the 4-bit blocks too; saves 0.4 bits a weight.",
        also=("use_bnb_nested_quant", "double_quantization", "bnb_double_quant"),
    )
    bf16: bool | None = setting(None, "Compute in bfloat16. Unset: where the GPU supports it.", also=("bfloat16",))
    fp16: bool | None = setting(None, "Compute in float16. Unset: on GPUs without bfloat16.", also=("float16",))
    device: Literal["auto", "cuda", "cpu"] = setting("auto", "Where to train. auto: the GPU if there is one.")
    attn_implementation: str | None = setting(
        None,
        "Attention kernel: eager, sdpa, flash_attention_2, … Unset: what transformers chooses.",
        also=("attention_implementation",),
    )


class AdapterSettings(Section):
    """Adapter"""

    lora_r: PositiveInt = setting(16, "Rank of the update.", also=("lora_rank", "rank", "r", "lora_dim"))
    lora_alpha: PositiveInt = setting(32, "The update is scaled by alpha / rank (by alpha / √rank with rsLoRA).")
    lora_dropout: Fraction = setting(0.0, "Dropout on the input of the update.")
    lora_target_modules: NamesOrRegex = setting(
        "all-linear",
        "What gets an adapter: all-linear, names (q_proj,v_proj), or a regex on the full module name.",
        also=("target_modules", "lora_target"),
    )
    lora_target_parameters: Names | None = setting(
        None,
        "Parameters (not modules) that get an adapter: fused expert weights, such as mlp.experts.gate_up_proj.",
        also=("target_parameters",),
    )
    lora_rank_pattern: dict[str, PositiveInt] = setting(
        {}, "Other ranks for some modules: {name or regex: rank}.", also=("rank_pattern",)
    )
    lora_alpha_pattern: dict[str, PositiveInt] = setting(
        {}, "Other alphas for some modules: {name or regex: alpha}.", also=("alpha_pattern",)
    )
    lora_modules_to_save: Names | None = setting(
        None,
        "Modules trained in full and saved whole, such as embed_tokens,lm_head.",
        also=("modules_to_save", "additional_target"),
    )
    use_rslora: bool = setting(
        False, "Scale by alpha / √rank (rsLoRA); better at high rank.", also=("lora_use_rslora",)
    )
    use_dora: bool = setting(
        False, "Learn the magnitude of each weight row apart (DoRA); slower.", also=("lora_use_dora", "peft_use_dora")
    )
    lora_init: str = setting(
        "default",
        "How the update starts: default, gaussian, orthogonal, mica, pissa, pissa_niter_N, olora, loftq or eva.",
        also=("init_lora_weights", "peft_init_lora_weights"),
    )
    adapter_dtype: Literal["float32", "bfloat16"] = setting(
        "float32",
        "In which the LoRA matrices are kept and trained. bfloat16 takes half of their memory and loses updates that "
        "are small beside the weight; it needs bf16 and an optimizer of bitsandbytes.",
    )
    new_tokens: Names | None = setting(
        None,
        "Tokens to add to the vocabulary; their embeddings are trained.",
        also=("add_tokens", "new_special_tokens", "tokens"),
    )
    lora_config: dict[str, Any] = setting(
        {}, "Anything else of peft.LoraConfig: {layers_to_transform: [0, 1], bias: all}."
    )


class SourceSettings(BaseModel):
    """One of several datasets that are mixed.

    Attributes:
        path: like `dataset`.
        split, layout, columns, roles: of this one; unset: as for all.
        weight: share of the mix; count, fraction: how many of its conversations, or which share of them.
    """

    model_config = ConfigDict(extra="forbid")

    path: str
    split: str | None = None
    layout: str | None = None
    columns: dict[str, str] | None = None
    roles: dict[str, str] | None = None
    weight: PositiveFloat | None = None
    count: PositiveInt | None = None
    fraction: PositiveFloat | None = None


class DataSettings(Section):
    """Data"""

    dataset: str | list[str | SourceSettings] | None = setting(
        None,
        "Conversations: a .json, .jsonl, .csv, .parquet or .arrow file (also .gz, .zst), a folder of them, a glob, or "
        "a hub name; or a list of those, each with weight, count or fraction if it is to be mixed.",
        also=("train_dataset", "dataset_name", "data_path", "train_file", "data"),
    )
    dataset_split: str = setting("train", "Which split of a hub dataset.", also=("split", "dataset_train_split"))
    eval_dataset_split: str | None = setting(
        None, "Which split of eval_dataset. Unset: as dataset_split.", also=("dataset_test_split",)
    )
    eval_dataset: str | None = setting(
        None,
        "Conversations to evaluate on during training, given like dataset.",
        also=("validation_file", "test_datasets"),
    )
    eval_size: NonNegativeFloat = setting(
        0.0,
        "Keep this share (below 1) or number of conversations out of training, for evaluation.",
        also=("val_set_size", "val_size", "validation_split", "test_size"),
    )
    layout: str | None = setting(
        None,
        "How the rows are written: messages, sharegpt, alpaca, prompt-completion, text or tokens. Unset: found out.",
    )
    columns: Pairs = setting(
        {}, "What the data calls our columns: {prompt: question, completion: answer}.", also=("column_mapping",)
    )
    roles: Pairs = setting({}, "What the data calls our roles: {bot: assistant}.", also=("role_mapping",))
    on_bad_row: Literal["error", "skip"] = setting(
        "error", "A row that cannot be trained on: an error, or left out, counted and written to bad_rows.jsonl."
    )
    max_lost_share: Annotated[float, Field(ge=0, le=1)] = setting(
        0.5,
        "The run is refused if more than this share of the rows would be lost (bad, too long, shortened, or nothing in "
        "them learned), or only repeats other rows; 1 accepts all.",
    )
    mix_replacement: bool = setting(
        False, "With weights: repeat a source that runs out; else the mix ends with the first that does."
    )
    mix_size: PositiveInt | None = setting(None, "With weights: how many examples the mix has.")
    data_cache: str = setting(
        "auto",
        "Where prepared data is kept for the next run: a folder, auto (~/.cache/lora_sft), or off.",
    )
    chat_template: str | None = setting(
        None,
        "A name from `lora-sft templates`, or a .jinja file. Unset: the model's own.",
        also=("template", "chat_template_path", "conversation_template"),
    )
    chat_template_dir: str | None = setting(
        None, "A folder with .jinja files of your own; chat_template finds them by name, before ours."
    )
    chat_template_kwargs: dict[str, Any] = setting({}, "Variables for the chat template: {enable_thinking: false}.")
    max_length: Annotated[int, Field(ge=2)] = setting(
        2048,
        "Longest example, in tokens.",
        also=("cutoff_len", "sequence_len", "max_seq_length", "max_seq_len", "model_max_length", "block_size"),
    )
    truncation: Literal["drop", "oldest", "newest", "cut", "error"] = setting(
        "drop",
        "What happens to longer ones: drop the row, leave out its oldest or its newest turns, cut its end off (and "
        "with it the stop token), or stop.",
        also=("on_too_long",),
    )
    turns: Literal["all", "last", "each"] = setting(
        "all",
        "Which replies are learned: all of a conversation, only its last, or each as it is produced, with nothing "
        "behind it (for templates that write earlier turns otherwise).",
    )
    append_stop_token: bool = setting(False, "Put a stop token behind replies that the chat template ends without one.")
    allow: Annotated[list[Literal["dropped", "no_stop_token", "no_reply"]], BeforeValidator(_split_list)] = setting(
        [],
        "What would otherwise stop the run: words of a reply that the template leaves out (dropped), replies without "
        "a stop token (no_stop_token), conversations in which nothing is learned (no_reply).",
    )
    dataset_num_proc: PositiveInt = setting(
        1,
        "Processes that render and tokenize the conversations.",
        also=("num_proc", "preprocessing_num_workers", "dataset_processes"),
    )


class TrainingSettings(Section):
    """Training"""

    num_train_epochs: PositiveFloat = setting(1.0, "Passes over the data.", also=("num_epochs", "epochs", "n_epochs"))
    max_steps: int = setting(
        -1, "Optimizer steps; above 0 it replaces num_train_epochs.", also=("steps", "iters", "max_iters")
    )
    per_device_train_batch_size: PositiveInt = setting(
        2,
        "Micro-batch: conversations in one forward pass on one device.",
        also=("micro_batch_size", "batch_size", "train_batch_size"),
    )
    gradient_accumulation_steps: PositiveInt = setting(
        8,
        "Micro-batches in one optimizer step.",
        also=("gradient_accumulation", "grad_accumulation_steps", "accumulation_steps"),
    )
    learning_rate: PositiveFloat = setting(2e-4, "Peak learning rate of the adapter.", also=("lr",))
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None = setting(
        None, "LoRA+: learning rate of the B matrices over that of the A matrices; 16 is usual."
    )
    lr_scheduler_type: str = setting(
        "cosine",
        "How the learning rate falls: linear, cosine, constant, constant_with_warmup, …",
        also=("lr_scheduler", "scheduler"),
    )
    warmup_ratio: Fraction = setting(0.03, "Share of the steps over which the learning rate rises from 0.")
    warmup_steps: NonNegativeInt | None = setting(None, "Number of those steps; replaces warmup_ratio.")
    label_smoothing: Fraction = setting(
        0.0, "Share of each target that is spread over the whole vocabulary.", also=("label_smoothing_factor",)
    )
    weight_decay: NonNegativeFloat = setting(0.0, "AdamW's weight decay on the adapter.")
    max_grad_norm: NonNegativeFloat = setting(
        1.0,
        "Gradients are scaled down to this norm; 0 leaves them.",
        also=("gradient_clipping", "grad_clip", "max_norm"),
    )
    stop_when_diverging: bool = setting(
        True,
        "End the run when the learning rate is far too high: the model no longer knows the rows that it began with, or "
        "the adapter's update is ten times as large as the matrices that it adds to. NaN and Inf always end it.",
    )
    optim: str = setting(
        "adamw_torch_fused",
        "Optimizer, by its name in transformers: adamw_8bit, paged_adamw_8bit, paged_adamw_32bit, …",
        also=("optimizer",),
    )
    gradient_checkpointing: bool | PositiveInt | Literal["selective", "offload"] | None = setting(
        None,
        "Recompute layers in the backward pass instead of keeping what they computed: true for all, a number for so "
        "many of the first, selective for the first half, offload for all with their inputs in the memory of the host, "
        "false for none. Unset: as little as the largest micro-batch needs in the memory that is free.",
        also=("use_gradient_checkpointing", "grad_checkpoint", "activation_checkpointing"),
    )
    neftune_noise_alpha: PositiveFloat | None = setting(
        None, "Noise on the embeddings (NEFTune); 5 is usual.", also=("noisy_embedding_alpha",)
    )
    packing: bool = setting(
        False,
        "Lay conversations end to end in rows of max_length tokens instead of padding them; a micro-batch is then so "
        "many rows. Only where the model is proven to keep them apart.",
        also=("sample_packing", "neat_packing"),
    )
    auto: bool = setting(
        False,
        "Choose micro-batch, accumulation, recomputation and, if need be, a smaller optimizer by a plan of the run: "
        "the fastest that fits, with as many conversations in a step as per_device_train_batch_size times "
        "gradient_accumulation_steps.",
    )
    fast_kernels: bool = setting(
        True,
        "Use our own faster forms of the step's parts: each only where it is proven on this model, and the whole held "
        "against the plain model on rows of the data before the run.",
        also=("use_liger_kernel", "use_unsloth", "enable_liger_kernel"),
    )
    preflight: bool = setting(
        True,
        "Before the first step, prove on the model and rows of the run what has to hold: gradients, accumulation, stop "
        "tokens, save and load, the fast path, room on the disk. What does not hold ends the run.",
    )
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = setting(
        "group_by_length",
        "Order of the conversations: random, as they stand (sequential), or similar lengths together in a random "
        "order (group_by_length), which leaves little padding.",
    )
    seed: NonNegativeInt = setting(
        42,
        "Of the adapter's start, the order of the rows, dropout and the evaluation split.",
        also=("random_state", "random_seed"),
    )
    logging_steps: PositiveInt = setting(
        1, "Optimizer steps between two lines of metrics.", also=("steps_per_report", "log_every_n_steps")
    )
    eval_strategy: Cadence | None = setting(
        None, "When to evaluate. Unset: every epoch, if there is evaluation data.", also=("evaluation_strategy",)
    )
    eval_steps: PositiveInt | None = setting(
        None, "Steps between evaluations, with eval_strategy: steps.", also=("steps_per_eval",)
    )
    per_device_eval_batch_size: PositiveInt | None = setting(
        None, "Unset: as per_device_train_batch_size.", also=("eval_batch_size",)
    )
    early_stopping_patience: PositiveInt | None = setting(None, "Stop after so many evaluations without a better one.")
    load_best_model_at_end: bool = setting(False, "Keep the adapter of the best evaluation instead of the last.")
    metric_for_best_model: Literal["eval_loss", "eval_mean_token_accuracy"] = setting(
        "eval_loss", "What 'better' is measured by."
    )
    save_strategy: Cadence = setting("epoch", "When to write a checkpoint.")
    save_steps: PositiveInt = setting(
        500, "Steps between checkpoints, with save_strategy: steps.", also=("save_every", "checkpoint_steps")
    )
    save_total_limit: PositiveInt | None = setting(2, "Keep this many checkpoints, besides the best.")
    report_to: Names = setting(
        ["none"], "Trackers: tensorboard, wandb, mlflow, … Nothing is sent anywhere unless one is named."
    )
    training_args: dict[str, Any] = setting({}, "Anything else of transformers.TrainingArguments: {adam_beta2: 0.95}.")


class OutputSettings(Section):
    """Output"""

    output_dir: str | None = setting(
        None, "Folder of the adapter. Unset: the next free runs/NNN.", also=("output", "output_path", "adapter_path")
    )
    resume_from_checkpoint: Resume = setting(
        "auto",
        "With auto a run that was broken off in output_dir goes on, and one that is finished is left alone. true: "
        "there has to be one. A checkpoint folder: from that one. false: output_dir has to be empty.",
        also=("resume", "resume_adapter_file"),
    )
    resume_with_changed: Names = setting(
        [],
        f"What may be otherwise in a resumed run than when it was begun: names of settings, or {', '.join(RUN_PARTS)}.",
    )
    export_to: Names = setting(
        [],
        "Targets that the adapter will be exported to (gguf, ollama, vllm, …; `lora-sft export --help`): what they "
        "would refuse is refused before training. Training itself exports nothing.",
    )


SECTIONS: tuple[type[Section], ...] = (ModelSettings, DataSettings, AdapterSettings, TrainingSettings, OutputSettings)


class RunConfig(OutputSettings, TrainingSettings, AdapterSettings, DataSettings, ModelSettings):
    """All settings of a run."""

    @property
    def start_changes_base(self) -> bool:
        """Whether the adapter's start takes something out of the base weights (PiSSA, OLoRA)."""
        return self.lora_init == "olora" or self.lora_init.startswith("pissa")

    @property
    def start_needs_whole_base(self) -> bool:
        """Whether PEFT computes the adapter's start on unquantized base weights only."""
        return self.start_changes_base or self.lora_init in ("orthogonal", "mica")

    @model_validator(mode="after")
    def _agree(self) -> "RunConfig":
        """Settings that contradict each other, all of them at once."""
        contradictions = [words for wrong, words in self._contradictions() if wrong]
        if contradictions:
            raise ValueError("; ".join(contradictions))
        return self

    def _contradictions(self) -> list[tuple[bool, str]]:
        known_start = re.fullmatch(
            r"default|gaussian|orthogonal|mica|pissa|pissa_niter_[1-9]\d*|olora|loftq|eva", self.lora_init
        )
        return [
            (bool(self.load_in_4bit) and self.load_in_8bit, "load_in_4bit and load_in_8bit are both on; choose one"),
            (bool(self.bf16) and bool(self.fp16), "bf16 and fp16 are both on; choose one"),
            (
                self.adapter_dtype == "bfloat16" and self.start_changes_base,
                f"lora_init {self.lora_init} changes the base by exactly its start; set adapter_dtype: float32",
            ),
            (
                # torch's AdamW keeps its moments in the dtype of the weights, bitsandbytes' in 32 bits or scaled 8.
                self.adapter_dtype == "bfloat16" and re.search(r"paged|8bit|32bit|sgd", self.optim) is None,
                f"optim {self.optim} would keep its moments in bfloat16 too, in which the second never falls again: "
                "with adapter_dtype bfloat16 use adamw_8bit or paged_adamw_32bit",
            ),
            (self.max_steps == 0 or self.max_steps < -1, "max_steps must be above 0, or -1 to go by num_train_epochs"),
            (
                known_start is None,
                f'lora_init "{self.lora_init}" is unknown; use default, gaussian, orthogonal, mica, pissa, '
                "pissa_niter_N, olora, loftq or eva",
            ),
            (
                self.start_needs_whole_base and (bool(self.load_in_4bit) or self.load_in_8bit),
                f"lora_init {self.lora_init} needs an unquantized base; set load_in_4bit: false, or use loftq or eva",
            ),
            (
                self.lora_init == "loftq" and (self.load_in_4bit is False or self.load_in_8bit),
                "lora_init loftq makes up for 4-bit rounding; it needs load_in_4bit",
            ),
            (
                self.start_changes_base and self.use_rslora and bool(self.lora_rank_pattern or self.lora_alpha_pattern),
                f"lora_init {self.lora_init} cannot be saved as a plain LoRA with use_rslora and a rank or alpha "
                "pattern together",
            ),
            (
                bool(self.lora_target_parameters) and self.lora_dropout > 0,
                "PEFT has no dropout on lora_target_parameters; set lora_dropout: 0",
            ),
            (
                bool(self.lora_target_parameters) and self.use_dora,
                "PEFT has no DoRA on lora_target_parameters; set use_dora: false",
            ),
            (self.lora_init == "orthogonal" and self.lora_r % 2 == 1, "lora_init orthogonal needs an even lora_r"),
            (
                self.eval_size >= 1 and self.eval_size != int(self.eval_size),
                "eval_size is a share below 1 or a whole number of conversations",
            ),
            (
                self.eval_size > 0 and self.eval_dataset is not None,
                "eval_size and eval_dataset are both given; choose one",
            ),
            (
                bool(strangers := set(self.resume_with_changed) - set(RunConfig.model_fields) - set(RUN_PARTS)),
                f"resume_with_changed: {', '.join(sorted(strangers))}: is neither a setting nor one of "
                f"{', '.join(RUN_PARTS)}",
            ),
            (self.eval_strategy == "steps" and self.eval_steps is None, "eval_strategy steps needs eval_steps"),
            (
                self.early_stopping_patience is not None and not self.load_best_model_at_end,
                "early_stopping_patience needs load_best_model_at_end: true",
            ),
        ]


def sections() -> list[tuple[str, dict[str, Any]]]:
    """The settings in reading order: [(title, {name: pydantic FieldInfo})]."""
    return [(section.__doc__ or "", dict(section.model_fields)) for section in SECTIONS]


def other_names() -> dict[str, str]:
    """{name that another trainer uses: our name}."""
    found = {}
    for name, field in RunConfig.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict):
            found.update({str(other): name for other in extra["also"]})  # type: ignore[union-attr]
    return found
