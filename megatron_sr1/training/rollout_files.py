"""The files of a step's rollouts: one JSON line a sample, and back to the bit.

Python writes floats so that reading gives the same bits. A step trained from its files is therefore the step itself.

Each engine has a file of its own, step_000007.0-of-2.jsonl.gz and step_000007.1-of-2.jsonl.gz, with the groups that it
has made; all together they are the step. One step_000007.jsonl, as earlier releases wrote it, is the same.

With dynamic sampling the first line of the first file says how many prompts were drawn beyond the step's own, in how
many rounds, and every sample has `trained_as`: the place of its prompt in the training batch, null where its group was
dropped.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_sr1.prompts import OURS, Asked
from megatron_sr1.training.step_rollouts import StepRollouts
from megatron_sr1.types import SECOND, LaterPass, Reading, Rollout

PLACE = "trained_as"
_PART = re.compile(r"\.(\d+)-of-(\d+)\.jsonl\.gz$")
TORN = "The file is damaged: copy it again, or have the engine answer the step's prompts again, without --train-only."


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


def write_rollouts(
    path: Path,
    rollouts: StepRollouts,
    num_prompts: int,
    asked: Asked = OURS,
    later: Sequence[LaterPass] = (SECOND,),
    rank: int = 0,
) -> None:
    """The part of the step that a rank holds, one JSON line per sample: ids, texts, log-probs and rewards of all
    passes; images by the prompt's key. Groups that could not be graded have a line each, in the first part. Each part
    is whole or not there; what another run has left of the step must be gone (`remove_step`).

    `read_rollouts` gets all of it back, to the bit.

    Args:
        path: see `rollouts_file`.
        num_prompts: that the step began with.
        asked: the templates of the passes.
        later: the later passes.
        rank: a holder of groups; its part is its place among the holders.
    """
    holders = rollouts.ledger.holder.unique().tolist()
    part = holders.index(rank)
    target = _part(path, part, len(holders))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.tmp")
    with gzip.open(temporary, "wt", compresslevel=1, encoding="utf-8") as file:
        for line in _lines(rollouts, num_prompts, asked, later, part):
            file.write(json.dumps(line) + "\n")
    os.replace(temporary, target)


def _lines(
    rollouts: StepRollouts, num_prompts: int, asked: Asked, later: Sequence[LaterPass], part: int
) -> Iterator[dict[str, Any]]:
    if part == 0:
        if rollouts.rounds is not None:
            yield {"rounds": rollouts.rounds, "further_prompts": rollouts.num_drawn - num_prompts}
        for number, reason in rollouts.skipped.items():
            yield {"group_id": number, "skipped": reason}
    same = {"templates": str(asked), "passes": told_passes(later)}
    index_of = {number: index for index, number in enumerate(rollouts.ledger.number.tolist())}
    for group in rollouts.groups:
        index = index_of[group.group_id]
        rewards = {name: value[index].tolist() for name, value in rollouts.ledger.rewards.items()}
        for number, pair in enumerate(group.pairs):
            yield {
                "group_id": group.group_id,
                **({PLACE: rollouts.places[index]} if rollouts.rounds is not None else {}),
                "key": group.prompt.key,
                "problem": group.prompt.problem,
                "answer": group.prompt.answer,
                "sample": pair.sample_index,
                "description": pair.description,
                "description_cut": pair.description_cut,
                "rewards": {name: value[number] for name, value in rewards.items()},
                **same,
                "first": _rollout_fields(pair.first),
                "second": None if pair.second is None else _rollout_fields(pair.second),
                **({"distorted": True} if pair.distorted else {}),
                **({"further": [_reading_fields(reading) for reading in pair.further]} if pair.further else {}),
            }


def told_passes(later: Sequence[LaterPass]) -> list[dict[str, Any]]:
    """As the lines have them."""
    return [asdict(one) for one in later]


def _reading_fields(reading: Reading) -> dict[str, Any]:
    question = None if reading.question is None else vars(reading.question)
    return {**vars(reading), "rollout": _rollout_fields(reading.rollout), "question": question}


def _rollout_fields(rollout: Rollout) -> dict[str, Any]:
    """Without experts that nobody asked for, as earlier releases wrote it."""
    fields = {name: value for name, value in vars(rollout).items() if name != "experts"}
    return {**fields, "experts": base64.b64encode(rollout.experts).decode()} if rollout.experts else fields


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
        raise ValueError(f"{path}: its parts are {names}, which are not all of one run. {TORN}")
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
        raise ValueError(f"{path}: {error}. {TORN}") from error
    return data.decode("utf-8", errors="replace")


def file_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of one of `step_files`, as they are. Raises ValueError where it is damaged; the message names the
    line."""
    lines = []
    for number, text in enumerate(read_text(path).splitlines(), start=1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}. {TORN}") from error
        if not isinstance(line, dict):
            raise ValueError(f"{path}, line {number}: it is no sample. {TORN}")
        lines.append(line)
    return lines


def step_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of a step, as they are, those of samples in the order of groups. Raises ValueError as `step_files`."""
    lines = [line for file in step_files(path) for line in file_lines(file)]
    return sorted(lines, key=lambda line: line.get("group_id", -1) if "sample" in line else -1)
