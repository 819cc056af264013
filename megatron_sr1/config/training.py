"""The optimizer, the objective and the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from megatron_sr1.config.rules import COUNT, COUNT_OR_NONE, Range, check_numbers, one_of, require
from megatron_sr1.types import AdvantageScope, Aggregation, KlEstimator, MismatchKind, MismatchLevel, PresetName

PRESET_NAMES: tuple[PresetName, ...] = get_args(PresetName)
LrSchedule = Literal["constant", "cosine"]
_RATE = Range(0, 1, above=True)
_OPTIMIZER_NUMBERS = {
    "lr": _RATE,
    "vision_lr": _RATE,
    "min_lr": Range(0, 1),
    "warmup_steps": COUNT_OR_NONE,
    "weight_decay": Range(0, 10),
    "clip_grad": Range(0, 1e9, above=True),
    "beta1": Range(0, 1, below=True),
    "beta2": Range(0, 1, below=True),
    "eps": Range(0, 1, above=True),
}
_RATIO = Range(0, 1000, above=True)
_OBJECTIVE_NUMBERS = {
    "format_weight": Range(0, 1),
    "kl_coef": Range(0, 1000),  # 0 switches the reference model off
    "advantage_eps": Range(0, 1, above=True),
    "clip_low": _RATIO,
    "clip_high": _RATIO,
    "dual_clip": Range(1, 1000, above=True),
    "mismatch_low": Range(0, 1000),
    "mismatch_high": _RATIO,
    "max_logprob_gap": _RATIO,
}


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up, then a constant or cosine learning rate."""

    lr: float = 1e-6
    vision_lr: float | None = None  # of the vision tower and its merger; null: lr
    min_lr: float = 0.0
    schedule: LrSchedule = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_numbers("optimizer", self, _OPTIMIZER_NUMBERS)
        one_of("optimizer.schedule", self.schedule, get_args(LrSchedule))
        lowest = self.lr if self.vision_lr is None else min(self.lr, self.vision_lr)
        allowed = f"at most {lowest}, the lower of optimizer.lr and optimizer.vision_lr"
        require(self.min_lr <= lowest, "optimizer.min_lr", self.min_lr, allowed, "The schedule ends at it. Lower it.")


@dataclass(frozen=True)
class ObjectiveConfig:
    """Which reward streams, and how advantages and losses are formed (method: Vision-SR1, eq. 6-9)."""

    preset: PresetName = "vision_sr1"
    format_weight: float = 0.1  # alpha
    kl_coef: float = 0.01  # beta, of every stream
    kl_estimator: KlEstimator = "k3"
    advantage_scope: AdvantageScope = "group"
    advantage_eps: float = 1e-6
    aggregation: Aggregation = "token_mean"  # token_mean: DAPO; sequence_mean: GRPO; sequence_sum: the paper's 1/B
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    leak_filter: bool = False  # true: a description that states the answer earns no visual reward
    mismatch: MismatchKind = "none"  # else tokens weigh trainer / generator probability: objective/mismatch.py
    mismatch_level: MismatchLevel = "token"  # sequence: one weight for all tokens of a response
    mismatch_low: float = 0.5  # mask: smaller weights become 0
    mismatch_high: float = 2.0  # mask: larger weights become 0; truncate: they become this
    max_logprob_gap: float | None = None  # nats a token, mean of a step, beyond which the run ends; null: by precision

    def __post_init__(self) -> None:
        one_of("objective.preset", self.preset, PRESET_NAMES)
        one_of("objective.kl_estimator", self.kl_estimator, get_args(KlEstimator))
        one_of("objective.advantage_scope", self.advantage_scope, get_args(AdvantageScope))
        one_of("objective.aggregation", self.aggregation, get_args(Aggregation))
        one_of("objective.mismatch", self.mismatch, get_args(MismatchKind))
        one_of("objective.mismatch_level", self.mismatch_level, get_args(MismatchLevel))
        check_numbers("objective", self, _OBJECTIVE_NUMBERS)
        require(
            self.mismatch_low < self.mismatch_high,
            "objective.mismatch_low",
            self.mismatch_low,
            f"less than objective.mismatch_high={self.mismatch_high}",
            "0.5 with mismatch_high=2.0 to 5.0 is common.",
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
        counts = dict.fromkeys(("steps", "batch_size", "micro_batch_tokens", "save_every", "keep_checkpoints"), COUNT)
        check_numbers("train", self, {**counts, "evaluate_every": COUNT_OR_NONE})
