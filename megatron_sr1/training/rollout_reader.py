"""What a step's files say, checked against the data and the settings that it is to be trained with."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from megatron_sr1.prompts import OURS, Asked
from megatron_sr1.ranks import ALONE, Ranks, agreed
from megatron_sr1.training.rollout_files import PLACE, TORN, file_lines, step_files, told_passes
from megatron_sr1.training.step_rewards import Rewards
from megatron_sr1.types import SECOND, DrawnPrompts, LaterPass, Question, Reading, Rollout, RolloutGroup, RolloutPair

_KEYS = {"group_id", "key", "sample", "rewards", "first", "second", "description", "description_cut"}
_SKIPPED_KEYS = {"group_id", "skipped"}
_ROUNDS_KEYS = {"rounds", "further_prompts"}  # of dynamic sampling


@dataclass(frozen=True)
class SavedPart:
    """What a rank has read of a step, and what every rank knows of it."""

    prompts: DrawnPrompts  # all that were drawn
    groups: list[RolloutGroup]  # of this rank's files
    rewards: list[Rewards]  # of these groups, [K] each
    places: list[int | None]  # of all groups that are graded: in the training batch; None: it was dropped
    skipped: Mapping[int, str]
    rounds: int | None


def read_rollouts(
    path: Path,
    draw: Callable[[int], DrawnPrompts],
    num_samples: int,
    names: Sequence[str],
    asked: Asked = OURS,
    later: Sequence[LaterPass] = (SECOND,),
    ranks: Ranks = ALONE,
) -> SavedPart:
    """What `write_rollouts` wrote; groups that were skipped are left out again, those that were dropped dropped. Each
    rank reads every so many of the files. Collective.

    Args:
        draw: the prompts of that step, in its order, with so many beyond those that it began with; the file has their
            keys, and no images.
        num_samples: K.
        names: of rewards that must be there.
        asked: the templates that the segments of the responses are looked for by.
        later: the passes that the objective has.

    Raises:
        ValueError: on every rank: no such file, a damaged one, another number of samples, another prompt than the data
            gives at this place, other templates, a reward that was not measured, or another number of response ids than
            log-probs.
    """
    file = agreed(ranks, lambda: _read_lines(path, ranks))
    rounds, further, skipped = ranks.gather([(file.rounds, file.further_prompts, file.skipped)])[0]
    found = sorted(ranks.gather([(line["group_id"], line.get(PLACE, -1)) for line in file.lines]), key=itemgetter(0))
    for name, value in (("rounds", rounds or 0), ("further_prompts", further)):
        if type(value) is not int or not 0 <= value <= len(found) + len(skipped):
            raise ValueError(f"{path}: {name}={value!r} is more, or other, than it holds. {TORN}")
    prompts = draw(further)
    graded = [number for number in range(len(prompts.keys)) if number not in skipped]
    if len(found) != len(graded) * num_samples or not graded:
        raise ValueError(
            f"{path} holds {len(found)} samples, the configuration asks for {len(graded)} prompts x {num_samples} "
            "samples. Set rollout.prompts_per_step and rollout.samples_per_prompt as in the run that saved it."
        )
    if [number for number, _ in found] != [number for number in graded for _ in range(num_samples)]:
        raise ValueError(f"{path}: its samples are not {num_samples} of each group of {graded}. {TORN}")
    places = [place if rounds is not None else number for number, place in found[::num_samples]]
    _check_places(path, places, len(prompts.keys) - further)
    shares = [file.lines[first : first + num_samples] for first in range(0, len(file.lines), num_samples)]

    def groups() -> list[RolloutGroup]:
        for line in file.lines:
            _check_settings(path, line, names, asked, later)
        return [_group(path, prompts, share) for share in shares]

    own = agreed(ranks, groups)
    rewards = [{name: torch.tensor([line["rewards"][name] for line in share]) for name in names} for share in shares]
    return SavedPart(prompts, own, rewards, places, skipped, rounds)


def _group(path: Path, prompts: DrawnPrompts, lines: Sequence[dict[str, Any]]) -> RolloutGroup:
    number = lines[0]["group_id"]
    key = prompts.keys[number]
    for line in lines:
        if line["group_id"] != number:
            raise ValueError(f"{path}: samples of group {number} are in two of its files. {TORN}")
        if line["key"] != key:
            raise ValueError(
                f"{path}, group {number}: rollouts of sample {line['key']!r}, but the data gives {key!r}. "
                "Use the data.train and the seed of the run that saved it."
            )
    return RolloutGroup(number, prompts.read(number), tuple(_pair(path, line) for line in lines))


def _check_settings(
    path: Path, line: dict[str, Any], names: Sequence[str], asked: Asked, later: Sequence[LaterPass]
) -> None:
    """`line`: a sample's. Files of earlier releases do not tell of templates and passes."""
    passes = line.get("passes", told_passes(later))
    changed = [one["name"] for one in told_passes(later) if one not in passes]
    if changed:
        raise ValueError(
            f"{path}: the pass {changed[0]!r} was another one, or none, when it was saved. Set objective.passes as in "
            "the run that saved it."
        )
    missing = sorted(set(names) - set(line["rewards"]))
    if missing:
        raise ValueError(
            f"{path} has no reward {missing[0]!r}. Set objective.preset and objective.streams as in the run that saved "
            "it."
        )
    then = line.get("templates", str(asked))
    if then != str(asked):
        raise ValueError(
            f"{path}: its prompts were asked by other templates, {then}; the configuration has {asked}. Set "
            "objective.template, second_template, plain_template and templates as in the run that saved it."
        )


