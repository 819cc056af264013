"""What two objectives would credit of a saved step: everything that the report of it shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from megatron_sr1.config import Config
from megatron_sr1.import_path import is_import_path
from megatron_sr1.processor import Processor
from megatron_sr1.prompts import ANSWER
from megatron_sr1.report.credit.numbers import (
    Comparison,
    CreditReport,
    Piece,
    Region,
    ShownResponse,
    ShownSample,
    Side,
    StreamLine,
    StreamPair,
    Switch,
)
from megatron_sr1.streams import Preset
from megatron_sr1.training.credit import (
    Aligned,
    Credit,
    ResponseKey,
    sample_advantages,
    shift,
    signs,
    step_credit,
)
from megatron_sr1.training.live_groups import live_groups, step_advantages
from megatron_sr1.training.saved_step import SavedStep
from megatron_sr1.training.segments import Response, scored_responses
from megatron_sr1.training.step_rewards import per_rollout
from megatron_sr1.training.step_rollouts import StepRollouts
from megatron_sr1.types import AdvantageKind, RolloutGroup

OUTSIDE = "outside"  # of all blocks and of the answer


@dataclass(frozen=True)
class Objective:
    """One of the two that are compared.

    Raises:
        ValueError: what multiplies d log p in it hangs on more than saved rollouts have.
    """

    label: str
    preset: Preset
    config: Config  # the run's, with this objective

    def __post_init__(self) -> None:
        objective = self.config.objective
        if objective.loss:
            raise ValueError(
                f"objective.loss={objective.loss!r} takes the place of our loss, so what multiplies d log p is not "
                "known. Compare an objective with loss: ''."
            )
        for stream in self.preset.streams:
            if stream.kl_in == "reward":
                raise ValueError(
                    f"the stream {stream.name!r} has kl_in=reward, so its advantages hang on log-probs of the weights, "
                    "which saved rollouts do not have. Compare an objective with kl_in: loss."
                )
            if stream.is_weighted or stream.earns_by_contrast:
                raise ValueError(
                    f"the stream {stream.name!r} weighs or earns by its contrast {stream.contrast!r}, which takes the "
                    "weights to score, and saved rollouts do not have them. Compare an objective without."
                )
            if is_import_path(stream.tokens):
                raise ValueError(
                    f"the stream {stream.name!r} credits tokens={stream.tokens!r}, a function that is given the prompt "
                    "with its images and metadata, which saved rollouts do not have. Compare an objective whose "
                    "tokens are segments by name."
                )

    def with_leak_filter(self, on: bool) -> Objective:
        """The same with the filter on or off."""
        objective = replace(self.config.objective, leak_filter=on)
        return replace(self, config=replace(self.config, objective=objective))

    def with_std(self, on: bool) -> Objective:
        """The same whose streams divide by a spread, by the z-score where they do not; or whose streams are centred
        alone."""
        streams = tuple(
            replace(stream, advantage="centred" if not on else _spread(stream.advantage))
            for stream in self.preset.streams
        )
        return replace(self, preset=replace(self.preset, streams=streams))


def _spread(kind: AdvantageKind) -> AdvantageKind:
    return "z_score" if kind in ("centred", "leave_one_out") else kind


@dataclass(frozen=True, eq=False)
class Recorded:
    """A step as one of the objectives sees it."""

    objective: Objective
    rollouts: StepRollouts
    recomputed: tuple[str, ...]  # rewards

    @classmethod
    def of(cls, step: SavedStep, objective: Objective, processor: Processor) -> Recorded:
        """
        Raises:
            ValueError: see `SavedStep.recorded`; a reward is not finite, so nothing is credited.
        """
        preset, cut = objective.preset, objective.config.objective.cut_responses
        rollouts = step.recorded(preset, processor, cut)
        bad = rollouts.told_bad_rewards()
        if bad:
            raise ValueError(f"{step.path}: {bad[0]}, so the step is skipped and credits nothing. Choose another step.")
        return cls(objective, rollouts, step.missing(preset))

    @cached_property
    def credit(self) -> Credit:
        """Of the step's trained groups."""
        return self.credit_as(self.objective)

    def credit_as(self, objective: Objective) -> Credit:
        """With another way to make advantages of the same rewards."""
        return step_credit(self.rollouts, objective.preset, objective.config)

    @cached_property
    def advantages(self) -> Tensor:
        """[S, B] of the trained groups, see `sample_advantages`."""
        preset, ledger = self.objective.preset, self.rollouts.trained[0]
        return sample_advantages(step_advantages(ledger, preset, self.objective.config.objective), preset)

    def side(self) -> Side:
        """What is said of this objective alone."""
        preset, objective = self.objective.preset, self.objective.config.objective
        alive, kept = live_groups(self.rollouts.ledger, preset, objective)
        streams = tuple(
            StreamLine(
                name=stream.name,
                pass_name=stream.trajectory,
                tokens=stream.tokens,
                rewards=" + ".join(f"{weight:g} {name}" for name, weight in stream.rewards),
                loss_weight=stream.loss_weight,
                how=", ".join((stream.advantage, stream.scope, stream.normalize, stream.aggregation)),
                dead=int((~row).sum()),
            )
            for stream, row in zip(preset.streams, alive, strict=True)
        )
        names = [stream.name for stream in preset.streams]
        pairs = tuple(
            StreamPair((names[one], names[other]), signs(self.advantages[one], self.advantages[other]))
            for one in range(len(names))
            for other in range(one + 1, len(names))
        )
        return Side(self.objective.label, streams, int((~kept).sum()), pairs, self._switches(), self.recomputed)

    def _switches(self) -> tuple[Switch, ...]:
        kinds = dict.fromkeys(stream.advantage for stream in self.objective.preset.streams)
        filters = self.objective.config.objective.leak_filter
        whole = self.objective
        leaks = self._between(whole.with_leak_filter(False), whole.with_leak_filter(True))
        stds = self._between(whole.with_std(True), whole.with_std(False))
        return (
            Switch("leak filter", "on" if filters else "off", leaks),
            Switch("no std", ", ".join(kinds), stds),
        )

    def _between(self, before: Objective, after: Objective) -> Comparison:
        return Aligned.of(self.credit_as(before), self.credit_as(after)).compared()


