"""The file of a step's rollouts: one JSON line a sample, and back to the bit.

Python writes floats so that reading gives the same bits. A step trained from its file is therefore the step itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from megatron_sr1.prompts import OURS, Asked
from megatron_sr1.training.step_rewards import Rewards, rewards_of
from megatron_sr1.types import Prompt, Rollout, RolloutGroup, RolloutPair

_KEYS = {"key", "sample", "rewards", "first", "second", "description", "description_cut"}
_SKIPPED_KEYS = {"group_id", "skipped"}
_TORN = "The file is damaged: copy it again, or have the engine answer the step's prompts again, without --train-only."


def rollouts_file(folder: Path, step: int) -> Path:
    """Where a step's rollouts are, in a `rollouts` folder."""
    return folder / f"step_{step:06d}.jsonl"


def write_rollouts(
    path: Path,
    groups: Sequence[RolloutGroup],
    rewards: Rewards,
    skipped: Mapping[int, str] = MappingProxyType({}),
    asked: Asked = OURS,
) -> None:
    """One JSON line per sample: ids, texts, log-probs and rewards of both passes; images by the prompt's key.

    `read_rollouts` gets all of it back, to the bit.

    Args:
        skipped: by number, groups of the step that were not graded, and why; they have a line each.
        asked: the templates of the passes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    index = 0
    with path.open("w", encoding="utf-8") as file:
        for number, reason in skipped.items():
            file.write(json.dumps({"group_id": number, "skipped": reason}) + "\n")
        for group in groups:
            for pair in group.pairs:
                line = {
                    "group_id": group.group_id,
                    "key": group.prompt.key,
                    "problem": group.prompt.problem,
                    "answer": group.prompt.answer,
                    "sample": pair.sample_index,
                    "description": pair.description,
                    "description_cut": pair.description_cut,
                    "rewards": rewards_of(rewards, index),
                    "templates": str(asked),
                    "first": _fields(pair.first),
                    "second": _fields(pair.second),
                }
                file.write(json.dumps(line) + "\n")
                index += 1


def read_rollouts(
    path: Path, prompts: Sequence[Prompt], num_samples: int, names: Sequence[str], asked: Asked = OURS
) -> tuple[list[RolloutGroup], Rewards]:
    """What `write_rollouts` wrote; groups that were skipped are left out again.

    Args:
        prompts: of that step, in its order; the file has their keys, and no images.
        num_samples: K.
        names: of rewards that must be there.
        asked: the templates that the segments of the responses are looked for by.

    Raises:
        ValueError: no such file, a damaged one, another number of samples, another prompt than the data gives at this
            place, other templates, a reward that was not measured, or another number of response ids than log-probs.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist. Give the folder of a run that saved this step, or lower train.steps.")
    lines, skipped = _lines(path)
    graded = [index for index in range(len(prompts)) if index not in skipped]
    if len(lines) != len(graded) * num_samples or not graded:
        raise ValueError(
            f"{path} holds {len(lines)} samples, the configuration asks for {len(graded)} prompts x {num_samples} "
            "samples. Set rollout.prompts_per_step and rollout.samples_per_prompt as in the run that saved it."
        )
    missing = sorted(set(names) - set(lines[0]["rewards"]))
    if missing:
        raise ValueError(
            f"{path} has no reward {missing[0]!r}. Set objective.preset and objective.streams as in the run that saved "
            "it."
        )
    then = lines[0].get("templates", str(asked))  # files of earlier releases do not say
    if then != str(asked):
        raise ValueError(
            f"{path}: its prompts were asked by other templates, {then}; the configuration has {asked}. Set "
            "objective.template, second_template, plain_template and templates as in the run that saved it."
        )
    groups = []
    for place, index in enumerate(graded):
        prompt = prompts[index]
        share = lines[place * num_samples : (place + 1) * num_samples]
        for line in share:
            if line["key"] != prompt.key:
                raise ValueError(
                    f"{path}, group {index}: rollouts of sample {line['key']!r}, but the data gives {prompt.key!r}. "
                    "Use the data.train and the seed of the run that saved it."
                )
        groups.append(RolloutGroup(index, prompt, tuple(_pair(path, line) for line in share)))
    rewards = {name: torch.tensor([line["rewards"][name] for line in lines]) for name in lines[0]["rewards"]}
    return groups, rewards


def _lines(path: Path) -> tuple[list[dict[str, Any]], set[int]]:
    """Those of samples, and the numbers of the groups that were skipped."""
    lines, skipped = [], set()
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}. {_TORN}") from error
        if isinstance(line, dict) and line.keys() == _SKIPPED_KEYS:
            skipped.add(line["group_id"])
            continue
        if not isinstance(line, dict) or not line.keys() >= _KEYS:
            raise ValueError(f"{path}, line {number}: it is no sample. {_TORN}")
        lines.append(line)
    return lines, skipped


def _pair(path: Path, line: dict[str, Any]) -> RolloutPair:
    first, second = _rollout(path, line["first"]), line["second"]
    second = None if second is None else _rollout(path, second)
    return RolloutPair(line["sample"], first, second, line["description"], line["description_cut"])


def _rollout(path: Path, fields: dict[str, Any]) -> Rollout:
    ids, logprobs = fields["response_ids"], fields["generator_logprobs"]
    if len(ids) != len(logprobs):
        raise ValueError(f"{path}, {fields['rollout_id']}: {len(ids)} response ids and {len(logprobs)} log-probs.")
    sequences = {name: tuple(fields[name]) for name in ("prompt_ids", "response_ids", "generator_logprobs")}
    return Rollout(**{**fields, **sequences})


def _fields(rollout: Rollout | None) -> dict[str, Any] | None:
    return None if rollout is None else asdict(rollout)
