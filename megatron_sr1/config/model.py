"""The policy: its weights, how ranks share it, what it computes in and what it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from megatron_sr1.config.freeze import check_entries
from megatron_sr1.config.rules import COUNT, Range, check_numbers, one_of, require

LayerSpec = Literal["auto", "te", "torch"]
Dtype = Literal["fp32", "bf16", "fp8"]
LogitsDtype = Literal["fp32", "bf16"]
Fp8Recipe = Literal["delayed", "current", "blockwise", "mxfp8"]
RecomputeMode = Literal["none", "selective", "full", "block"]
RecomputeModule = Literal["core_attn", "mlp", "moe", "moe_act", "layernorm"]
_RANKS = Range(1, 10**5)
_LAYERS = Range(0, 10**5)
_FP8_ALIGNMENT: dict[Fp8Recipe, int] = {"delayed": 16, "current": 16, "blockwise": 128, "mxfp8": 32}


@dataclass(frozen=True)
class ModelConfig:
    """The policy's weights, in Hugging Face format (config, safetensors, tokenizer, processor)."""

    hf_dir: str = ""  # the folder of the model that the run starts from
    megatron_dir: str = ""  # the weights as `megatron-sr1 convert hf-to-megatron` wrote them; empty: those of hf_dir
    min_pixels: int | None = None  # smaller images are enlarged to so many pixels; null: what the model's files say
    max_pixels: int | None = None  # larger ones are made smaller; a very thin one may keep more; null: likewise
    freeze: tuple[str, ...] = ()  # not trained: vision, merger, language, embeddings, or a regex of whole tensor names
    # what the model is told before each question, unless a template has a system prompt of its own; null: what its
    # chat template writes by itself
    system_prompt: str | None = None
    max_position: int = 4096  # longest packed sequence the policy is built for, tokens
    layer_spec: LayerSpec = "auto"  # te: Transformer Engine's layers; torch: plain ones; auto: te on GPUs
    fused: bool = True  # with te: SwiGLU is one kernel, and products add weight gradients where they are kept

    def __post_init__(self) -> None:
        one_of("model.layer_spec", self.layer_spec, get_args(LayerSpec))
        check_entries(self.freeze)
        check_numbers("model", self, dict.fromkeys(("max_position", "min_pixels", "max_pixels"), COUNT))
        require(
            self.min_pixels is None or self.max_pixels is None or self.min_pixels <= self.max_pixels,
            "model.min_pixels",
            self.min_pixels,
            f"at most model.max_pixels={self.max_pixels}",
            "Lower it, or raise the other.",
        )
        require(
            self.system_prompt is None or bool(self.system_prompt.strip()),
            "model.system_prompt",
            self.system_prompt,
            "a text, or null",
            "null leaves it to the model's chat template.",
        )


@dataclass(frozen=True)
class LayoutConfig:
    """How the ranks share the policy. Data parallelism is what remains: nproc / (tensor * pipeline * context)."""

    tensor: int = 1  # ranks that share every layer
    pipeline: int = 1  # ranks that share the layers one after another
    virtual: int = 1  # pipeline chunks per rank (interleaved schedule)
    stage_layers: tuple[int, ...] = ()  # layers of each chunk in the order of the layers; empty: equal chunks
    context: int = 1  # ranks that share every sequence
    expert: int = 1  # ranks that share the experts of a mixture; they are taken from data and context parallelism
    sequence_parallel: bool = False  # with tensor: the ranks share norms and dropout along the sequence, too
    distributed_optimizer: bool = True  # data-parallel ranks share the optimizer's state
    gradient_bucket: int | None = None  # elements that replicas add up at a time; null: 40M, or 1M a replica if more

    @property
    def model_ranks(self) -> int:
        return self.tensor * self.pipeline * self.context

    @property
    def num_chunks(self) -> int:
        """Pieces the layers are cut into."""
        return self.pipeline * self.virtual

    def __post_init__(self) -> None:
        ranks = dict.fromkeys(("tensor", "pipeline", "virtual", "context", "expert"), _RANKS)
        check_numbers("layout", self, {**ranks, "stage_layers": _LAYERS, "gradient_bucket": COUNT})
        require(
            self.virtual == 1 or self.pipeline > 1,
            "layout.virtual",
            self.virtual,
            "1 where layout.pipeline is 1",
            "Set layout.pipeline to 2 or more, or layout.virtual to 1.",
        )
        require(
            not self.stage_layers or len(self.stage_layers) == self.num_chunks,
            "layout.stage_layers",
            self.stage_layers,
            f"layout.pipeline * layout.virtual = {self.num_chunks} numbers of layers",
            "Give one number for each chunk, or none for equal chunks.",
        )
        require(
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

    dtype: Dtype = "fp32"  # of the policy; fp8: the products of its layers by Transformer Engine, the rest in bf16
    logits: LogitsDtype = "fp32"  # bf16: round the output head's logits as a generator does that computes them in bf16
    fp8_recipe: Fp8Recipe = "blockwise"  # how fp8 is scaled
    bf16_first_layers: int = 1  # with fp8: these layers, counted from the embedding, stay bf16
    bf16_last_layers: int = 1  # and these, counted from the head
    deterministic: bool = False  # the same bits from the same input, at some cost; a CPU gives them anyway

    @property
    def row_alignment(self) -> int:
        """Tokens of a rank must be a multiple of it for fp8 matrix products (Transformer Engine's tile sizes)."""
        return _FP8_ALIGNMENT[self.fp8_recipe] if self.dtype == "fp8" else 1

    def __post_init__(self) -> None:
        one_of("precision.dtype", self.dtype, get_args(Dtype))
        one_of("precision.logits", self.logits, get_args(LogitsDtype))
        one_of("precision.fp8_recipe", self.fp8_recipe, get_args(Fp8Recipe))
        check_numbers("precision", self, dict.fromkeys(("bf16_first_layers", "bf16_last_layers"), _LAYERS))


@dataclass(frozen=True)
class OffloadConfig:
    """What of the trainer's state leaves the device while engines generate. null: on accelerators, it does."""

    gradients: bool | None = None  # freed: a step begins with none
    optimizer: bool | None = None  # to pinned host memory: moments, and fp32 weights beside those of bf16
    reference: bool | None = None  # to pinned host memory: the weights that the KL term compares with


@dataclass(frozen=True)
class RecomputeConfig:
    """Activations that are made again in backward instead of being kept."""

    mode: RecomputeMode = "none"  # selective: `modules` of every layer; full: every layer; block: a chunk's first
    modules: tuple[str, ...] = ("core_attn",)  # of selective: core_attn, mlp, moe, moe_act, layernorm
    layers: int = 1  # full: layers of a unit that keeps only its input; block: layers that are recomputed
    vision: bool = False  # the blocks of the vision tower too

    def __post_init__(self) -> None:
        one_of("recompute.mode", self.mode, get_args(RecomputeMode))
        check_numbers("recompute", self, {"layers": _RANKS})
        for module in self.modules:
            one_of("recompute.modules", module, get_args(RecomputeModule))
