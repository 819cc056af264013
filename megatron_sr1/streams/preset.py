"""The objective of a run: the templates of the passes and the reward streams, from a preset, a list, or both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from megatron_sr1.config import Config, ObjectiveConfig, RewardsConfig
from megatron_sr1.config.rules import require
from megatron_sr1.import_path import is_import_path, load_object
from megatron_sr1.prompts import SHIPPED, Asked, Template, Templates, templates_of
from megatron_sr1.rewards import find_reward, layout_reward
from megatron_sr1.streams.contrast import Contrast, check_contrast, contrast_keys, contrasts_of
from megatron_sr1.streams.distorted import distorted_of
from megatron_sr1.streams.methods import METHODS, Method, read_method
from megatron_sr1.streams.passes import check_later, later_passes, needs_description
from megatron_sr1.streams.presets import WRITTEN, Written
from megatron_sr1.streams.schedules import with_largest
from megatron_sr1.streams.segments import OUTSIDE_DESCRIPTION, REST, WHOLE, other_segments, segments_of
from megatron_sr1.streams.spans import find_spans
from megatron_sr1.types import (
    SECOND,
    Clip,
    Distorted,
    LaterPass,
    Passes,
    PassName,
    PresetName,
    Prompt,
    RewardStream,
    TemplateName,
)

MAX_STREAMS = 31  # with the segments that are measured: which a token is of is told in the bits of an int32


@dataclass(frozen=True)
class Preset:
    """A named objective.

    Raises:
        ValueError: a template that is not there, or cannot have its role; no stream, or more than MAX_STREAMS with the
            segments that are measured, two streams of one name, a stream without rewards, of a pass that there is not
            or that others than the policy write, or of a segment that its pass does not have; a reward that is not
            there, is of a pass that there is not, needs a description where none is asked for, or is shown by the name
            of another; a pass or a contrast that needs a description where none is asked for; a stream whose contrast
            cannot be.
    """

    name: str
    template: TemplateName  # of the first pass
    streams: tuple[RewardStream, ...]
    second_template: TemplateName = "caption_reasoner"  # of passes that read a text
    plain_template: TemplateName = "cot"  # of prompts without images, and of passes that read nothing
    templates: Templates = SHIPPED  # that the names are of
    later: tuple[LaterPass, ...] = (SECOND,)  # that may follow; the second one alone does only where it is needed
    wanted: tuple[PassName, ...] = ()  # of `later`, those that are wanted for themselves
    contrasts: tuple[Contrast, ...] = ()  # that first passes are scored under
    distorted: Distorted | None = None  # siblings that are drawn from noisy images

    def __post_init__(self) -> None:
        _ = self.asked
        if not self.streams:
            raise ValueError(f"objective {self.name!r}: it has no streams; give at least one.")
        if len(self.streams) + len(self.measured) > MAX_STREAMS:
            more = f" and measures {len(self.measured)} segments" if self.measured else ""
            raise ValueError(
                f"objective {self.name!r}: it has {len(self.streams)} streams{more}, more than {MAX_STREAMS}."
            )
        names = [stream.name for stream in self.streams]
        if len(set(names)) < len(names):
            raise ValueError(f"objective {self.name!r}: stream names {names} repeat; metrics need a name each.")
        for stream in self.streams:
            self._check_stream(stream)
        self._check_rewards()
        check_later(self.passes.later, self.asked.first)
        for stream in self.streams:
            check_contrast(stream, self.contrasts, f"objective {self.name!r}, stream {stream.name!r}")
        for contrast in self.contrasts:
            if contrast.context == "description" and self.asked.first.describes not in self.measured:
                raise ValueError(
                    f"objective {self.name!r}: the contrast {contrast.name!r} has the description in the place of the "
                    f"image, and the template {self.template!r} asks for none. Set objective.template=see_think, or "
                    "another context."
                )

    def told_of(self, prompt: Prompt) -> dict[str, str]:
        """By contrast, the text that stands for a prompt's images.

        Raises:
            ValueError: a sample with images has no such text.
        """
        reading = [contrast for contrast in self.contrasts if contrast.context == "metadata" and prompt.images]
        return {contrast.name: contrast.text_of(prompt) for contrast in reading}

    @property
    def measured(self) -> tuple[str, ...]:
        """Segments of the first pass whose dependency is told, where there is a contrast."""
        if not self.contrasts:
            return ()
        return tuple(name for name in segments_of(self.asked.first) if name not in (REST, OUTSIDE_DESCRIPTION))

    def at(self, step: int) -> Preset:
        """With the coefficients of a step."""
        if not any(stream.schedules for stream in self.streams):
            return self
        return replace(self, streams=tuple(stream.at(step) for stream in self.streams))

    @property
    def trained_contrasts(self) -> tuple[str, ...]:
        """Names of the contrasts under which the loss has a gradient, too."""
        named = {stream.contrast for stream in self.streams if stream.trains_contrast}
        return tuple(contrast.name for contrast in self.contrasts if contrast.name in named)

    @property
    def full_contrasts(self) -> tuple[str, ...]:
        """Names of those whose divergence is trained as that of whole distributions."""
        named = {stream.contrast for stream in self.streams if stream.compares_distributions}
        return tuple(contrast.name for contrast in self.contrasts if contrast.name in named)

    @property
    def rewards_contrast(self) -> bool:
        """Whether a response of a stream earns by how much it depends on what a contrast takes away."""
        return any(stream.earns_by_contrast for stream in self.streams)

    @property
    def compares_before(self) -> bool:
        """Whether the policy's log-probs under its contrasts, and beside them its own, are needed before the optimizer
        steps."""
        users = {stream.contrast for stream in self.streams if stream.is_weighted or stream.earns_by_contrast}
        return any(contrast.weights == "policy" and contrast.name in users for contrast in self.contrasts)

    @property
    def weighs_contrast(self) -> bool:
        """Whether tokens or responses of a stream weigh by how much they depend on what a contrast takes away."""
        return any(stream.is_weighted for stream in self.streams)

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
        """Whether the paper's second pass must be generated: a stream trains on it, or a reward is measured on it."""
        return SECOND.name in self._needed

    @property
    def _needed(self) -> set[PassName]:
        measured = {find_reward(name).later for name in self.rewards if find_reward(name).of_pass == "second"}
        return {stream.trajectory for stream in self.streams} | measured

    @property
    def needs_reference(self) -> bool:
        """Whether a stream is held to the weights the policy started from, or a contrast is scored by them."""
        held = any(stream.kl_coef > 0 for stream in self.streams)
        return held or any(contrast.weights == "reference" for contrast in self.contrasts)

    @property
    def kl_in_reward(self) -> bool:
        """Whether a stream's KL is taken off its reward: then old and reference log-probs come before advantages."""
        return any(stream.kl_in == "reward" for stream in self.streams)

    @property
    def has_entropy_bonus(self) -> bool:
        """Whether the entropy of a stream's tokens has a gradient."""
        return any(stream.entropy_coef != 0 for stream in self.streams)

    @property
    def passes(self) -> Passes:
        """Those of a prompt with images. After a description the second pass is measured even if it earns nothing."""
        names = {*self._needed, *self.wanted, *((SECOND.name,) if self.described else ())}
        later = tuple(later for later in self.later if later.name in names)
        return Passes(self.template, later, self.second_template, self.plain_template)

    def later_pass(self, name: PassName) -> LaterPass | None:
        """The pass of that name; None: it is the first, or there is none."""
        return next((later for later in self.later if later.name == name), None)

    def template_of(self, name: PassName) -> Template:
        """That the pass of a prompt with images is asked by."""
        later = self.later_pass(name)
        return self.asked.first if later is None else self.templates.by_name[self.passes.template_of(later)]

    def num_samples(self, name: PassName) -> int:
        """Of a pass, for each sample of the first."""
        later = self.later_pass(name)
        return 1 if later is None else later.samples

    @property
    def most_samples(self) -> int:
        """Of a pass that a stream trains."""
        return max(self.num_samples(stream.trajectory) for stream in self.streams)

    @property
    def asks_endpoint(self) -> bool:
        """Whether a reward asks the endpoint of rewards.judge, or a pass is read by it."""
        asks = any("judge" in find_reward(name).needs for name in self.rewards)
        return asks or any(later.reader == "endpoint" for later in self.passes.later)

    def trains(self, name: PassName) -> bool:
        """Whether a stream credits tokens of that pass."""
        return any(stream.trajectory == name for stream in self.streams)

    @property
    def rewards(self) -> tuple[str, ...]:
        """Names of the rewards in use, those of gates among them, each once, in order of first use."""
        earned = [name for stream in self.streams for name, _ in stream.rewards]
        return tuple(dict.fromkeys([*earned, *(stream.gate for stream in self.streams if stream.gate)]))

    def _check_stream(self, stream: RewardStream) -> None:
        where = f"objective {self.name!r}, stream {stream.name!r}"
        if not stream.rewards:
            raise ValueError(f"{where}: it has no rewards; name at least one.")
        if stream.trajectory != "first":
            self._check_trained(where, stream.trajectory)
        allowed = segments_of(self.template_of(stream.trajectory))
        if is_import_path(stream.tokens):
            find_spans(stream.tokens)
        elif stream.tokens not in allowed:
            raise ValueError(
                f"{where}: tokens={stream.tokens!r} is no segment of the {stream.trajectory} pass. It has "
                f"{', '.join(allowed)}."
            )
        if stream.advantage in ("batch_std", "reward_std") and stream.scope == "batch":
            raise ValueError(
                f"{where}: advantage={stream.advantage} centres each group and divides by the spread of the whole "
                "batch, so scope=batch contradicts it. Set scope=group, or advantage=z_score."
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
        others = other_segments(stream, self.streams)
        describes = self.asked.first.describes
        if stream.tokens == REST and (WHOLE in others or {OUTSIDE_DESCRIPTION, describes} <= set(others)):
            raise ValueError(
                f"{where}: other streams credit the whole response of the {stream.trajectory} pass, so nothing is "
                "left for tokens=rest. Name its tokens."
            )

    def _check_trained(self, where: str, name: PassName) -> None:
        later = self.later_pass(name)
        if later is None:
            raise ValueError(f"{where}: pass={name!r} is no pass of the run, which has {self._known()}.")
        if later.reader != "policy":
            raise ValueError(
                f"{where}: its pass {name!r} is read by reader={later.reader}, and only what the policy writes can be "
                f"trained. Give the stream tokens of the first pass, and rewards such as acc_vis@{name}."
            )

    def _known(self) -> str:
        return ", ".join(("first", *(later.name for later in self.later)))

    def _check_rewards(self) -> None:
        by_name = {f"acc_vis.{later.name}": f"acc_vis@{later.name}" for later in self.later if later != SECOND}
        described = self.described
        for name in self.rewards:
            reward = find_reward(name)
            later = self.later_pass(reward.later)
            if reward.of_pass == "second" and later is None:
                raise ValueError(
                    f"objective {self.name!r}: the reward {name!r} is of the pass {reward.later!r}, which is not among "
                    f"{self._known()}. Add it to objective.passes, or leave the reward out."
                )
            if "judge" in reward.needs and later is not None and later.reader == "endpoint":
                raise ValueError(
                    f"objective {self.name!r}: the reward {name!r} asks the endpoint about a pass that it answers. "
                    f"Use acc_vis@{later.name}."
                )
            if "judge" in reward.needs and later is not None and later.context == "nothing":
                raise ValueError(
                    f"objective {self.name!r}: the reward {name!r} asks the endpoint about a text, and the pass "
                    f"{later.name!r} reads none. Use acc_vis@{later.name}, or give the pass another context."
                )
            free = reward.of_pass == "second" and later is not None and not needs_description(later)
            if not described and not free and (reward.of_pass == "second" or "description" in reward.needs):
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
    method = Method("see_think", [], [], []) if objective.preset is None else _written(objective)
    written = {entry["name"]: dict(entry) for entry in method.streams}
    # one of the objective takes the place of the preset's of its name
    contrasts = {entry["name"]: entry for entry in (*method.contrast, *objective.contrast)}
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
    for stream in streams:
        _check_kl_in_reward(f"objective {objective.name!r}, stream {stream.name!r}", stream)
    later, wanted = later_passes([*method.passes, *objective.passes])
    preset = Preset(
        objective.name,
        objective.template or method.template,
        streams,
        objective.second_template or Preset.second_template,
        objective.plain_template or Preset.plain_template,
        templates,
        later,
        wanted,
        contrasts_of(list(contrasts.values())),
        distorted_of({**method.distorted, **objective.distorted}),
    )
    _check_against_objective(objective, preset)
    return preset


def _written(objective: ObjectiveConfig) -> Method:
    """What the preset stands for."""
    name, alpha = objective.preset, objective.format_weight
    assert name is not None
    if name not in WRITTEN:
        return read_method(name, alpha)
    template, streams = WRITTEN[name](alpha)
    return Method(template, streams, [], [])


def _stream(written: Written, objective: ObjectiveConfig) -> RewardStream:
    entry, schedules = with_largest(written)
    aggregation = entry.get("aggregation", objective.aggregation)
    constant = entry.get("constant_tokens", objective.constant_tokens) if aggregation == "constant" else None
    if entry.get("constant_tokens") is not None and aggregation != "constant":
        raise ValueError(
            f"objective.streams: {entry['name']!r} has constant_tokens={entry['constant_tokens']}, which belongs to "
            f"aggregation=constant, and its aggregation is {aggregation}. Leave it out, or set aggregation=constant."
        )
    return RewardStream(
        name=entry["name"],
        trajectory=entry.get("pass", "first"),
        tokens=entry.get("tokens", "response"),
        rewards=tuple((name, float(weight)) for name, weight in entry["rewards"].items()),
        loss_weight=float(entry.get("loss_weight", 1.0)),
        kl_coef=float(entry.get("kl_coef", objective.kl_coef)),
        kl_estimator=entry.get("kl_estimator", objective.kl_estimator),
        kl_in=entry.get("kl_in", objective.kl_in),
        entropy_coef=float(entry.get("entropy_coef", objective.entropy_coef)),
        normalize=entry.get("normalize", "sum"),
        advantage=entry.get("advantage", objective.advantage),
        scope=entry.get("scope", objective.advantage_scope),
        aggregation=aggregation,
        constant_tokens=constant,
        surrogate=entry.get("surrogate", objective.surrogate),
        ratio=entry.get("ratio", objective.ratio),
        clip=Clip(
            float(entry.get("clip_low", objective.clip_low)),
            float(entry.get("clip_high", objective.clip_high)),
            entry.get("dual_clip", objective.dual_clip),
        ),
        **contrast_keys(entry),
        gate=entry.get("gate", ""),
        schedules=schedules,
    )


def _check_kl_in_reward(where: str, stream: RewardStream) -> None:
    """Whether a KL in the reward says something, and what it should: near the reference a policy gradient on k2 or k3
    vanishes, for both are squares there, and only that on k1 is the gradient of the KL divergence."""
    if stream.kl_in == "loss":
        return
    if stream.kl_coef == 0:
        raise ValueError(
            f"{where}: kl_in=reward takes kl_coef times the KL off the reward, and kl_coef is 0. Set kl_coef, or "
            "kl_in=loss."
        )
    if stream.kl_estimator != "k1":
        raise ValueError(
            f"{where}: kl_in=reward with kl_estimator={stream.kl_estimator} would hold nothing near the reference, for "
            "as a reward only k1 has the gradient of the KL divergence. Set kl_estimator=k1, or kl_in=loss."
        )
    if stream.normalize == "per_component":
        raise ValueError(
            f"{where}: kl_in=reward takes the KL off one sum of rewards, and normalize=per_component makes an "
            "advantage of each reward by itself. Set normalize=sum, or kl_in=loss."
        )


def _check_against_objective(objective: ObjectiveConfig, preset: Preset) -> None:
    """Whether keys that are of all streams have one to act on, and none acts where a loss of the user's own does."""
    if objective.constant_tokens is not None and all(stream.aggregation != "constant" for stream in preset.streams):
        raise ValueError(
            f"objective.constant_tokens={objective.constant_tokens} belongs to aggregation=constant, and no stream has "
            "it. Leave it out, or set objective.aggregation=constant."
        )
    for stream in preset.streams if objective.loss else ():
        if stream.kl_in == "reward" or stream.entropy_coef != 0 or stream.trains_contrast:
            found = "kl_in=reward" if stream.kl_in == "reward" else f"entropy_coef={stream.entropy_coef}"
            found = f"contrast={stream.contrast}" if stream.trains_contrast else found
            raise ValueError(
                f"objective {preset.name!r}, stream {stream.name!r}: {found} is of our loss, and objective.loss="
                f"{objective.loss!r} takes its place: it may have a KL term and a bonus of its own, which would count "
                "twice or not at all. Leave one of the two out."
            )


def check_objective(
    objective: ObjectiveConfig, rewards: RewardsConfig, megatron_dir: str = "", *, templates: Templates = SHIPPED
) -> None:
    """Imports what the objective names of a user's own.

    Args:
        megatron_dir: `model.megatron_dir`.

    Raises:
        ValueError: see `preset_from_config`; a reward asks a judge, or a pass is read by one, and there is none; there
            is nothing to be called at `objective.loss`; a pass is read by starting weights that an engine cannot read.
    """
    own_code(objective, templates)
    preset = preset_from_config(objective, templates)
    asking = [f"the reward {name!r}" for name in preset.rewards if "judge" in find_reward(name).needs]
    asking += [f"the pass {later.name!r}" for later in preset.passes.later if later.reader == "endpoint"]
    require(
        not asking or bool(rewards.judge.url),
        "rewards.judge.url",
        rewards.judge.url,
        f"the base URL of an endpoint, which {''.join(asking[:1])} asks",
        "For example http://127.0.0.1:8000/v1.",
    )
    starting = [later.name for later in preset.passes.later if later.reader == "reference"]
    require(
        not starting or not megatron_dir or bool(objective.reference_dir),
        "model.megatron_dir",
        megatron_dir,
        f"empty where the pass {''.join(starting[:1])!r} is read by the starting weights, those of model.hf_dir",
        "Convert it with megatron-sr1 convert megatron-to-hf, and name the folder in objective.reference_dir.",
    )


def own_code(objective: ObjectiveConfig, templates: Templates = SHIPPED) -> dict[str, Callable[..., Any]]:
    """The functions of a user's own that the objective names, by their import paths: rewards, segments, and the loss.

    Raises:
        ValueError: see `preset_from_config`; what `objective.loss` names cannot be called.
    """
    preset = preset_from_config(objective, templates)
    code: dict[str, Callable[..., Any]] = {
        name: find_reward(name).function for name in preset.rewards if is_import_path(name)
    }
    code |= {stream.tokens: find_spans(stream.tokens) for stream in preset.streams if is_import_path(stream.tokens)}
    if objective.loss:
        loss = load_object(objective.loss, "objective.loss")
        require(callable(loss), "objective.loss", objective.loss, "a function", "It takes LossInputs.")
        code[objective.loss] = loss
    return code


PRESETS: Mapping[PresetName, Preset] = {
    name: preset_from_config(ObjectiveConfig(preset=name)) for name in (*WRITTEN, *METHODS)
}
