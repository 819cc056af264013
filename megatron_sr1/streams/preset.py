"""The objective of a run: the templates of the passes and the reward streams, from a preset, a list, or both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_sr1.config import Config, ObjectiveConfig, RewardsConfig
from megatron_sr1.config.rules import require
from megatron_sr1.import_path import is_import_path, load_object
from megatron_sr1.prompts import SHIPPED, Asked, Templates, templates_of
from megatron_sr1.rewards import find_reward, layout_reward
from megatron_sr1.streams.presets import WRITTEN, Written
from megatron_sr1.streams.segments import REST, segments_of
from megatron_sr1.types import Clip, Passes, PresetName, RewardStream, TemplateName


@dataclass(frozen=True)
class Preset:
    """A named objective.

    Raises:
        ValueError: a template that is not there, or cannot have its role; no stream, two streams of one name, a stream
            without rewards, a segment that its pass does not have; a reward that is not there, that needs a description
            where none is asked for, or that is shown by the name of another.
    """

    name: str
    template: TemplateName  # of the first pass
    streams: tuple[RewardStream, ...]
    second_template: TemplateName = "caption_reasoner"
    plain_template: TemplateName = "cot"  # of prompts without images
    templates: Templates = SHIPPED  # that the names are of

    def __post_init__(self) -> None:
        _ = self.asked
        if not self.streams:
            raise ValueError(f"objective {self.name!r}: it has no streams; give at least one.")
        names = [stream.name for stream in self.streams]
        if len(set(names)) < len(names):
            raise ValueError(f"objective {self.name!r}: stream names {names} repeat; metrics need a name each.")
        for stream in self.streams:
            self._check_stream(stream)
        self._check_rewards()

    @cached_property
    def asked(self) -> Asked:
        """The templates of the passes.

        Raises:
            ConfigError: see `Templates.asked`.
        """
        return self.templates.asked(self.template, self.second_template, self.plain_template)

    @property
    def described(self) -> bool:
        """Whether a prompt with images is asked for a description."""
        return self.asked.first.describes is not None

    @property
    def second_pass(self) -> bool:
        """Whether the second pass must be generated: a stream trains on it, or a reward is measured on it."""
        trained = any(stream.trajectory == "second" for stream in self.streams)
        return trained or any(find_reward(name).of_pass == "second" for name in self.rewards)

    @property
    def needs_reference(self) -> bool:
        """Whether a stream is held to the weights the policy started from."""
        return any(stream.kl_coef > 0 for stream in self.streams)

    @property
    def passes(self) -> Passes:
        """Those of a prompt with images. The second pass is measured even where it earns nothing."""
        second_pass = self.second_pass or self.described
        return Passes(self.template, second_pass, self.second_template, self.plain_template)

    @property
    def rewards(self) -> tuple[str, ...]:
        """Names of the rewards in use, each once, in order of first use."""
        return tuple(dict.fromkeys(name for stream in self.streams for name, _ in stream.rewards))

    def _check_stream(self, stream: RewardStream) -> None:
        where = f"objective {self.name!r}, stream {stream.name!r}"
        if not stream.rewards:
            raise ValueError(f"{where}: it has no rewards; name at least one.")
        allowed = segments_of(self.asked.first if stream.trajectory == "first" else self.asked.second)
        if stream.tokens not in allowed:
            raise ValueError(
                f"{where}: tokens={stream.tokens!r} is no segment of the {stream.trajectory} pass. It has "
                f"{', '.join(allowed)}."
            )
        if stream.advantage == "batch_std" and stream.scope == "batch":
            raise ValueError(
                f"{where}: advantage=batch_std centres each group and divides by the spread of the whole batch, so "
                "scope=batch contradicts it. Set scope=group, or advantage=z_score."
            )
        if stream.surrogate != "ppo" and (stream.ratio == "sequence" or stream.clip.dual is not None):
            found = "ratio=sequence" if stream.ratio == "sequence" else f"dual_clip={stream.clip.dual}"
            raise ValueError(
                f"{where}: {found} contradicts surrogate={stream.surrogate}, which is of single tokens and has a bound "
                "of its own. Leave it out, or set surrogate=ppo."
            )
        rests = [other.name for other in self.streams if (other.trajectory, other.tokens) == (stream.trajectory, REST)]
        if len(rests) > 1:
            raise ValueError(f"{where}: {' and '.join(rests)} both credit the rest of one pass. Give it to one.")

    def _check_rewards(self) -> None:
        by_name: dict[str, str] = {}
        described = self.described
        for name in self.rewards:
            reward = find_reward(name)
            if not described and (reward.of_pass == "second" or "description" in reward.needs):
                raise ValueError(
                    f"objective {self.name!r}: the reward {name!r} needs a description, and the template "
                    f"{self.template!r} asks for none. Set objective.template=see_think, or leave the reward out."
                )
            if name == layout_reward(not described):
                raise ValueError(
                    f"objective {self.name!r}: the reward {name!r} is for another layout than the template "
                    f"{self.template!r} asks for. Use {layout_reward(described)!r}."
                )
            other = by_name.setdefault(reward.shown, name)
            if other != name:
                raise ValueError(
                    f"objective {self.name!r}: the rewards {other!r} and {name!r} are both shown as {reward.shown!r}. "
                    "Name one of them in a Reward(..., shown=...)."
                )


def preset_of(config: Config) -> Preset:
    """The objective of a run, with its templates. Raises as `templates_of` and `preset_from_config`."""
    return preset_from_config(config.objective, templates_of(config))


def preset_from_config(objective: ObjectiveConfig, templates: Templates = SHIPPED) -> Preset:
    """What `objective.preset` and `objective.streams` say together: an entry of the list changes the preset's stream of
    its name, or joins; what neither says, the other keys of `objective` do.

    Raises:
        ValueError: see `Preset`; an entry that takes away or changes a stream that there is not, or lacks its rewards.
    """
    template: TemplateName = "see_think"
    written: dict[str, dict[str, Any]] = {}
    if objective.preset is not None:
        template, preset = WRITTEN[objective.preset](objective.format_weight)
        written = {entry["name"]: dict(entry) for entry in preset}
    for entry in objective.streams:
        name, is_new = entry["name"], entry["name"] not in written
        known = ", ".join(written) or "none"
        if is_new and (not entry.get("enabled", True) or "rewards" not in entry):
            raise ValueError(
                f"objective.streams: {name!r} names no stream of the preset, which has {known}, so it needs rewards, "
                'as in {name: brevity, rewards: {"my_rewards.py:brevity": 1.0}}.'
            )
        written[name] = {**written.get(name, {}), **entry}
    streams = tuple(_stream(entry, objective) for entry in written.values() if entry.get("enabled", True))
    return Preset(
        objective.name,
        objective.template or template,
        streams,
        objective.second_template or Preset.second_template,
        objective.plain_template or Preset.plain_template,
        templates,
    )


def _stream(entry: Written, objective: ObjectiveConfig) -> RewardStream:
    return RewardStream(
        name=entry["name"],
        trajectory=entry.get("pass", "first"),
        tokens=entry.get("tokens", "response"),
        rewards=tuple((name, float(weight)) for name, weight in entry["rewards"].items()),
        loss_weight=float(entry.get("loss_weight", 1.0)),
        kl_coef=float(entry.get("kl_coef", objective.kl_coef)),
        kl_estimator=entry.get("kl_estimator", objective.kl_estimator),
        normalize=entry.get("normalize", "sum"),
        advantage=entry.get("advantage", objective.advantage),
        scope=entry.get("scope", objective.advantage_scope),
        aggregation=entry.get("aggregation", objective.aggregation),
        surrogate=entry.get("surrogate", objective.surrogate),
        ratio=entry.get("ratio", objective.ratio),
        clip=Clip(
            float(entry.get("clip_low", objective.clip_low)),
            float(entry.get("clip_high", objective.clip_high)),
            entry.get("dual_clip", objective.dual_clip),
        ),
    )


def check_objective(objective: ObjectiveConfig, rewards: RewardsConfig, templates: Templates = SHIPPED) -> None:
    """Imports what the objective names of a user's own.

    Raises:
        ValueError: see `preset_from_config`; a reward asks a judge, and there is none; there is nothing to be called at
            `objective.loss`.
    """
    own_code(objective, templates)
    preset = preset_from_config(objective, templates)
    asking = [name for name in preset.rewards if "judge" in find_reward(name).needs]
    require(
        not asking or bool(rewards.judge.url),
        "rewards.judge.url",
        rewards.judge.url,
        f"the base URL of an endpoint, which the reward {''.join(asking[:1])!r} asks",
        "For example http://127.0.0.1:8000/v1.",
    )


def own_code(objective: ObjectiveConfig, templates: Templates = SHIPPED) -> dict[str, Callable[..., Any]]:
    """The functions of a user's own that the objective names, by their import paths: rewards, and the loss.

    Raises:
        ValueError: see `preset_from_config`; what `objective.loss` names cannot be called.
    """
    names = [name for name in preset_from_config(objective, templates).rewards if is_import_path(name)]
    code: dict[str, Callable[..., Any]] = {name: find_reward(name).function for name in names}
    if objective.loss:
        loss = load_object(objective.loss, "objective.loss")
        require(callable(loss), "objective.loss", objective.loss, "a function", "It takes LossInputs.")
        code[objective.loss] = loss
    return code


PRESETS: Mapping[PresetName, Preset] = {name: preset_from_config(ObjectiveConfig(preset=name)) for name in WRITTEN}
