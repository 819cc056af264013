"""How well a policy predicts demonstrations that it is not trained on: forward passes alone.

    loss            -sum_t log p[t] / T      over all T target tokens of all demonstrations, nats
    token_accuracy  the share of them that no token of the vocabulary is likelier than

Every token weighs the same, so neither layout nor packing changes a number beyond rounding. A rank holds two portions
of its share at most, whatever the number of demonstrations; the same policy in the same layout gives the same bits,
with the bad samples known already or found on the way.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_sr1.data import Check, Deal, Quarantine, ShardDataset, only_demonstrations
from megatron_sr1.packing import gather_rows
from megatron_sr1.phases import during
from megatron_sr1.policy import Policy
from megatron_sr1.ranks import agreed
from megatron_sr1.training.batches import Batcher
from megatron_sr1.types import LogProbs, Prompt, Scoring, SftSample

EXAMPLES_FILE = "heldout.json"  # of a run folder
_Share = list[tuple[int, Future[Prompt | SftSample]]]  # number of a sample, and the sample when it is read


@dataclass(frozen=True, order=True)
class HeldoutExample:
    """One of the demonstrations, with the loss that the policy has of it."""

    number: int  # in data.heldout
    key: str
    template: str
    problem: str
    response: str
    loss: float | None  # mean over its own tokens, nats; None: not finite
    tokens: int


@dataclass(frozen=True)
class HeldoutResult:
    """What was measured, the same on every rank."""

    metrics: dict[str, float]  # heldout/loss, heldout/token_accuracy, heldout/tokens
    examples: tuple[HeldoutExample, ...]  # the first good ones


@dataclass(frozen=True)
class HeldoutLoss:
    """Measures a policy on the demonstrations of `data.heldout`."""

    dataset: ShardDataset
    quarantine: Quarantine
    check: Check
    deal: Deal
    batcher: Batcher
    policy: Policy
    num_samples: int  # the first of the dataset
    portion: int  # samples that are read and scored at once, of all replicas together
    workers: int  # threads that read
    num_examples: int = 0  # of the first samples, those that are good are told one by one

    def measure(self) -> HeldoutResult:
        """Collective.

        Raises:
            ValueError: on every rank: a sample is no demonstration, more of them are bad than the quarantine takes, or
                none is left.
        """
        totals = torch.zeros(3, dtype=torch.float64)  # loss, hits, tokens
        examples: list[HeldoutExample] = []
        with ThreadPoolExecutor(self.workers, thread_name_prefix="heldout") as pool:
            for share in self._shares(pool):
                samples = self._taken(share)
                batches = self.batcher.measured([sample for _, sample in samples])
                scores = self.policy.logprobs(batches, Scoring())
                totals += sum(map(_sums, scores), torch.zeros(3, dtype=torch.float64))
                logprobs = gather_rows([each.logprobs for each in scores], batches, len(samples))
                examples += self._examples(samples, logprobs)
                during.moved()
        self.policy.work.take()  # these passes are of no step
        whole = self.policy.replicas.gather_rows(totals[None]).sum(0)  # of numbers that every layout has, as ranks go
        loss, hits, tokens = whole.tolist()
        if not tokens:
            raise ValueError(
                "data.heldout: no demonstration of it can be used. quarantine/heldout.jsonl has the reasons."
            )
        metrics = {"heldout/loss": loss / tokens, "heldout/token_accuracy": hits / tokens, "heldout/tokens": tokens}
        return HeldoutResult(metrics, tuple(sorted(self.policy.replicas.gather(examples))))

    def _examples(self, samples: list[tuple[int, SftSample]], logprobs: list[Tensor]) -> list[HeldoutExample]:
        """`logprobs`: [n] of each sample's response."""
        found = []
        for (number, sample), values in zip(samples, logprobs, strict=True):
            if number < self.num_examples:
                loss, prompt = -float(values.double().mean()), sample.prompt
                told = (prompt.key, sample.template, prompt.problem, sample.response)
                found.append(HeldoutExample(number, *told, loss if math.isfinite(loss) else None, len(values)))
        return found

    def _shares(self, pool: Executor) -> Iterator[_Share]:
        """This replica's of each portion; the next is read while one is used."""
        ahead: _Share | None = None
        for start in range(0, self.num_samples, self.portion):
            share = self._begun(range(start, min(start + self.portion, self.num_samples)), pool)
            if ahead is not None:
                yield ahead
            ahead = share
        if ahead is not None:
            yield ahead

    def _begun(self, portion: range, pool: Executor) -> _Share:
        """Bad samples are dealt out like others: what is packed hangs on no order in which they are found."""
        dealt = self.deal([self.dataset.describe(index) for index in portion], self.policy.replicas.num_ranks)
        mine = [portion[place] for place in dealt[self.policy.replicas.rank]]
        good = [index for index in mine if self.dataset.place(index) not in self.quarantine]
        return [(index, pool.submit(self.dataset.read, index)) for index in good]

    def _taken(self, share: _Share) -> list[tuple[int, SftSample]]:
        """Those that are good; what is bad all ranks know from now on."""
        numbers, samples, bad = [], [], []
        for index, future in share:
            try:
                sample = future.result()
                self.check(sample)
                samples.append(sample)
                numbers.append(index)
            except ValueError as error:
                bad.append(self.dataset.bad(index, error))
        ranks = self.policy.platform.ranks
        for found in ranks.gather(bad):
            self.quarantine.add(found)
        demonstrations = agreed(ranks, lambda: only_demonstrations(samples, "data.heldout"))
        return list(zip(numbers, demonstrations, strict=True))


def _sums(scores: LogProbs) -> Tensor:
    """[3]: loss, hits and number of a row's tokens."""
    assert scores.is_top is not None, "the rows mark it"
    numbers = (-scores.logprobs.double().sum(), scores.is_top.double().sum())
    return torch.tensor([*(float(number) for number in numbers), float(len(scores.logprobs))], dtype=torch.float64)


def keep_examples(folder: Path, step: int, examples: Sequence[HeldoutExample]) -> None:
    """Writes them to `EXAMPLES_FILE` of a run folder, in the place of those of an earlier step."""
    tree = {"step": step, "examples": [asdict(example) for example in examples]}
    partial = folder / f"{EXAMPLES_FILE}.tmp"
    partial.write_text(json.dumps(tree, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, folder / EXAMPLES_FILE)
