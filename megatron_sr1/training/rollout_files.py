"""The files of a step's rollouts: one JSON line a sample, and back to the bit.

Python writes floats so that reading gives the same bits. A step trained from its files is therefore the step itself.

Each engine has a file of its own, step_000007.0-of-2.jsonl.gz and step_000007.1-of-2.jsonl.gz, with the groups that it
has made; all together they are the step. One step_000007.jsonl, as earlier releases wrote it, is the same.

With dynamic sampling the first line of the first file says how many prompts were drawn beyond the step's own, in how
many rounds, and every sample has `trained_as`: the place of its prompt in the training batch, null where its group was
dropped.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sr1.prompts import OURS, Asked
from megatron_sr1.training.step_rollouts import StepRollouts
from megatron_sr1.types import SECOND, LaterPass, Prompt, Question, Reading, Rollout, RolloutGroup, RolloutPair

_KEYS = {"key", "sample", "rewards", "first", "second", "description", "description_cut"}
_SKIPPED_KEYS = {"group_id", "skipped"}
_ROUNDS_KEYS = {"rounds", "further_prompts"}  # of dynamic sampling
_PLACE = "trained_as"
_PART = re.compile(r"\.(\d+)-of-(\d+)\.jsonl\.gz$")
_TORN = "The file is damaged: copy it again, or have the engine answer the step's prompts again, without --train-only."


def rollouts_file(folder: Path, step: int) -> Path:
    """What a step's rollouts are called in a `rollouts` folder, however many files they are."""
    return folder / f"step_{step:06d}.jsonl"


def steps_in(folder: Path) -> list[Path]:
    """`rollouts_file` of all steps that are there, in order."""
    files = (file.name for file in folder.glob("step_*.jsonl*"))
    names = {name.partition(".")[0] for name in files if name.endswith(".jsonl") or _PART.search(name)}
    return [folder / f"{name}.jsonl" for name in sorted(names)]


def remove_step(path: Path) -> None:
    """Removes what is there of a step, unfinished parts too: those of two runs would be taken for one's."""
    for old in [*_files(path), *path.parent.glob(f"{path.stem}.*.jsonl.gz.tmp")]:
        old.unlink(missing_ok=True)


@dataclass(frozen=True)
class Share:
    """What one engine writes of a step."""

    groups: Collection[int]  # their group_id
    part: int = 0
    parts: int = 1


def write_rollouts(
    path: Path,
    rollouts: StepRollouts,
    num_prompts: int,
    asked: Asked = OURS,
    later: Sequence[LaterPass] = (SECOND,),
    share: Share | None = None,
) -> None:
    """One JSON line per sample: ids, texts, log-probs and rewards of all passes; images by the prompt's key. Groups
    that could not be graded have a line each, in the first part. Each part is whole or not there; what another run has
    left of the step must be gone (`remove_step`).

    `read_rollouts` gets all of it back, to the bit.

    Args:
        path: see `rollouts_file`.
        num_prompts: that the step began with.
        asked: the templates of the passes.
        later: the later passes.
        share: what is written here; None: everything.
    """
    share = share or Share({group.group_id for group in rollouts.groups})
    target = _part(path, share.part, share.parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.tmp")
    with gzip.open(temporary, "wt", compresslevel=1, encoding="utf-8") as file:
        for line in _lines(rollouts, num_prompts, asked, later, share):
            file.write(json.dumps(line) + "\n")
    os.replace(temporary, target)


def _lines(
    rollouts: StepRollouts, num_prompts: int, asked: Asked, later: Sequence[LaterPass], share: Share
) -> Iterator[dict[str, Any]]:
    if share.part == 0:
        if rollouts.rounds is not None:
            yield {"rounds": rollouts.rounds, "further_prompts": rollouts.num_drawn - num_prompts}
        for number, reason in rollouts.skipped.items():
            yield {"group_id": number, "skipped": reason}
    same = {"templates": str(asked), "passes": _told(later)}
    rewards = {name: value.tolist() for name, value in rollouts.rewards.items()}
    numbers = itertools.count()
    for group, place in zip(rollouts.groups, rollouts.places, strict=True):
        for index, pair in zip(itertools.islice(numbers, len(group.pairs)), group.pairs, strict=True):
            if group.group_id in share.groups:
                yield {
                    "group_id": group.group_id,
                    **({_PLACE: place} if rollouts.rounds is not None else {}),
                    "key": group.prompt.key,
                    "problem": group.prompt.problem,
                    "answer": group.prompt.answer,
                    "sample": pair.sample_index,
                    "description": pair.description,
                    "description_cut": pair.description_cut,
                    "rewards": {name: value[index] for name, value in rewards.items()},
                    **same,
                    "first": vars(pair.first),
                    "second": None if pair.second is None else vars(pair.second),
                    **({"further": [_reading_fields(reading) for reading in pair.further]} if pair.further else {}),
                }


def _reading_fields(reading: Reading) -> dict[str, Any]:
    question = None if reading.question is None else vars(reading.question)
    return {**vars(reading), "rollout": vars(reading.rollout), "question": question}


def _part(path: Path, part: int, parts: int) -> Path:
    return path.with_name(f"{path.stem}.{part}-of-{parts}.jsonl.gz")


def _files(path: Path) -> list[Path]:
    """All that are there of a step, in order."""
    numbers = {file: _PART.search(file.name) for file in path.parent.glob(f"{path.stem}.*.jsonl.gz")}
    parts = {file: int(found[1]) for file, found in numbers.items() if found is not None}
    return [*([path] if path.is_file() else []), *sorted(parts, key=lambda file: parts[file])]


def step_files(path: Path) -> list[Path]:
    """The files of a step: those of its engines, or the one of an earlier release.

    Raises:
        ValueError: there is none, one is missing, or there are those of two runs.
    """
    found = _files(path)
    if not found:
        raise ValueError(f"{path} does not exist. Give the folder of a run that saved this step, or lower train.steps.")
    wanted = [path] if path in found else [_part(path, part, len(found)) for part in range(len(found))]
    if found != wanted:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{path}: its parts are {names}, which are not all of one run. {_TORN}")
    return found


def read_text(path: Path) -> str:
    """Of one of `step_files`. Raises ValueError where it is damaged."""
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
            if path.stat().st_size == 0:  # gzip takes nothing for a whole file
                raise EOFError("it is empty")
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: {error}. {_TORN}") from error
    return data.decode("utf-8", errors="replace")


def step_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of a step, as they are, those of samples in the order of groups. Raises ValueError as `step_files`."""
    lines = [json.loads(line) for file in step_files(path) for line in read_text(file).splitlines()]
    return sorted(lines, key=lambda line: line["group_id"] if "sample" in line else -1)


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
    files = step_files(path)
    for file in files:
        for number, text in enumerate(read_text(file).splitlines(), start=1):
            try:
                line = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}, line {number}: {error}. {_TORN}") from error
            keys = line.keys() if isinstance(line, dict) else set()
            if keys == _SKIPPED_KEYS:
                skipped[line["group_id"]] = line["skipped"]
            elif file == files[0] and number == 1 and keys == _ROUNDS_KEYS:
                rounds = line
            elif keys >= (_KEYS | {_PLACE} if rounds else _KEYS):
                lines.append(line)
            else:
                raise ValueError(f"{file}, line {number}: it is no sample. {_TORN}")
    if len(files) > 1:
        try:
            lines.sort(key=lambda line: line["group_id"])  # stable: samples keep their order
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: group_id of a sample: {error}. {_TORN}") from error
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
