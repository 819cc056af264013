"""Optimizer steps whose gradient is not finite: skipped by all ranks, counted, and told with what they were of.

One such step leaves no trace in weights and moments, so the run goes on with the next prompts; `train.max_bad_steps` of
them in a row are skipped, and one more ends the run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_sr1.policy import StepResult
from megatron_sr1.ranks import Ranks
from megatron_sr1.types import LogProbs

FOLDER = "bad_steps"  # of a run folder
_MOST_TOLD = 1000  # samples of a step


class BadSteps:
    """Of one run: how many steps in a row had a gradient that was not finite, and their evidence."""

    def __init__(self, most: int, in_a_row: int, folder: Path, say: Callable[[str], None], *, writes: bool) -> None:
        """
        Args:
            most: in a row, that a run goes on after.
            in_a_row: before the step that the run goes on with.
            folder: of the run.
            writes: whether this rank writes the evidence.
        """
        self.in_a_row = in_a_row
        self._most, self._folder, self._say, self._writes = most, folder / FOLDER, say, writes

    def take(
        self, step: int, results: Sequence[StepResult], batch: Sequence[str] = (), rewards: Sequence[str] = ()
    ) -> None:
        """Counts a step, and writes `bad_steps/step_N.json` where its gradient was not finite.

        Args:
            batch: keys of the samples that were trained, some of them several times perhaps.
            rewards: those that are not finite, in words.

        Raises:
            ValueError: there are too many in a row; on every rank.
        """
        bad = [result for result in results if result.skipped]
        if not bad:
            self.in_a_row = 0 if results else self.in_a_row  # a step that trains nothing says nothing
            return
        self.in_a_row += 1
        path = self._folder / f"step_{step:06d}.json"
        if self._writes:
            self._write(path, step, results, batch, rewards)
        told = len({culprit for result in bad for culprit in result.culprits})
        named = f", nor are rewards or log-probs of {told} samples" if told else ""
        named += f". First, {rewards[0]}" if rewards else ""
        text = f"step {step + 1}: the gradient is not finite{named}; see {path}"
        if self.in_a_row > self._most:
            raise ValueError(
                f"{text}. It is so in {self.in_a_row} steps in a row, and train.max_bad_steps is {self._most}: what is "
                "saved is untouched. Look at these samples, lower optimizer.lr or a coefficient of the objective, and "
                "run the command again: it goes on from the newest checkpoint."
            )
        self._say(f"{text}. It is skipped: weights and moments stay as they are")

    def _write(
        self, path: Path, step: int, results: Sequence[StepResult], batch: Sequence[str], rewards: Sequence[str]
    ) -> None:
        tree = {
            "step": step,
            "in_a_row": self.in_a_row,
            "grad_norms": [str(result.grad_norm) for result in results],
            "skipped": [result.skipped for result in results],
            "not_finite": [
                {"key": key, "sample": sample}
                for result in results
                for key, sample in sorted(set(result.culprits))[:_MOST_TOLD]
            ],
            "rewards": list(rewards[:_MOST_TOLD]),
            "batch": list(dict.fromkeys(batch))[:_MOST_TOLD],
        }
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)


def not_finite(
    logprobs: Sequence[LogProbs],
    places: Sequence[Tensor],
    most: int,
    ranks: Ranks,
    name: Callable[[int], tuple[str, int]],
) -> tuple[tuple[str, int], ...]:
    """Key and sample of the responses with a log-prob that is not finite, the same on every rank. Collective.

    Args:
        logprobs: of each micro-batch of this rank, [R] nats.
        places: of each micro-batch [R], the place of the token's response among `most` of each sample.
        name: key and sample number of a sample's place.
    """
    found: set[int] = set()
    for scores, place in zip(logprobs, places, strict=True):
        found |= set((place[~torch.isfinite(scores.logprobs)] // most).tolist())
    return tuple(sorted({name(index) for index in ranks.gather(sorted(found))}))


def bad_samples(*numbers: Tensor | None) -> list[int]:
    """The samples [B] for which a number that enters the rewards, a KL or what a contrast earns, is not finite.

    Args:
        numbers: [S, B, M] each; None: nothing of the kind enters.
    """
    bad = [(~torch.isfinite(each)).any(2).any(0) for each in numbers if each is not None]  # [B] each
    return torch.stack(bad).any(0).nonzero().squeeze(1).tolist() if bad else []


def finite(numbers: Tensor | None) -> Tensor | None:
    """The same with 0 for what is not finite."""
    return None if numbers is None else torch.nan_to_num(numbers, nan=0.0, posinf=0.0, neginf=0.0)
