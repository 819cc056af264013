"""The optimizer, the objective and the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from megatron_sr1.config.contrast import check_contrasts
from megatron_sr1.config.distorted import check_distorted
from megatron_sr1.config.passes import check_passes
from megatron_sr1.config.rules import COUNT, COUNT_OR_NONE, Range, check_numbers, one_of, require
from megatron_sr1.config.streams import DUAL_CLIP, ENTROPY_COEF, KL_COEF, RATIO, check_streams
from megatron_sr1.types import (
    AdvantageKind,
    AdvantageScope,
    Aggregation,
    CutResponses,
    KlEstimator,
    KlPlace,
    MismatchKind,
    MismatchLevel,
    OldLogprobs,
    PresetName,
    RatioLevel,
    RouterReplay,
    Surrogate,
)

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
_OBJECTIVE_NUMBERS = {
    "format_weight": Range(0, 1),
    "kl_coef": KL_COEF,
    "entropy_coef": ENTROPY_COEF,
    "constant_tokens": COUNT,
    "advantage_eps": Range(0, 1, above=True),
    "clip_low": RATIO,
    "clip_high": RATIO,
    "dual_clip": DUAL_CLIP,
    "mismatch_low": Range(0, 1000),
    "mismatch_high": RATIO,
    "max_logprob_gap": RATIO,
}


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up, then a constant or cosine learning rate."""

    lr: float = 1e-6  # the highest, after the warm-up
    vision_lr: float | None = None  # of the vision tower and its merger; null: lr
    min_lr: float = 0.0  # where the schedule ends
    schedule: LrSchedule = "constant"  # after the warm-up
    warmup_steps: int = 0  # optimizer steps from 0 to lr
    weight_decay: float = 0.01  # of matrices; norms and biases have none
    clip_grad: float = 1.0  # the norm of all gradients together, at most
    beta1: float = 0.9  # AdamW's, of the mean gradient
    beta2: float = 0.95  # AdamW's, of the mean square
    eps: float = 1e-8  # AdamW's

    def __post_init__(self) -> None:
        check_numbers("optimizer", self, _OPTIMIZER_NUMBERS)
        one_of("optimizer.schedule", self.schedule, get_args(LrSchedule))
        lowest = self.lr if self.vision_lr is None else min(self.lr, self.vision_lr)
        allowed = f"at most {lowest}, the lower of optimizer.lr and optimizer.vision_lr"
        require(self.min_lr <= lowest, "optimizer.min_lr", self.min_lr, allowed, "The schedule ends at it. Lower it.")


@dataclass(frozen=True)
class ObjectiveConfig:
    """Which reward streams, and how advantages and losses are formed (method: Vision-SR1, eq. 6-9).

    What a stream of `streams` does not say for itself, the keys here say for it.
    """

    preset: PresetName | None = "vision_sr1"  # null: the streams below are all
    streams: list[Any] = field(default_factory=list)  # changes a preset's of that name; further ones join
    # changes the second pass; further ones join: {name: blind, context: nothing}
    passes: list[Any] = field(default_factory=list)
    # other contexts that first passes are scored under, which streams name: {name: blind, context: no_image}
    contrast: list[Any] = field(default_factory=list)
    # siblings that are drawn from noisy images and trained on the images themselves: {samples: 4, strength: 0.5}
    distorted: dict[str, Any] = field(default_factory=dict)
    # the folder of the weights that passes of `reader: reference` and the control `reference` are read by, of a model
    # of the shape of model.hf_dir; empty: those that the run begins with
    reference_dir: str = ""
    template: str | None = None  # of the first pass, see `templates`; null: the preset's, else see_think
    second_template: str | None = None  # of passes that read a text; null: caption_reasoner
    plain_template: str | None = None  # of prompts without images, and of passes that read nothing; null: cot
    format_weight: float = 0.1  # alpha
    kl_coef: float = 0.01  # beta, of every stream
    kl_estimator: KlEstimator = "k3"  # k2 has the gradient of the KL divergence; objective/losses.py has the formulas
    # reward: kl_coef times the KL of a response, summed over its tokens in the stream, comes off its reward before
    # advantages are made (RLHF, RLOO), with kl_estimator=k1; loss: a term of the loss (GRPO)
    kl_in: KlPlace = "loss"
    entropy_coef: float = 0.0  # of the entropy bonus: the loss falls by it times the entropy; below 0 it rises
    advantage: AdvantageKind = "z_score"  # all kinds: docs/algorithms.md
    advantage_scope: AdvantageScope = "group"  # whose mean and spread: of the responses to one prompt, or of the step
    advantage_eps: float = 1e-6  # added to the spread
    # token_mean: DAPO; sequence_mean: GRPO; sequence_sum: the paper's 1/B; constant: Dr.GRPO, that over constant_tokens
    aggregation: Aggregation = "token_mean"
    constant_tokens: int | None = None  # what aggregation=constant divides by; null: rollout.max_response_tokens
    surrogate: Surrogate = "ppo"  # cispo, sapo: objective/surrogates.py
    ratio: RatioLevel = "token"  # sequence: one probability ratio for all of a stream's tokens in a response (GSPO)
    clip_low: float = 0.2  # the ratio of new to old probability is held above 1 - clip_low
    clip_high: float = 0.2  # and below 1 + clip_high
    # where the advantage is negative, the loss is at most this times its size; null: unbounded
    dual_clip: float | None = None
    cut_responses: CutResponses = "train"  # mask: nothing is learned from what the token limit cut (DAPO)
    loss: str = ""  # import path of a function (LossInputs) -> (loss, metrics) in place of ours
    leak_filter: bool = False  # true: a description that states the answer earns no visual reward
    # whose log-probs ratios are taken to. trainer: of a pass before the first of several optimizer steps; generator: of
    # the draw; none: the present ones, every ratio is 1. docs/algorithms.md has the risks
    old: OldLogprobs = "trainer"
    mismatch: MismatchKind = "none"  # else tokens weigh trainer / generator probability: objective/mismatch.py
    mismatch_level: MismatchLevel = "token"  # sequence: one weight for all tokens of a response
    mismatch_low: float = 0.5  # mask: smaller weights become 0
    mismatch_high: float = 2.0  # mask: larger weights become 0; truncate: they become this
    max_logprob_gap: float | None = None  # nats a token, mean of a step, beyond which the run ends; null: by precision
    # of a mixture: whose choice of experts all passes of a step follow. trainer: of its first pass; generator: of the
    # draw; none: each chooses anew; null: trainer for a mixture. docs/training.md has what each costs
    router_replay: RouterReplay | None = None

    def __post_init__(self) -> None:
        if self.preset is not None:
            one_of("objective.preset", self.preset, PRESET_NAMES)
        check_streams(self.streams)
        check_passes(self.passes)
        check_contrasts(self.contrast)
        check_distorted(self.distorted)
        one_of("objective.advantage", self.advantage, get_args(AdvantageKind))
        one_of("objective.kl_estimator", self.kl_estimator, get_args(KlEstimator))
        one_of("objective.kl_in", self.kl_in, get_args(KlPlace))
        one_of("objective.advantage_scope", self.advantage_scope, get_args(AdvantageScope))
        one_of("objective.aggregation", self.aggregation, get_args(Aggregation))
        one_of("objective.surrogate", self.surrogate, get_args(Surrogate))
        one_of("objective.ratio", self.ratio, get_args(RatioLevel))
        one_of("objective.cut_responses", self.cut_responses, get_args(CutResponses))
        one_of("objective.old", self.old, get_args(OldLogprobs))
        one_of("objective.mismatch", self.mismatch, get_args(MismatchKind))
        one_of("objective.mismatch_level", self.mismatch_level, get_args(MismatchLevel))
        if self.router_replay is not None:
            one_of("objective.router_replay", self.router_replay, get_args(RouterReplay))
        check_numbers("objective", self, _OBJECTIVE_NUMBERS)
        require(
            self.old != "generator" or self.mismatch == "none",
            "objective.mismatch",
            self.mismatch,
            "none with objective.old=generator, whose ratios hold the gap to the generator already",
            "With objective.old=none the weights take the place of the ratios.",
        )
        require(
            self.mismatch_low < self.mismatch_high,
            "objective.mismatch_low",
            self.mismatch_low,
            f"less than objective.mismatch_high={self.mismatch_high}",
            "0.5 with mismatch_high=2.0 to 5.0 is common.",
        )

    @property
    def name(self) -> str:
        """The preset's; of a list that stands alone, `streams`."""
        return self.preset or "streams"