def credit_report(
    run: Path, number: int, step: SavedStep, objectives: tuple[Objective, Objective], processor: Processor, shown: int
) -> CreditReport:
    """
    Args:
        run: its folder.
        number: of the step.
        objectives: both with the run's configuration, but for their sections `objective`.
        shown: samples at most whose texts are in the report.

    Raises:
        ValueError: the step was made under another configuration; see `SavedStep.recorded`, here with the label of the
            objective in front.
    """
    check_made_by(run, step, objectives[0].config)
    first, second = (_recorded(step, objective, processor) for objective in objectives)
    aligned = Aligned.of(first.credit, second.credit)
    if not aligned.keys:
        raise ValueError(f"{step.path}: no group of the step is trained on. Choose another step.")
    texts = _Texts(first, second, processor)
    rollouts = first.rollouts
    return CreditReport(
        run=str(run),
        step=number,
        num_drawn=rollouts.num_drawn,
        skipped=rollouts.skipped,
        num_graded=rollouts.ledger.num_groups,
        num_trained=rollouts.trained[0].num_groups,
        num_samples=step.num_samples,
        num_tokens=sum(aligned.lengths),
        notes=tuple(dict.fromkeys(_notes(first, second))),
        sides=(first.side(), second.side()),
        comparison=aligned.compared(),
        regions=tuple(texts.regions(aligned)),
        samples=tuple(texts.samples(aligned, shown)),
    )


def check_made_by(run: Path, step: SavedStep, config: Config) -> None:
    """Raises ValueError where the step has other numbers of prompts and samples than the configuration says: what a
    token weighs would not be what it weighed."""
    found = (step.num_prompts, step.num_samples)
    wanted = (config.rollout.prompts_per_step, config.rollout.samples_per_prompt)
    if found != wanted:
        raise ValueError(
            f"{step.path} has {found[0]} prompts x {found[1]} samples, and {run / 'config.yaml'} says "
            f"rollout.prompts_per_step={wanted[0]} and rollout.samples_per_prompt={wanted[1]}: another configuration "
            "made the step. Give a folder with these rollouts and the configuration that made them, such as "
            "config.0.yaml of the run, as its config.yaml."
        )


def _recorded(step: SavedStep, objective: Objective, processor: Processor) -> Recorded:
    try:
        return Recorded.of(step, objective, processor)
    except ValueError as error:
        raise ValueError(f"the objective {objective.label}: {error}") from error


def _notes(first: Recorded, second: Recorded) -> Iterator[str]:
    for each in (first, second):
        config = each.objective.config
        label = each.objective.label
        if each.recomputed:
            yield f"{label}: the rollouts have no {', '.join(each.recomputed)}; graded again from the texts"
        if config.objective.mismatch != "none":
            yield f"{label}: without the importance weights of objective.mismatch={config.objective.mismatch}"
    if first.rollouts.rounds is not None:
        yield "dynamic sampling has chosen the groups by the run's own objective; another might have kept others"
    if first.objective.config.train.batch_size < first.objective.config.rollout.prompts_per_step:
        yield (
            "the step has several optimizer steps: from the second on, ratios and clipping scale what is shown here, "
            "which is the credit before any weight has moved"
        )


