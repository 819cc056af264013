"""A stream of rewards: who is credited with what, and how. Everybody has these types from `types`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from megatron_sr1.schedule import Schedule

PassName = str  # "first", "second", or a later pass of objective.passes
KlEstimator = Literal["k1", "k2", "k3"]
KlPlace = Literal["loss", "reward"]
AdvantageScope = Literal["group", "batch"]
AdvantageKind = Literal["z_score", "centred", "leave_one_out", "batch_std", "reward_std"]
Normalize = Literal["sum", "per_component"]
Surrogate = Literal["ppo", "cispo", "sapo"]
RatioLevel = Literal["token", "sequence"]
Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]
TokenWeighting = Literal["none", "top", "top_conserving", "proportional", "gated"]
ContrastDivergence = Literal["k3", "full"]
SequenceWeightFor = Literal["dependent", "consistent"]


@dataclass(frozen=True)
class Clip:
    """PPO ratio clipping: [1 - low, 1 + high]; `dual` (> 1) bounds the loss where the advantage is negative."""

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None


@dataclass(frozen=True)
class RewardStream:
    """A reward stream: which tokens are credited with which reward (Vision-SR1, eq. 6-9), and how."""

    name: str
    trajectory: PassName
    tokens: str  # a segment, see `streams/segments.py`
    rewards: tuple[tuple[str, float], ...]  # (name or import path, weight)
    loss_weight: float = 1.0  # lambda
    kl_coef: float = 0.01  # beta
    kl_estimator: KlEstimator = "k3"
    kl_in: KlPlace = "loss"
    entropy_coef: float = 0.0  # of the bonus for entropy
    normalize: Normalize = "sum"  # per_component: GDPO
    advantage: AdvantageKind = "z_score"
    scope: AdvantageScope = "group"
    aggregation: Aggregation = "token_mean"
    constant_tokens: int | None = None  # what "constant" divides by; None: the most tokens that a response may have
    surrogate: Surrogate = "ppo"
    ratio: RatioLevel = "token"  # sequence: GSPO
    clip: Clip = Clip()
    contrast: str = ""  # name of the one that the following are of
    token_weighting: TokenWeighting = "none"  # by each token's dependency, see `objective.contrast`
    token_share: float = 0.4  # of a response's tokens in the stream, that are the top
    token_threshold: float = 0.1  # nats of dependency that open the gate
    sequence_weight_low: float | None = None  # of the response that weighs least; None: all weigh the same
    sequence_weight_for: SequenceWeightFor = "dependent"  # who weighs more: who depends more, or less
    contrast_coef: float = 0.0  # gamma: of the divergence from the contrast, which the loss falls by; < 0: grows
    contrast_divergence: ContrastDivergence = "k3"  # from the drawn token; full: of whole distributions
    contrast_entropy_coef: float = 0.0  # of the bonus for entropy under the contrast
    contrast_reward: float = 0.0  # of the mean log-prob gap of a response, which its reward is more by
    contrast_entropy_reward: float = 0.0  # the same of the entropy that the contrast has more
    gate: str = ""  # name of a reward: without it in full a response has no advantage
    schedules: tuple[Schedule, ...] = ()  # of coefficients, which have their largest size here; `at` has a step's

    @property
    def kl_loss_coef(self) -> float:
        """beta of the loss: 0 where the KL is taken off the reward."""
        return self.kl_coef if self.kl_in == "loss" else 0.0

    @property
    def is_weighted(self) -> bool:
        """Whether its tokens or responses weigh by how much they depend on what the contrast takes away."""
        return self.token_weighting != "none" or self.sequence_weight_low is not None

    @property
    def compares_distributions(self) -> bool:
        """Whether the divergence that is trained is that of whole distributions."""
        return self.contrast_coef != 0 and self.contrast_divergence == "full"

    @property
    def earns_by_contrast(self) -> bool:
        """Whether a response is rewarded for how much it depends on what the contrast takes away."""
        return self.contrast_reward != 0 or self.contrast_entropy_reward != 0

    def at(self, step: int) -> RewardStream:
        """With the coefficients of a step."""
        return replace(self, schedules=(), **{one.key: one.at(step) for one in self.schedules})

    @property
    def trains_contrast(self) -> bool:
        """Whether the loss has a gradient under the contrast, too."""
        return self.contrast_coef != 0 or self.contrast_entropy_coef != 0
