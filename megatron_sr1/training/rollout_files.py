"""The file of a step's rollouts: one JSON line a sample, and back to the bit.

Python writes floats so that reading gives the same bits. A step trained from its file is therefore the step itself.

With dynamic sampling the first line says how many prompts were drawn beyond the step's own, in how many rounds, and
every sample has `trained_as`: the place of its prompt in the training batch, null where its group was dropped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sr1.prompts import OURS, Asked
from megatron_sr1.training.step_rewards import rewards_of
from megatron_sr1.training.step_rollouts import StepRollouts
from megatron_sr1.types import SECOND, LaterPass, Prompt, Question, Reading, Rollout, RolloutGroup, RolloutPair

_KEYS = {"key", "sample", "rewards", "first", "second", "description", "description_cut"}
_SKIPPED_KEYS = {"group_id", "skipped"}
_ROUNDS_KEYS = {"rounds", "further_prompts"}  # of dynamic sampling
_PLACE = "trained_as"
_TORN = "The file is damaged: copy it again, or have the engine answer the step's prompts again, without --train-only."


def rollouts_file(folder: Path, step: int) -> Path:
    """Where a step's rollouts are, in a `rollouts` folder."""
    return folder / f"step_{step:06d}.jsonl"


def write_rollouts(
    path: Path,
    rollouts: StepRollouts,
    num_prompts: int,
    asked: Asked = OURS,
    later: Sequence[LaterPass] = (SECOND,),
) -> None:
    """One JSON line per sample: ids, texts, log-probs and rewards of all passes; images by the prompt's key. Groups
    that could not be graded have a line each.

    `read_rollouts` gets all of it back, to the bit.

    Args:
        num_prompts: that the step began with.
        asked: the templates of the passes.
        later: the later passes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    index = 0
    with path.open("w", encoding="utf-8") as file:
        if rollouts.rounds is not None:
            further = rollouts.num_drawn - num_prompts
            file.write(json.dumps({"rounds": rollouts.rounds, "further_prompts": further}) + "\n")
        for number, reason in rollouts.skipped.items():
            file.write(json.dumps({"group_id": number, "skipped": reason}) + "\n")
        for group, place in zip(rollouts.groups, rollouts.places, strict=True):
            for pair in group.pairs:
                line = {
                    "group_id": group.group_id,
                    **({_PLACE: place} if rollouts.rounds is not None else {}),
                    "key": group.prompt.key,
                    "problem": group.prompt.problem,
                    "answer": group.prompt.answer,
                    "sample": pair.sample_index,
                    "description": pair.description,
                    "description_cut": pair.description_cut,
                    "rewards": rewards_of(rollouts.rewards, index),
                    "templates": str(asked),
                    "passes": _told(later),
                    "first": _fields(pair.first),
                    "second": _fields(pair.second),
                    **({"further": [asdict(reading) for reading in pair.further]} if pair.further else {}),
                }
                file.write(json.dumps(line) + "\n")
                index += 1


def read_rollouts(
    path: Path,
    draw: Callable[[int], Sequence[Prompt]],
    num_samples: int,
    names: Sequence[str],
    asked: Asked = OURS,
    later: Sequence[LaterPass] = (SECOND,),
) -> StepRollouts:
    """What `write_rollouts` wrote; groups that were skipped are left out again, those that were dropped dropped.

    Args:
        draw: the prompts of that step, in its order, with so many beyond those that it began with; the file has their
            keys, and no images.
        num_samples: K.
        names: of rewards that must be there.
        asked: the templates that the segments of the responses are looked for by.
        later: the passes that the objective has.

    Raises:
        ValueError: no such file, a damaged one, another number of samples, another prompt than the data gives at this
            place, other templates, a reward that was not measured, or another number of response ids than log-probs.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist. Give the folder of a run that saved this step, or lower train.steps.")
    file = _read_lines(path)
    lines, further = file.lines, file.further_prompts
    for name, value in (("rounds", file.rounds or 0), ("further_prompts", further)):
        if type(value) is not int or not 0 <= value <= len(lines) + len(file.skipped):
            raise ValueError(f"{path}: {name}={value!r} is more, or other, than it holds. {_TORN}")
    prompts = draw(further)
    graded = [index for index in range(len(prompts)) if index not in file.skipped]
    if len(lines) != len(graded) * num_samples or not graded:
        raise ValueError(
            f"{path} holds {len(lines)} samples, the configuration asks for {len(graded)} prompts x {num_samples} "
            "samples. Set rollout.prompts_per_step and rollout.samples_per_prompt as in the run that saved it."
        )
    _check_settings(path, lines[0], names, asked, later)
    groups, places = [], []
    for number, index in enumerate(graded):
        prompt = prompts[index]
        share = lines[number * num_samples : (number + 1) * num_samples]
        for line in share:
            if line["key"] != prompt.key:
                raise ValueError(
                    f"{path}, group {index}: rollouts of sample {line['key']!r}, but the data gives {prompt.key!r}. "
                    "Use the data.train and the seed of the run that saved it."
                )
        groups.append(RolloutGroup(index, prompt, tuple(_pair(path, line) for line in share)))
        places.append(index if file.rounds is None else share[0][_PLACE])
    _check_places(path, places, len(prompts) - further)
    rewards = {name: torch.tensor([line["rewards"][name] for line in lines]) for name in lines[0]["rewards"]}
    return StepRollouts(groups, rewards, places, file.skipped, file.rounds)


