"""The evaluations of a run as sets of the viewer: all records where they are there, or the examples of the summary."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sr1.report.runs import EVAL_FOLDER, Evaluation, Example, ReportedRun
from megatron_sr1.report.viewer.filters import filters_of, says_yes
from megatron_sr1.report.viewer.images import ImageStore, image_stem
from megatron_sr1.report.viewer.shown import (
    SetToShow,
    ShownGroup,
    ShownResponse,
    ShownSample,
    ShownSet,
    joined_blocks,
)

_TEXTS = "an evaluation keeps texts, without tokens and their log-probs"
_NO_GROUP = "an evaluation trains nothing, so its samples have no advantages"
ABSENT: Mapping[str, str] = {
    **dict.fromkeys(("surprise", "gap", "entropy", "dependency"), _TEXTS),
    **dict.fromkeys(("advantage", "opposite", "dead", "dropped"), _NO_GROUP),
}
_EXAMPLE = "the examples of a summary do not say what was cut, nor whether a description was asked for"
ABSENT_OF_EXAMPLES: Mapping[str, str] = {**ABSENT, **dict.fromkeys(("cut", "undescribed"), _EXAMPLE)}
LATER = ""  # for a name: the template of the later passes
Blocks = Callable[[str, str], Iterable[tuple[str, int, int]]]  # name of a template, a response -> blocks in it


def no_blocks(template: str, text: str) -> Iterable[tuple[str, int, int]]:
    """Where the templates are not known."""
    return ()


def evaluation_sets(run: ReportedRun, images: ImageStore, folder: Path, blocks: Blocks) -> list[SetToShow]:
    """
    Args:
        images: of the held-out data.
        folder: where images go.
    """
    return [
        SetToShow(
            name=one.label,
            title=f"evaluation {one.label}",
            kind="evaluation",
            step=one.step,
            make=partial(_evaluation_set, run.path, one, images, folder, blocks),
        )
        for one in run.evaluations
        if one.examples or (run.path / EVAL_FOLDER / f"{one.label}.jsonl").is_file()
    ]


def _evaluation_set(run: Path, one: Evaluation, images: ImageStore, folder: Path, blocks: Blocks) -> ShownSet:
    records = run / EVAL_FOLDER / f"{one.label}.jsonl"
    if not records.is_file():
        note = f"{records.name} is not there: these are the examples that the summary has kept."
        groups: Iterable[ShownGroup] = (_of_example(number, e, folder) for number, e in enumerate(one.examples))
        return ShownSet((), ABSENT_OF_EXAMPLES, (note,), groups)
    kept = {example.key: example for example in one.examples}
    return ShownSet((), ABSENT, (), _groups(records, kept, images, folder, blocks))


def _groups(
    records: Path, kept: Mapping[str, Example], images: ImageStore, folder: Path, blocks: Blocks
) -> Iterator[ShownGroup]:
    """Raises ValueError at a line that is no record."""
    with records.open("rb") as file:
        for number, line in enumerate(file):
            if not line.endswith(b"\n"):
                return  # what a kill leaves behind
            try:
                fields = json.loads(line)
                own = kept.get(fields["key"])
                found = _copied(own, folder) if own is not None else ()
                reason = ""
                if not found and fields["num_images"]:
                    found, reason = images.put(fields["key"], fields["problem"], folder)
                yield _of_record(number, fields, found, reason, blocks)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(f"{records}:{number + 1} is not a record of an evaluation ({error!r}).") from error


def _copied(example: Example, folder: Path) -> tuple[str, ...]:
    names = []
    for path in example.images:
        names.append(f"{image_stem(str(path.resolve()))}{path.suffix}")
        if not (folder / names[-1]).exists():
            shutil.copyfile(path, folder / names[-1])
    return tuple(names)


def _of_record(
    number: int, fields: Mapping[str, Any], images: tuple[str, ...], reason: str, blocks: Blocks
) -> ShownGroup:
    described = bool(fields.get("described", True))
    template = str(fields["template"])
    samples = tuple(_sample(place, one, described, template, blocks) for place, one in enumerate(fields["samples"]))
    texts = (fields["key"], fields["problem"], fields["answer"])
    return ShownGroup(number, *texts, samples, images, reason, source=fields.get("source", ""))


def _sample(number: int, fields: Mapping[str, Any], described: bool, template: str, blocks: Blocks) -> ShownSample:
    rewards = dict(fields["rewards"])
    if fields["faithful"] is not None:
        rewards["faithful"] = float(fields["faithful"])
    found = tuple(joined_blocks(blocks(template, fields["first"]["text"])))

    def later(response: Mapping[str, Any]) -> tuple[tuple[str, int, int], ...]:
        return tuple(joined_blocks(blocks(LATER, response["text"])))

    responses = [_response("first", 0, fields["first"], blocks=found, right=_right(rewards, "acc"))]
    if fields["second"] is not None:
        told = {"context": fields["description"], "right": _right(rewards, "acc_vis")}
        responses.append(_response("second", 0, fields["second"], blocks=later(fields["second"]), **told))
    for name, answers in fields.get("further", {}).items():
        responses += [_response(name, place, answer, blocks=later(answer)) for place, answer in enumerate(answers)]
    for name, control in fields.get("controls", {}).items():
        if control["response"] is not None:
            lent = {"lent by": control["lent_by"]} if control.get("lent_by") else {}
            told = {"right": control["right"], "facts": lent, "blocks": later(control["response"])}
            responses.append(_response(f"control: {name}", 0, control["response"], **told))
    facts = {}
    if fields["judge"] is not None:
        facts["judge"] = f"{fields['judge']['answer']} ({'right' if fields['judge']['right'] else 'wrong'})"
    cut = fields["description_cut"] or any(response.cut for response in responses)
    filters = filters_of(rewards, fields["description"], described=described, cut=cut)
    return ShownSample(number, tuple(responses), fields["description"], rewards, {}, filters, facts)


def _right(rewards: Mapping[str, Any], name: str) -> bool | None:
    return says_yes(rewards[name]) if name in rewards else None


def _response(name: str, number: int, fields: Mapping[str, Any], **more: Any) -> ShownResponse:
    return ShownResponse(name, number, fields["text"], fields["finish_reason"] == "length", fields["tokens"], **more)


def _of_example(number: int, example: Example, folder: Path) -> ShownGroup:
    responses = [ShownResponse("first", 0, example.first, False, None)]
    if example.second is not None:
        responses.append(ShownResponse("second", 0, example.second, False, None, context=example.description))
    rewards = dict(example.rewards)
    if example.faithful is not None:
        rewards["faithful"] = float(example.faithful)
    filters = filters_of(rewards, example.description, described=example.description is not None, cut=False)
    sample = ShownSample(0, tuple(responses), example.description, rewards, {}, filters)
    return ShownGroup(number, example.key, example.problem, example.answer, (sample,), _copied(example, folder))
