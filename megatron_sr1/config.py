"""The configuration: frozen dataclasses with one default each, filled from YAML and key=value overrides.

No torch here, so that `--dry-run`, the launcher and the tests of bad input start in a moment.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

_FP8_ALIGNMENT = {"delayed": 16, "current": 16, "blockwise": 128, "mxfp8": 32}
PRESET_NAMES = ("vision_r1", "see_think", "summed", "gdpo", "vision_sr1", "perception_credit")


class ConfigError(ValueError):
    """A configuration value is wrong; the message names the key, the value, what is allowed and what to do."""


def _require(condition: bool, key: str, got: Any, allowed: str, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"{key}={got!r} is not allowed: it must be {allowed}. {remedy}")


def _positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0, f"{section}.{name}", value, "greater than 0", f"Set {section}.{name} to a positive number.")


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, key, value, "one of " + ", ".join(allowed), f"Set {key} to one of them.")


@dataclass(frozen=True)
class ModelConfig:
    """The policy's weights, in Hugging Face format (config, safetensors, tokenizer, processor)."""

    hf_dir: str = ""
    megatron_dir: str = ""  # the weights as `tools/convert.py hf-to-megatron` wrote them; empty: those of hf_dir
    train_vision: bool = True
    max_position: int = 4096  # longest packed sequence the policy is built for, tokens
    layer_spec: str = "auto"  # te: Transformer Engine's layers; torch: plain ones; auto: te on GPUs

    def __post_init__(self) -> None:
        _one_of("model.layer_spec", self.layer_spec, ("auto", "te", "torch"))