def _told(later: Sequence[LaterPass]) -> list[dict[str, Any]]:
    return [asdict(one) for one in later]


def _check_settings(
    path: Path, line: dict[str, Any], names: Sequence[str], asked: Asked, later: Sequence[LaterPass]
) -> None:
    """`line`: a sample's. Files of earlier releases do not tell of templates and passes."""
    passes = line.get("passes", _told(later))
    changed = [one["name"] for one in _told(later) if one not in passes]
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
        raise ValueError(f"{path}: its groups are trained as {places}, which are no places of {count} prompts. {_TORN}")


@dataclass(frozen=True)
class _File:
    lines: list[dict[str, Any]]  # of samples
    skipped: dict[int, str]
    rounds: int | None = None
    further_prompts: int = 0


def _read_lines(path: Path) -> _File:
    lines, skipped, rounds = [], {}, {}
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}. {_TORN}") from error
        keys = line.keys() if isinstance(line, dict) else set()
        if keys == _SKIPPED_KEYS:
            skipped[line["group_id"]] = line["skipped"]
        elif number == 1 and keys == _ROUNDS_KEYS:
            rounds = line
        elif keys >= (_KEYS | {_PLACE} if rounds else _KEYS):
            lines.append(line)
        else:
            raise ValueError(f"{path}, line {number}: it is no sample. {_TORN}")
    return _File(lines, skipped, **rounds)


def _pair(path: Path, line: dict[str, Any]) -> RolloutPair:
    first, second = _rollout(path, line["first"]), line["second"]
    second = None if second is None else _rollout(path, second)
    further = tuple(_reading(path, fields) for fields in line.get("further", ()))
    return RolloutPair(line["sample"], first, second, line["description"], line["description_cut"], further)


def _reading(path: Path, fields: dict[str, Any]) -> Reading:
    question = fields["question"]
    asked = None if question is None else Question(**{**question, "choices": tuple(question["choices"])})
    return Reading(**{**fields, "rollout": _rollout(path, fields["rollout"]), "question": asked})


def _rollout(path: Path, fields: dict[str, Any]) -> Rollout:
    ids, logprobs = fields["response_ids"], fields["generator_logprobs"]
    if len(ids) != len(logprobs):
        raise ValueError(f"{path}, {fields['rollout_id']}: {len(ids)} response ids and {len(logprobs)} log-probs.")
    sequences = {name: tuple(fields[name]) for name in ("prompt_ids", "response_ids", "generator_logprobs")}
    return Rollout(**{**fields, **sequences})


def _fields(rollout: Rollout | None) -> dict[str, Any] | None:
    return None if rollout is None else asdict(rollout)
