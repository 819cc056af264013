"""A saved step as the viewer shows it: whatever its lines say, and beside it the advantages that it was trained with.

Lines of earlier releases lack fields; what is not there is left out of what is shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from megatron_sr1.config import Config
from megatron_sr1.processor import Processor
from megatron_sr1.prompts import ANSWER, Template
from megatron_sr1.report.viewer.filters import filters_of, says_yes
from megatron_sr1.report.viewer.images import ImageStore
from megatron_sr1.report.viewer.shown import (
    SetToShow,
    ShownGroup,
    ShownResponse,
    ShownSample,
    ShownSet,
    joined_blocks,
)
from megatron_sr1.streams import Preset, preset_of
from megatron_sr1.training.rollout_files import PLACE, TORN, file_lines, rollouts_file, step_files
from megatron_sr1.training.token_files import GAP, ResponseName
from megatron_sr1.training.viewed.advantages import StepAdvantages, saved_advantages
from megatron_sr1.training.viewed.configs import StepConfigs
from megatron_sr1.training.viewed.measures import StepMeasures, saved_measures

_TOLD_SKIPPED = 20
_SAMPLE: Mapping[str, tuple[type, ...]] = {
    **{"group_id": (int,), "sample": (int,), "key": (str,), "problem": (str,), "answer": (str,), "rewards": (dict,)},
    **{"first": (dict,), "second": (dict, type(None)), "description": (str, type(None))},
}
_ROLLOUT: Mapping[str, tuple[type, ...]] = {
    **{"prompt_ids": (list,), "response_ids": (list,), "response_text": (str,), "generator_logprobs": (list,)},
    "finish_reason": (str,),
}
_ELEMENTS: Mapping[str, tuple[type, ...]] = {
    **{"prompt_ids": (int,), "response_ids": (int,), "generator_logprobs": (int, float)},
}
_READING: Mapping[str, tuple[type, ...]] = {"pass_name": (str,), "number": (int,), "rollout": (dict,)}
ODD = (TypeError, KeyError, AttributeError, IndexError, OverflowError)  # of a line with other fields, or odd values
_APART = math.log(2.0)  # nats: the log-prob gap of a token that one of trainer and generator finds twice as likely


@dataclass(frozen=True)
class StepReader:
    """Reads steps of one run, one at a time."""

    run: Path
    configs: StepConfigs
    tokenizer: Processor | str  # or why there is none
    images: ImageStore
    image_folder: Path  # where they go
    told: Mapping[int, str] = field(default_factory=dict)  # by step, what else is to be said of it

    def sets(self, steps: Sequence[int]) -> list[SetToShow]:
        """Those of the steps, in this order."""
        return [SetToShow(str(step), f"step {step}", "step", step, partial(self.read, step)) for step in steps]

    def read(self, step: int) -> ShownSet:
        """
        Raises:
            ValueError: the files of the step are not whole, or damaged.
        """
        path = rollouts_file(self.run / "rollouts", step)
        lines = [line for file in step_files(path) for line in file_lines(file)]
        samples = [line for line in lines if "sample" in line]
        for line in samples:
            if wrong := wrong_field(line):
                raise ValueError(f"{path}: a sample has no {wrong}, or another thing there. {TORN}")
        samples.sort(key=lambda line: line["group_id"])  # stable: samples keep their order
        absent: dict[str, str] = {}
        advantages = preset = None
        try:
            preset = preset_of(self.configs.of(step)).at(step)
            advantages = self._advantages(step, self.configs.of(step), preset)
            if advantages.unknown:
                absent |= dict.fromkeys(("opposite", "dead"), advantages.unknown)
        except ValueError as error:
            absent |= dict.fromkeys(("advantage", "opposite", "dead"), str(error))
            if preset is None:  # nor whether descriptions were asked for
                absent |= dict.fromkeys(("shortcut", "leak", "undescribed"), str(error))
        measures = saved_measures(path.parent, step, samples, preset)
        absent |= measures.absent
        if isinstance(self.tokenizer, str):
            absent["surprise"] = self.tokenizer
        if not any("rounds" in line for line in lines):
            absent["dropped"] = "without dynamic sampling every group that is graded is trained on"
        groups = _Groups(self, path, preset, advantages, measures)
        streams = () if advantages is None else advantages.streams
        notes = (*([self.told[step]] if step in self.told else []), *_notes(lines))
        return ShownSet(streams, absent, notes, groups.of(samples), measures.titles)

    def _advantages(self, step: int, config: Config, preset: Preset) -> StepAdvantages:
        if isinstance(self.tokenizer, str):
            raise ValueError(self.tokenizer)
        try:
            return saved_advantages(self.run, step, config, preset, self.tokenizer)
        except ODD as error:
            raise _odd(rollouts_file(self.run / "rollouts", step), error) from error


def _odd(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: its lines are not as this release writes and reads them ({error!r}). {TORN}")


def wrong_field(line: Mapping[str, Any]) -> str:
    """Of a sample's line what is not there or is of another type, by its name; "": all is well."""
    parts: list[tuple[str, Any, Mapping[str, tuple[type, ...]]]] = [("", line, _SAMPLE)]
    parts += [(f"{name}.", line.get(name), _ROLLOUT) for name in ("first", "second") if line.get(name) is not None]
    readings = line.get("further", [])
    for number, reading in enumerate(readings if isinstance(readings, list) else [None]):
        parts.append((f"further[{number}].", reading, _READING))
        parts.append((f"further[{number}].rollout.", isinstance(reading, dict) and reading.get("rollout"), _ROLLOUT))
    for prefix, fields, types in parts:
        if not isinstance(fields, dict):
            return prefix.rstrip(".")
        for name, allowed in types.items():
            if name not in fields or type(fields[name]) not in allowed:
                return f"{prefix}{name}"
            if name in _ELEMENTS and not set(map(type, fields[name])) <= set(_ELEMENTS[name]):
                return f"{prefix}{name}"
    values = [one for each in line["rewards"].values() for one in (each if isinstance(each, list) else [each])]
    return "" if all(type(value) in (int, float) for value in values) else "rewards"


