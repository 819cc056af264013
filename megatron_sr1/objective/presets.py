"""The presets: every variant of the method as a list of reward streams.

A stream credits some tokens of one pass with a weighted sum of named reward components (Vision-SR1, arXiv 2508.19652,
eq. 6-9). Reward components:

    acc      the first pass' answer is right                fmt      its See-Think layout is complete
    acc_vis  the second pass' answer is right               fmt_vis  its Caption-Reasoner layout is complete
    fmt_cot  the plain chain-of-thought layout of the first pass is complete (answer-only GRPO)

Token segments of the first pass: `description` is the description block; `reasoning` is everything else the policy
wrote (reasoning, tags, boxed answer, end of turn), so the two together are `response`. The masks are built where the
tokens are; here a segment is only a name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_sr1.config import ObjectiveConfig
from megatron_sr1.types import (
    KlEstimator,
    Passes,
    PassName,
    PresetName,
    RewardStream,
    Template,
    TokenSegment,
)

SECOND_PASS_SUFFIX = "_vis"  # components that are measured on the second pass


@dataclass(frozen=True)
class Preset:
    """A named objective: the first pass' template and the reward streams.

    Raises:
        ValueError: no stream, two streams of one name, a stream without rewards, or a stream that credits a segment
            the second pass does not have.
    """

    name: str
    template: Template
    streams: tuple[RewardStream, ...]

    def __post_init__(self) -> None:
        if not self.streams:
            raise ValueError(f"Preset {self.name!r}: streams is empty; give at least one RewardStream.")
        names = [stream.name for stream in self.streams]
        if len(set(names)) < len(names):
            raise ValueError(f"Preset {self.name!r}: stream names {names} repeat; metrics need a name each.")
        for stream in self.streams:
            if not stream.rewards:
                raise ValueError(f"Preset {self.name!r}: stream {stream.name!r} has no rewards; name at least one.")
            if stream.trajectory == "second" and stream.tokens != "response":
                raise ValueError(
                    f"Preset {self.name!r}: stream {stream.name!r} credits {stream.tokens!r} of the second pass, "
                    "which writes no description block; use tokens='response'."
                )

    @property
    def second_pass(self) -> bool:
        """Whether the second pass must be generated: a stream trains on it, or a reward is measured on it."""
        trained = any(stream.trajectory == "second" for stream in self.streams)
        return trained or any(component.endswith(SECOND_PASS_SUFFIX) for component in self.components)

    @property
    def needs_reference(self) -> bool:
        """Whether a stream is held to the weights the policy started from."""
        return any(stream.kl_coef > 0 for stream in self.streams)

    @property
    def passes(self) -> Passes:
        """Those of a prompt with images. The second pass is measured even where it earns nothing."""
        return Passes(self.template, self.second_pass or self.template == "see_think")

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the reward components in use, each once, in order of first use."""
        return tuple(dict.fromkeys(component for stream in self.streams for component, _ in stream.rewards))


@dataclass(frozen=True)
class _Settings:
    """What a preset leaves to the configuration. The defaults are the paper's."""

    alpha: float = 0.1
    kl_coef: float = 0.01
    kl_estimator: KlEstimator = "k3"

    def stream(
        self,
        name: str,
        trajectory: PassName,
        tokens: TokenSegment,
        rewards: dict[str, float],
        loss_weight: float,
    ) -> RewardStream:
        return RewardStream(
            name, trajectory, tokens, tuple(rewards.items()), loss_weight, self.kl_coef, self.kl_estimator
        )


def _vision_r1(settings: _Settings) -> Preset:
    """Answer-only GRPO with the plain chain-of-thought prompt."""
    rewards = {"acc": 1.0, "fmt_cot": settings.alpha}
    return Preset("vision_r1", "cot", (settings.stream("answer", "first", "response", rewards, 1.0),))


def _see_think(settings: _Settings) -> Preset:
    """Answer-only GRPO with the See-Think prompt: the paper's ablation without self-reward."""
    rewards = {"acc": 1.0, "fmt": settings.alpha}
    return Preset("see_think", "see_think", (settings.stream("answer", "first", "response", rewards, 1.0),))


def _summed(settings: _Settings) -> Preset:
    """One scalar for everything, (1 - alpha) acc + alpha fmt + acc_vis, on the first pass (first public code)."""
    rewards = {"acc": 1.0 - settings.alpha, "fmt": settings.alpha, "acc_vis": 1.0}
    return Preset("summed", "see_think", (settings.stream("answer", "first", "response", rewards, 1.0),))


def _gdpo(settings: _Settings) -> Preset:
    """Each component normalised by itself, then summed, on the first pass (later public code; arXiv 2601.05242)."""
    rewards = {"acc": 1.0, "fmt": settings.alpha, "acc_vis": 1.0, "fmt_vis": settings.alpha}
    stream = settings.stream("answer", "first", "response", rewards, 1.0)
    return Preset("gdpo", "see_think", (replace(stream, normalize="per_component"),))


def _vision_sr1(settings: _Settings) -> Preset:
    """The paper: each pass earns its own reward on its own tokens, lambda = 1/2 each."""
    answer = settings.stream("answer", "first", "response", {"acc": 1.0, "fmt": settings.alpha}, 0.5)
    visual = settings.stream("visual", "second", "response", {"acc_vis": 1.0, "fmt_vis": settings.alpha}, 0.5)
    return Preset("vision_sr1", "see_think", (answer, visual))


def _perception_credit(settings: _Settings) -> Preset:
    """The visual reward credits the description that earned it; the answer reward credits the rest."""
    answer = settings.stream("answer", "first", "reasoning", {"acc": 1.0, "fmt": settings.alpha}, 0.5)
    visual = settings.stream("visual", "first", "description", {"acc_vis": 1.0, "fmt_vis": settings.alpha}, 0.5)
    return Preset("perception_credit", "see_think", (answer, visual))


_BUILDERS: dict[PresetName, Callable[[_Settings], Preset]] = {
    "vision_r1": _vision_r1,
    "see_think": _see_think,
    "summed": _summed,
    "gdpo": _gdpo,
    "vision_sr1": _vision_sr1,
    "perception_credit": _perception_credit,
}

PRESETS: dict[PresetName, Preset] = {name: build(_Settings()) for name, build in _BUILDERS.items()}


def preset_from_config(config: ObjectiveConfig) -> Preset:
    """The preset `config.preset` with the configured alpha (format_weight), beta (kl_coef) and KL estimator.

    Raises:
        ValueError: format_weight outside [0, 1].
    """
    if not 0.0 <= config.format_weight <= 1.0:
        raise ValueError(
            f"objective.format_weight={config.format_weight!r} is not allowed: it must be between 0 and 1. "
            "The paper uses 0.1."
        )
    return _BUILDERS[config.preset](_Settings(config.format_weight, config.kl_coef, config.kl_estimator))