def _check_places(path: Path, places: Sequence[Any], count: int) -> None:
    taken = [place for place in places if place is not None]
    numbers = [place for place in taken if type(place) is int and 0 <= place < count]
    if not numbers or numbers != taken or numbers != sorted(set(numbers)):
        raise ValueError(f"{path}: its groups are trained as {places}, which are no places of {count} prompts. {TORN}")


@dataclass(frozen=True)
class _File:
    """What a rank has read."""

    lines: list[dict[str, Any]]  # of samples, in the order of groups
    skipped: dict[int, str]
    rounds: int | None = None
    further_prompts: int = 0


def _read_lines(path: Path, ranks: Ranks) -> _File:
    lines, skipped, rounds = [], {}, {}
    files = step_files(path)
    for file in files[ranks.rank :: ranks.num_ranks]:
        for number, line in enumerate(file_lines(file), start=1):
            keys = line.keys()
            if keys == _SKIPPED_KEYS:
                skipped[line["group_id"]] = line["skipped"]
            elif file == files[0] and number == 1 and keys == _ROUNDS_KEYS:
                rounds = line
            elif keys >= (_KEYS | {PLACE} if rounds else _KEYS) and type(line["group_id"]) is int:
                lines.append(line)
            else:
                raise ValueError(f"{file}, line {number}: it is no sample. {TORN}")
    lines.sort(key=lambda line: line["group_id"])  # stable: samples keep their order
    return _File(lines, skipped, **rounds)


def _pair(path: Path, line: dict[str, Any]) -> RolloutPair:
    first, second = _rollout(path, line["first"]), line["second"]
    second = None if second is None else _rollout(path, second)
    further = tuple(_reading(path, fields) for fields in line.get("further", ()))
    described, distorted = (line["description"], line["description_cut"]), line.get("distorted", False)
    return RolloutPair(line["sample"], first, second, *described, further, distorted)


def _reading(path: Path, fields: dict[str, Any]) -> Reading:
    question = fields["question"]
    asked = None if question is None else Question(**{**question, "choices": tuple(question["choices"])})
    return Reading(**{**fields, "rollout": _rollout(path, fields["rollout"]), "question": asked})


def _rollout(path: Path, fields: dict[str, Any]) -> Rollout:
    ids, logprobs = fields["response_ids"], fields["generator_logprobs"]
    if len(ids) != len(logprobs):
        raise ValueError(f"{path}, {fields['rollout_id']}: {len(ids)} response ids and {len(logprobs)} log-probs.")
    sequences = {name: tuple(fields[name]) for name in ("prompt_ids", "response_ids", "generator_logprobs")}
    return Rollout(**{**fields, **sequences, "experts": _experts(path, fields)})


def _experts(path: Path, fields: Mapping[str, Any]) -> bytes:
    try:
        return base64.b64decode(fields.get("experts", ""), validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"{path}, {fields['rollout_id']}: its experts are no base64: {error}. {TORN}") from error