def _notes(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for line in lines:
        if "rounds" in line:
            yield (
                f"Dynamic sampling: {line['rounds']} further rounds, {line.get('further_prompts', 0)} prompts beyond "
                "the step's own."
            )
    skipped = [line for line in lines if "skipped" in line]
    for line in skipped[:_TOLD_SKIPPED]:
        yield f"Prompt {line.get('group_id')} could not be graded and was skipped: {line['skipped']}"
    if len(skipped) > _TOLD_SKIPPED:
        yield f"{len(skipped) - _TOLD_SKIPPED} further prompts were skipped."


class _Groups:
    """From lines to groups."""

    def __init__(
        self,
        reader: StepReader,
        path: Path,
        preset: Preset | None,
        advantages: StepAdvantages | None,
        measures: StepMeasures,
    ) -> None:
        self._reader, self._path, self._preset, self._advantages = reader, path, preset, advantages
        self._measures = measures.of_responses
        self._tokenizer = None if isinstance(reader.tokenizer, str) else reader.tokenizer

    def of(self, lines: Sequence[Mapping[str, Any]]) -> Iterator[ShownGroup]:
        """`lines`: of samples, in the order of groups. Raises ValueError where one has an odd value."""
        for number, own in groupby(lines, key=lambda line: line["group_id"]):
            try:
                group = self._group(number, list(own))
            except ODD as error:
                raise _odd(self._path, error) from error
            yield group

    def _group(self, number: int, lines: Sequence[Mapping[str, Any]]) -> ShownGroup:
        first = lines[0]
        names, reason = self._reader.images.put(first["key"], first["problem"], self._reader.image_folder)
        prompt, count = self._prompt(first["first"]["prompt_ids"])
        if count == 0:
            names, reason = (), "the prompt has no image"
        has_images = count != 0  # unknown counts as having some: then no filter of descriptions is taken away
        samples = tuple(self._sample(number, line, has_images) for line in lines)
        texts = (first["key"], first["problem"], first["answer"])
        return ShownGroup(number, *texts, samples, names, reason, prompt)

    def _prompt(self, ids: Sequence[int]) -> tuple[str, int | None]:
        """As the engine was given it, the tokens of an image told once; and the number of images."""
        if self._tokenizer is None:
            return "", None
        image = self._tokenizer.image_token_id
        count = sum(here == image != after for here, after in pairwise([*ids, -1]))
        pieces = []
        for is_image, run in groupby(ids, key=lambda token: token == image):
            own = list(run)
            pieces.append(f"[image: {len(own)} tokens]" if is_image else self._tokenizer.decode(own))
        return "".join(pieces), count

    def _sample(self, group: int, line: Mapping[str, Any], has_images: bool) -> ShownSample:
        number, rewards = line["sample"], line["rewards"]
        responses = tuple(self._responses(group, line, has_images))
        described = has_images and self._preset is not None and self._preset.described
        cut = bool(line.get("description_cut")) or any(response.cut for response in responses)
        filters = set(filters_of(rewards, line["description"], described=described, cut=cut))
        numbers = [value for response in responses for value in response.surprise or ()]
        numbers += [value for response in responses for values in response.measures.values() for value in values]
        advantages: dict[str, float | None] = {}
        if self._advantages is not None:
            own = self._advantages
            values = own.of_samples.get((group, number))
            if values is not None:
                advantages = {stream.name: value for stream, value in zip(own.streams, values, strict=True)}
            filters |= {"dead"} if group in own.dead else set()
            filters |= {"opposite"} if (group, number) in own.opposite else set()
        if PLACE in line and line[PLACE] is None:
            filters.add("dropped")
        known = [value for value in advantages.values() if value is not None]
        gaps = (abs(value) for response in responses for value in response.measures.get(GAP, ()))
        if any(value >= _APART for value in gaps):
            filters.add("gap")
        if not all(map(math.isfinite, [*numbers, *known])):
            filters.add("not_finite")
        facts = {"image": "drawn from a noisy copy"} if line.get("distorted") else {}
        return ShownSample(number, responses, line["description"], rewards, advantages, frozenset(filters), facts)

    def _responses(self, group: int, line: Mapping[str, Any], has_images: bool) -> Iterator[ShownResponse]:
        sample, rewards = line["sample"], line["rewards"]
        right = says_yes(rewards["acc"]) if "acc" in rewards else None
        template = self._first_template(has_images)
        yield self._response(ResponseName(group, sample, "first", 0), line["first"], template, right=right)
        if line["second"] is not None:
            right = _right_of("second", 0, rewards)
            told = {"right": right, "context": line["description"]}
            place = ResponseName(group, sample, "second", 0)
            yield self._response(place, line["second"], self._later_template("second"), **told)
        for reading in line.get("further", ()):
            name, number = reading["pass_name"], reading["number"]
            told = {"right": _right_of(name, number, rewards), "context": reading.get("context")}
            if question := reading.get("question"):
                told["question"] = (question["problem"], question["answer"])
            place = ResponseName(group, sample, name, number)
            yield self._response(place, reading["rollout"], self._later_template(name), **told)

    def _first_template(self, has_images: bool) -> Template | None:
        if self._preset is None:
            return None
        return self._preset.asked.first if has_images else self._preset.asked.plain

    def _later_template(self, name: str) -> Template | None:
        if self._preset is None or self._preset.later_pass(name) is None:
            return None
        return self._preset.template_of(name)

    def _response(
        self, place: ResponseName, fields: Mapping[str, Any], template: Template | None, **more: Any
    ) -> ShownResponse:
        text, ids, logprobs = fields["response_text"], fields["response_ids"], fields["generator_logprobs"]
        tokens = self._tokens(ids, text)
        known: dict[str, Any] = {}
        if tokens is not None:
            known["tokens"] = tokens
            if len(logprobs) == len(tokens):
                known["surprise"] = tuple(-value if value else 0.0 for value in logprobs)
            if self._advantages is not None and place in self._advantages.masks:
                known["streams"] = self._advantages.masks[place]
        known["measures"] = self._measures.get(place, {})
        if self._advantages is not None:
            known["advantages"] = self._advantages.of_responses.get(place, ())
        count = len(ids) if ids else None
        whole = text if tokens is None else "".join(tokens)
        facts = _facts(fields)
        return ShownResponse(
            place.pass_name,
            place.number,
            whole,
            fields["finish_reason"] == "length",
            count,
            blocks=tuple(joined_blocks(blocks_of(template, text))),
            facts=facts,
            **known,
            **more,
        )

    def _tokens(self, ids: Sequence[int], text: str) -> tuple[str, ...] | None:
        """The text of each. None: there are none, or the tokenizer reads another text in them. A character that two
        tokens share is the first one's."""
        if self._tokenizer is None or not ids:
            return None
        whole = self._tokenizer.decode(ids)
        if not whole.startswith(text):
            return None
        pieces, start = [], 0
        for _, end in self._tokenizer.token_spans(ids):
            pieces.append(whole[start : max(start, end)])
            start = max(start, end)
        return tuple(pieces)


def blocks_of(template: Template | None, text: str) -> Iterator[tuple[str, int, int]]:
    """Name and [start, end) of each block of a response, and of its answer."""
    if template is None:
        return
    for name in (*template.tags, ANSWER):
        span = template.block(text, name)
        if span is not None:
            yield name, span[0], span[1]


def _right_of(name: str, number: int, rewards: Mapping[str, Any]) -> bool | None:
    """Whether one response of a later pass is right."""
    value = rewards.get("acc_vis" if name == "second" else f"acc_vis@{name}")
    if isinstance(value, list):
        return says_yes(value[number]) if number < len(value) else None
    return None if value is None or number else says_yes(value)


def _facts(fields: Mapping[str, Any]) -> dict[str, str]:
    facts = {}
    if "weight_version" in fields:
        facts["weights of step"] = str(fields["weight_version"])
    if fields.get("finished_at", 0.0) > fields.get("queued_at", 0.0):
        facts["seconds"] = f"{fields['finished_at'] - fields['queued_at']:.2f}"
    return facts
