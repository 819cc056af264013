"""The optimizer, the objective and the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from megatron_sr1.config.rules import one_of, positive, require
from megatron_sr1.types import AdvantageScope, Aggregation, KlEstimator, MismatchKind, MismatchLevel, PresetName

PRESET_NAMES: tuple[PresetName, ...] = get_args(PresetName)
LrSchedule = Literal["constant", "cosine"]


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
        positive("optimizer", self, "lr", "eps", "clip_grad")
        if self.vision_lr is not None:
            positive("optimizer", self, "vision_lr")
        one_of("optimizer.schedule", self.schedule, get_args(LrSchedule))


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
        positive("objective", self, "advantage_eps", "clip_low", "clip_high", "mismatch_high")
        if self.max_logprob_gap is not None:
            positive("objective", self, "max_logprob_gap")
        require(
            0 <= self.mismatch_low < self.mismatch_high,
            "objective.mismatch_low",
            self.mismatch_low,
            f"in [0, objective.mismatch_high={self.mismatch_high})",
            "0.5 with mismatch_high=2.0 to 5.0 is common.",
        )
        require(
            0 <= self.format_weight <= 1,
            "objective.format_weight",
            self.format_weight,
            "in [0, 1]",
            "The paper uses 0.1.",
        )
        require(
            self.kl_coef >= 0, "objective.kl_coef", self.kl_coef, "0 or more", "0 switches the reference model off."
        )
        require(
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
        positive("train", self, "steps", "batch_size", "micro_batch_tokens", "save_every", "keep_checkpoints")