@dataclass(frozen=True)
class LayoutConfig:
    """How the ranks share the policy. Data parallelism is what remains: nproc / (tensor * pipeline * context)."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1  # pipeline chunks per rank (interleaved schedule)
    stage_layers: tuple[int, ...] = ()  # layers of each chunk in the order of the layers; empty: equal chunks
    context: int = 1
    expert: int = 1  # ranks that share the experts of a mixture; they are taken from data and context parallelism
    sequence_parallel: bool = False
    distributed_optimizer: bool = True

    @property
    def model_ranks(self) -> int:
        return self.tensor * self.pipeline * self.context

    @property
    def num_chunks(self) -> int:
        """Pieces the layers are cut into."""
        return self.pipeline * self.virtual

    def __post_init__(self) -> None:
        _positive("layout", self, "tensor", "pipeline", "virtual", "context", "expert")
        _require(
            self.virtual == 1 or self.pipeline > 1,
            "layout.virtual",
            self.virtual,
            "1 where layout.pipeline is 1",
            "Set layout.pipeline to 2 or more, or layout.virtual to 1.",
        )
        _require(
            not self.stage_layers or (len(self.stage_layers) == self.num_chunks and min(self.stage_layers) >= 0),
            "layout.stage_layers",
            self.stage_layers,
            f"layout.pipeline * layout.virtual = {self.num_chunks} numbers of layers",
            "Give one number for each chunk, or none for equal chunks.",
        )
        _require(
            not self.sequence_parallel or self.tensor > 1,
            "layout.sequence_parallel",
            self.sequence_parallel,
            "false where layout.tensor is 1",
            "Set layout.tensor to 2 or more, or layout.sequence_parallel to false.",
        )


@dataclass(frozen=True)
class PrecisionConfig:
    """What the policy computes in. The optimizer keeps fp32 weights and moments in every case.

    fp8: the linear layers of the language model, by Transformer Engine; all else is bf16, the vision tower, the merger
    and the output head included.
    """

    dtype: str = "fp32"
    logits: str = "fp32"  # bf16: round the output head's logits as a generator does that computes them in bf16
    fp8_recipe: str = "blockwise"
    bf16_first_layers: int = 1  # with fp8: these layers, counted from the embedding, stay bf16
    bf16_last_layers: int = 1  # and these, counted from the head

    @property
    def row_alignment(self) -> int:
        """Tokens of a rank must be a multiple of it for fp8 matrix products (Transformer Engine's tile sizes)."""
        return _FP8_ALIGNMENT[self.fp8_recipe] if self.dtype == "fp8" else 1

    def __post_init__(self) -> None:
        _one_of("precision.dtype", self.dtype, ("fp32", "bf16", "fp8"))
        _one_of("precision.logits", self.logits, ("fp32", "bf16"))
        _one_of("precision.fp8_recipe", self.fp8_recipe, tuple(_FP8_ALIGNMENT))
        for name in ("bf16_first_layers", "bf16_last_layers"):
            _require(getattr(self, name) >= 0, f"precision.{name}", getattr(self, name), "0 or more", "1 is common.")


@dataclass(frozen=True)
class RecomputeConfig:
    """Activations that are made again in backward instead of being kept."""

    mode: str = "none"  # selective: `modules` of every layer; full: every layer; block: the first `layers` of a chunk
    modules: tuple[str, ...] = ("core_attn",)
    layers: int = 1  # full: layers of a unit that keeps only its input; block: layers that are recomputed
    vision: bool = False  # the blocks of the vision tower too

    def __post_init__(self) -> None:
        _one_of("recompute.mode", self.mode, ("none", "selective", "full", "block"))
        _positive("recompute", self, "layers")
        for module in self.modules:
            _one_of("recompute.modules", module, ("core_attn", "mlp", "moe", "moe_act", "layernorm"))


@dataclass(frozen=True)
class DataConfig:
    """Shards, as paths, glob patterns, or URLs with braces ("https://host/train-{00000..00007}.tar").

    Every path or pattern must match at least one file. Weights make a mixture: one for each entry of the list they
    belong to, which then is a dataset of its own; without weights all entries are one dataset.
    """

    train: tuple[str, ...] = ()
    train_weights: tuple[float, ...] = ()
    cold_start: tuple[str, ...] = ()
    cold_start_weights: tuple[float, ...] = ()
    heldout: tuple[str, ...] = ()
    shuffle_window: int = 65_536  # samples shuffled together; smaller: reads stay within fewer shards
    max_prompt_tokens: int = 0  # longer prompts are left out, by the shards' index; 0: none
    max_bad_samples: int = 0  # samples that may be skipped, named in <run_dir>/quarantine/; one more stops the run
    workers: int = 2  # threads of each rank that read and decode
    prefetch_mib: int = 256  # of samples that wait to be used, of each rank; never more than a batch
    cache_dir: str = "~/.cache/megatron_sr1/shards"  # where shards behind URLs are kept
    cache_gib: float = 100.0  # the least recently used make room

    def __post_init__(self) -> None:
        _positive("data", self, "shuffle_window", "workers", "prefetch_mib", "cache_gib")
        for name in ("max_prompt_tokens", "max_bad_samples"):
            _require(getattr(self, name) >= 0, f"data.{name}", getattr(self, name), "0 or more", "0 is the default.")
        for name in ("train", "cold_start"):
            weights, entries = getattr(self, f"{name}_weights"), getattr(self, name)
            _require(
                not weights or (len(weights) == len(entries) and min(weights) > 0),
                f"data.{name}_weights",
                weights,
                f"a positive number for each of the {len(entries)} entries of data.{name}, or empty",
                "Give one weight for each entry.",
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up, then a constant or cosine learning rate."""

    lr: float = 1e-6
    vision_lr: float | None = None  # of the vision tower and its merger; null: lr
    min_lr: float = 0.0
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _positive("optimizer", self, "lr", "eps", "clip_grad")
        if self.vision_lr is not None:
            _positive("optimizer", self, "vision_lr")
        _one_of("optimizer.schedule", self.schedule, ("constant", "cosine"))


@dataclass(frozen=True)
class RolloutConfig:
    """Generation of training rollouts, by engines in the training ranks."""

    prompts_per_step: int = 512
    samples_per_prompt: int = 8
    temperature: float = 1.0
    top_p: float = 1.0  # 1 and 0 alone: the trainer's log-probs are of the whole vocabulary, and so must the draws be
    top_k: int = 0
    max_response_tokens: int = 2048
    max_description_tokens: int = 1024  # a longer description is cut here, and counted
    max_model_tokens: int = 8192  # prompt + response, both passes
    max_running_requests: int = 256
    max_images: int = 1  # images of one prompt, at most
    kv_cache_gib: float = 1.0  # of a rank
    engine_tensor: int = 1  # ranks of one engine; nproc / engine_tensor engines share the prompts
    sleep: bool = True  # engines give their memory back while the policy trains; a CPU's engines cannot
    sync_bucket_mib: int = 256  # weights go to the engines in pieces of this size: the memory a sync takes
    checksum_every: int = 50  # weight syncs between two that are checked tensor by tensor; the first always is

    def __post_init__(self) -> None:
        _positive("rollout", self, *(f.name for f in fields(self) if f.name not in ("top_p", "top_k", "sleep")))
        for key, got, whole in (("top_p", self.top_p, 1.0), ("top_k", self.top_k, 0)):
            reason = "A draw from a cut distribution has another log-prob than the trainer gives it"
            _require(got == whole, f"rollout.{key}", got, f"{whole}", f"{reason}; lower rollout.temperature instead.")
        need = self.max_response_tokens + self.max_description_tokens
        _require(
            need < self.max_model_tokens,
            "rollout.max_model_tokens",
            self.max_model_tokens,
            f"more than max_response_tokens + max_description_tokens = {need}, or no prompt would fit",
            "Raise rollout.max_model_tokens or lower the other two.",
        )


@dataclass(frozen=True)
class ObjectiveConfig:
    """Which reward streams, and how advantages and losses are formed (method: Vision-SR1, eq. 6-9)."""

    preset: str = "vision_sr1"
    format_weight: float = 0.1  # alpha
    kl_coef: float = 0.01  # beta, of every stream
    kl_estimator: str = "k3"
    advantage_scope: str = "group"
    advantage_eps: float = 1e-6
    aggregation: str = "token_mean"  # token_mean: DAPO; sequence_mean: GRPO; sequence_sum: the paper's 1/B
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    leak_filter: bool = False  # true: a description that states the answer earns no visual reward
    mismatch: str = "none"  # truncate or mask: weighs tokens by trainer / generator probability, see objective/mismatch
    mismatch_level: str = "token"  # sequence: one weight for all tokens of a response
    mismatch_low: float = 0.5  # mask: smaller weights become 0
    mismatch_high: float = 2.0  # mask: larger weights become 0; truncate: they become this

    def __post_init__(self) -> None:
        _one_of("objective.preset", self.preset, PRESET_NAMES)
        _one_of("objective.kl_estimator", self.kl_estimator, ("k1", "k2", "k3"))
        _one_of("objective.advantage_scope", self.advantage_scope, ("group", "batch"))
        _one_of("objective.aggregation", self.aggregation, ("token_mean", "sequence_mean", "sequence_sum"))
        _one_of("objective.mismatch", self.mismatch, ("none", "truncate", "mask"))
        _one_of("objective.mismatch_level", self.mismatch_level, ("token", "sequence"))
        _positive("objective", self, "advantage_eps", "clip_low", "clip_high", "mismatch_high")
        _require(
            0 <= self.mismatch_low < self.mismatch_high,
            "objective.mismatch_low",
            self.mismatch_low,
            f"in [0, objective.mismatch_high={self.mismatch_high})",
            "0.5 with mismatch_high=2.0 to 5.0 is common.",
        )
        _require(
            0 <= self.format_weight <= 1,
            "objective.format_weight",
            self.format_weight,
            "in [0, 1]",
            "The paper uses 0.1.",
        )
        _require(
            self.kl_coef >= 0, "objective.kl_coef", self.kl_coef, "0 or more", "0 switches the reference model off."
        )
        _require(
            self.dual_clip is None or self.dual_clip > 1,
            "objective.dual_clip",
            self.dual_clip,
            "greater than 1, or null",
            "3.0 is common.",
        )


@dataclass(frozen=True)
class TrainConfig:
    """The training loop: how many steps, how large, saved how often."""

    steps: int = 200
    batch_size: int = 128  # prompts per optimizer step (sft: samples)
    micro_batch_tokens: int = 8192  # token budget of one packed row
    save_every: int = 10  # steps; the last step is always saved
    keep_checkpoints: int = 2
    evaluate_every: int = 0  # grpo: steps between evaluations; 0: only before the first and after the last

    def __post_init__(self) -> None:
        _positive("train", self, "steps", "batch_size", "micro_batch_tokens", "save_every", "keep_checkpoints")


@dataclass(frozen=True)
class EvaluateConfig:
    """Greedy evaluation of both passes on the held-out shards."""

    max_prompts: int = 0  # 0: all
    examples: int = 12  # how many are kept with their images for the report
    verify_export: int = 0  # answers that transformers must repeat on the exported model (it loads it on one rank)


@dataclass(frozen=True)
class Config:
    """One command's whole configuration."""

    run_dir: str = "runs/default"
    seed: int = 1
    nproc: int = 1  # ranks on this machine; under torchrun the world size counts
    model: ModelConfig = field(default_factory=ModelConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        _require(self.nproc > 0, "nproc", self.nproc, "greater than 0", "Set nproc to the number of ranks.")
        _require(
            self.nproc % self.layout.model_ranks == 0,
            "nproc",
            self.nproc,
            f"a multiple of layout.tensor * layout.pipeline * layout.context = {self.layout.model_ranks}",
            "Change nproc or the layout.",
        )
        _require(
            self.nproc % self.rollout.engine_tensor == 0,
            "rollout.engine_tensor",
            self.rollout.engine_tensor,
            f"a divisor of nproc={self.nproc}",
            "The ranks divide into engines.",
        )
        stage_ranks = self.nproc // self.layout.pipeline
        _require(
            stage_ranks % self.layout.expert == 0,
            "layout.expert",
            self.layout.expert,
            f"a divisor of the {stage_ranks} ranks of a pipeline stage",
            "Experts are shared by the ranks of one stage.",
        )
        _require(
            self.train.batch_size >= self.data_ranks,
            "train.batch_size",
            self.train.batch_size,
            f"at least the {self.data_ranks} data-parallel replicas of nproc={self.nproc}",
            "Raise it, or give the ranks to layout.tensor or layout.pipeline.",
        )

    @property
    def data_ranks(self) -> int:
        return self.nproc // self.layout.model_ranks

    @property
    def sequence_multiple(self) -> int:
        """Every sequence of a row is padded to a multiple of it: context parallelism cuts each into 2 * context."""
        return 2 * self.layout.context if self.layout.context > 1 else 1

    @property
    def row_multiple(self) -> int:
        """Every row is padded to a multiple of it, so that each rank's part is aligned."""
        shares = self.layout.context * (self.layout.tensor if self.layout.sequence_parallel else 1)
        return math.lcm(self.sequence_multiple, shares * self.precision.row_alignment)


def load_config(path: str | Path | None, overrides: list[str]) -> Config:
    """Reads YAML, applies `key=value` overrides, validates.

    Raises:
        ConfigError: unknown key, wrong type, a value out of range, or values that do not fit together.
    """
    try:
        tree = OmegaConf.structured(Config)
        if path is not None:
            if not Path(path).is_file():
                raise ConfigError(f"CONFIG={str(path)!r} is not a file. Give the path of a YAML configuration.")
            tree = OmegaConf.merge(tree, OmegaConf.load(path))
        for override in overrides:
            if "=" not in override:
                raise ConfigError(
                    f"override {override!r} is not allowed: it must be key=value, for example train.steps=10."
                )
        tree = OmegaConf.merge(tree, OmegaConf.from_dotlist(overrides))
        return OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{error.full_key or 'configuration'}: {str(error).splitlines()[0]}. {_known_keys(error)}"
        ) from error


def _known_keys(error: OmegaConfBaseException) -> str:
    kind = error.object_type
    if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__"):
        return "Known keys here: " + ", ".join(f.name for f in fields(kind)) + "."
    return "Correct the value in the YAML file or in the override."


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def check_model(config: Config) -> None:
    """What the model's own config.json says about the layout; no weights are read.

    Raises:
        ConfigError: no config.json in model.hf_dir, or heads, layers or experts that the layout does not divide.
    """
    path = Path(config.model.hf_dir) / "config.json"
    _require(
        path.is_file(),
        "model.hf_dir",
        config.model.hf_dir,
        "a model directory in Hugging Face format, which holds a config.json",
        "Give the path of one; `make quickstart` makes a tiny one.",
    )
    tree = json.loads(path.read_text(encoding="utf-8"))
    text = tree.get("text_config", tree)  # older checkpoints keep the language model's keys at the top
    layout = config.layout
    _check_division("layout.tensor", layout.tensor, text, "num_attention_heads")
    _check_division("layout.tensor", layout.tensor, text, "intermediate_size")
    _check_division("rollout.engine_tensor", config.rollout.engine_tensor, text, "num_attention_heads")
    key_value_heads = text["num_key_value_heads"]
    _require(
        key_value_heads % layout.tensor == 0 or layout.tensor % key_value_heads == 0,
        "layout.tensor",
        layout.tensor,
        f"a divisor or a multiple of the model's num_key_value_heads={key_value_heads}",
        "Ranks share key/value heads evenly.",
    )
    layers = text["num_hidden_layers"]
    if layout.stage_layers:
        _require(
            sum(layout.stage_layers) == layers,
            "layout.stage_layers",
            layout.stage_layers,
            f"{layout.num_chunks} numbers that add up to the model's num_hidden_layers={layers}",
            "Change them, or leave the key out for equal chunks.",
        )
    else:
        name, chunks = ("layout.pipeline * layout.virtual", layout.num_chunks)
        _check_division(name, chunks, text, "num_hidden_layers", " or set layout.stage_layers")
    experts = next((name for name in ("num_experts", "num_local_experts") if text.get(name)), None)  # old and new name
    if experts is not None:
        _check_division("layout.expert", layout.expert, text, experts)
        _require(
            layout.tensor == 1 or layout.sequence_parallel,
            "layout.sequence_parallel",
            layout.sequence_parallel,
            "true for a mixture of experts with layout.tensor above 1",
            "Without it every tensor-parallel rank would send every token to the experts.",
        )
    else:
        _require(layout.expert == 1, "layout.expert", layout.expert, "1: the model has no experts", "Leave it out.")


def _check_division(key: str, ranks: int, text: dict[str, Any], name: str, otherwise: str = "") -> None:
    allowed = f"a divisor of the model's {name}={text[name]}"
    _require(text[name] % ranks == 0, key, ranks, allowed, f"Change {key}{otherwise}.")


def check_train_batch(config: Config) -> None:
    """What must divide before a GRPO run starts.

    Raises:
        ConfigError: prompts do not split into mini-batches.
    """
    _require(
        config.rollout.prompts_per_step % config.train.batch_size == 0,
        "train.batch_size",
        config.train.batch_size,
        f"a divisor of rollout.prompts_per_step={config.rollout.prompts_per_step}",
        "It is the number of prompts of one optimizer step.",
    )