class _Texts:
    """What the responses of a step say, with their credit."""

    def __init__(self, first: Recorded, second: Recorded, processor: Processor) -> None:
        self._sides, self._processor = (first, second), processor
        self._groups: Mapping[int, RolloutGroup] = {group.group_id: group for group in first.rollouts.groups}
        self._rows = {number: row for row, number in enumerate(first.rollouts.trained[0].number.tolist())}

    def regions(self, aligned: Aligned) -> list[Region]:
        """Passes and their segments, in the order of responses."""
        found: dict[tuple[str, str], list[Tensor]] = {}
        responses = self._responses(aligned.keys)
        for key, credit in aligned.pieces().items():
            for segment, own in self._segments(responses[key]).items():
                found.setdefault((key.pass_name, segment), []).append(credit[:, own])
        regions = []
        for (pass_name, segment), pieces in sorted(found.items(), key=lambda item: item[0][0] != "first"):
            both = torch.cat(pieces, 1)
            if both.shape[1]:
                moved, mass = shift(*both), both.abs().sum(1).tolist()
                masses = (mass[0], mass[1])
                regions.append(Region(pass_name, segment, both.shape[1], masses, moved.gained, moved.lost))
        return regions

    def samples(self, aligned: Aligned, count: int) -> list[ShownSample]:
        """Those of the largest change, the largest first; samples that nothing changes for are left out."""
        changes, credits, pieces = aligned.changes(), aligned.of_samples(), aligned.pieces()
        order = changes.argsort(descending=True, stable=True)[:count].tolist()
        return [
            self._sample(aligned.samples[place], changes[place].item(), credits[:, place], pieces)
            for place in order
            if changes[place] > 0
        ]

    def _sample(
        self, which: tuple[int, int], change: float, credits: Tensor, pieces: Mapping[ResponseKey, Tensor]
    ) -> ShownSample:
        number, sample = which
        prompt = self._groups[number].prompt
        keys = [key for key in pieces if (key.group, key.sample) == which]
        responses = self._responses(keys)
        row = self._rows[number]
        rewards: dict[str, float] = {}
        advantages: list[dict[str, float]] = []
        for side in self._sides:
            ledger, preset = side.rollouts.trained[0], side.objective.preset
            place = row * ledger.num_samples + sample
            rewards |= {name: per_rollout(value)[place].item() for name, value in ledger.rollout_rewards.items()}
            names = [stream.name for stream in preset.streams]
            advantages.append(dict(zip(names, side.advantages[:, place].tolist(), strict=True)))
        return ShownSample(
            key=prompt.key,
            sample=sample,
            problem=prompt.problem,
            answer=prompt.answer,
            change=change,
            credits=_pair(credits),
            rewards=rewards,
            advantages=(advantages[0], advantages[1]),
            responses=tuple(self._response(responses[key], pieces[key]) for key in keys),
        )

    def _response(self, response: Response, credit: Tensor) -> ShownResponse:
        """`credit`: [2, n]."""
        return ShownResponse(
            pass_name=response.pass_name,
            number=response.number,
            cut=response.rollout.finish_reason == "length",
            num_tokens=credit.shape[1],
            credits=_pair(credit.sum(1)),
            pieces=tuple(credit_pieces(self._processor, response.rollout.response_ids, credit)),
        )

    def _segments(self, response: Response) -> dict[str, Tensor]:
        """By name, [n] bool each: what is in two of them is the first one's."""
        rollout, template = response.rollout, response.template
        left = torch.ones(len(rollout.response_ids), dtype=torch.bool)
        found: dict[str, Tensor] = {}
        for name in (*template.tags, ANSWER):
            span = template.block(rollout.response_text, name)
            if span is not None:
                own = torch.tensor(self._processor.segment_mask(rollout.response_ids, span), dtype=torch.bool)
                found[name] = own & left
                left = left & ~own
        return {**found, OUTSIDE: left}

    def _responses(self, keys: Sequence[ResponseKey]) -> dict[ResponseKey, Response]:
        """Of these responses, as whichever objective scores them sees them."""
        found: dict[ResponseKey, Response] = {}
        for number, sample in dict.fromkeys((key.group, key.sample) for key in keys):
            group = self._groups[number]
            for side in self._sides:
                for one in scored_responses(group.pairs[sample], group.prompt, side.objective.preset):
                    later = one.pass_name != "first"
                    found[ResponseKey(number, sample, later, one.pass_name, one.number)] = one
        return found


def credit_pieces(processor: Processor, ids: Sequence[int], credit: Tensor) -> Iterator[Piece]:
    """The text of a response in pieces of one credit. A character that two of them share is the first one's.

    Args:
        credit: [2, n].
    """
    text, spans, start = processor.decode(ids), processor.token_spans(ids), 0
    values = credit.T.tolist()
    for place, value in enumerate(values):
        if place + 1 == len(values) or values[place + 1] != value:
            end = max(start, spans[place][1])
            yield Piece(text[start:end], (value[0], value[1]))
            start = end


def _pair(values: Tensor) -> tuple[float, float]:
    first, second = values.tolist()
    return first, second