@dataclass(frozen=True)
class TrainConfig:
    """The training loop: how many steps, how large, saved how often."""

    # of rollouts, each with prompts_per_step / batch_size optimizer steps; sft: optimizer steps; null: epochs says
    steps: int | None = 200
    # in place of steps: passes over data.train (sft: data.cold_start), 0.5 is half of one; the last step is whole
    epochs: float | None = None
    batch_size: int = 128  # prompts per optimizer step (sft: samples)
    micro_batch_tokens: int = 8192  # token budget of one packed row
    # what sequences begin with alike, such as the question and image of a prompt's samples, is in a row once; on a GPU
    # not in fp32
    shared_prefix: bool = True
    save_every: int = 10  # steps; the last step is always saved
    keep_checkpoints: int = 2  # the newest; older ones are removed
    keep_every: int = 0  # but for those of every so many steps, a multiple of save_every; 0: none of them stays
    keep_best: str = ""  # grpo: and for the best by this number of the evaluations, such as accuracy; empty: none
    keep_best_mode: Literal["max", "min"] = "max"  # of that number
    async_save: bool = True  # the run goes on while a checkpoint is written; false: it waits
    save_hf: bool = False  # true: each checkpoint brings its weights in Hugging Face format, in its folder hf
    # steps in a row whose gradient is not finite and which are skipped; one more ends the run
    max_bad_steps: int = 3
    evaluate_every: int = 0  # grpo: steps between evaluations; 0: only before the first and after the last
    # sft: steps between losses on the demonstrations of data.heldout, which the last step has in any case; 0: none
    heldout_every: int = 0

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("steps", "batch_size", "micro_batch_tokens", "save_every", "keep_checkpoints"), COUNT)
        or_none = dict.fromkeys(("evaluate_every", "heldout_every", "keep_every", "max_bad_steps"), COUNT_OR_NONE)
        check_numbers("train", self, {**counts, **or_none, "epochs": Range(0, 10**6, above=True)})
        require(
            (self.steps is None) != (self.epochs is None),
            "train.epochs",
            self.epochs,
            f"{'a number' if self.steps is None else 'null'} with train.steps={self.steps}: one of the two says how "
            "long the run is",
            "Set one of them to null." if self.steps is not None else "Give one of them.",
        )
        require(
            self.keep_every % self.save_every == 0,
            "train.keep_every",
            self.keep_every,
            f"0 or a multiple of train.save_every={self.save_every}: others are never saved",
            "Set it to one.",
        )
        require(
            not self.keep_best or (self.evaluate_every > 0 and self.evaluate_every % self.save_every == 0),
            "train.keep_best",
            self.keep_best,
            f"empty with train.evaluate_every={self.evaluate_every}: what is evaluated must be saved as well",
            f"Set train.evaluate_every to a multiple of train.save_every={self.save_every}.",
        )
