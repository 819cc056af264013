"""What a policy has computed, counted by what its operations grow with; `estimate.step_flops` makes them of it."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from megatron_sr1.types import MicroBatch

Grid = tuple[int, int, int]  # patches of an image along time, height and width


@dataclass
class PassWork:
    """Of passes of one kind over this replica's micro-batches. What fills up the end of a row is not counted."""

    tokens: int = 0
    squares: int = 0  # of the lengths of segments, each of which attends to itself
    seen: int = 0  # tokens of a segment times those of the one that it sees besides
    scored: int = 0  # tokens that the head makes probabilities of
    graded: int = 0  # those of them that the loss depends on
    grids: Counter[Grid] = field(default_factory=Counter)  # of encoded images

    def add(self, batch: MicroBatch, *, encodes: bool) -> None:
        """`encodes`: whether the tower is run for its images."""
        edges = batch.cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(edges)]
        if _ends_in_padding(batch, edges):
            lengths.pop()
        self.tokens += sum(lengths)
        self.squares += sum(length**2 for length in lengths)
        parents = batch.parents[: len(lengths)]
        self.seen += sum(own * lengths[parent] for own, parent in zip(lengths, parents, strict=True) if parent >= 0)
        self.scored += len(batch.targets)
        self.graded += len(batch.targets if batch.grad_rows is None else batch.grad_rows)
        if encodes:
            self.grids.update(image.grid_thw for image in batch.images)


class Work:
    """Since it was last taken."""

    def __init__(self, *, trains_vision: bool) -> None:
        """`trains_vision`: else what the tower makes of a micro-batch is kept, and made once."""
        self._trains_vision = trains_vision
        self._encoded: set[int] = set()
        self.forward, self.trained = PassWork(), PassWork()

    def add(self, batches: Sequence[MicroBatch], *, trains: bool) -> None:
        """A pass over these, with backward where it `trains`."""
        for batch in batches:
            encodes = self._trains_vision or id(batch) not in self._encoded
            if id(batch) not in self._encoded:
                self._encoded.add(id(batch))
                weakref.finalize(batch, self._encoded.discard, id(batch)).atexit = False  # others get its number
            (self.trained if trains else self.forward).add(batch, encodes=encodes)

    def take(self) -> tuple[PassWork, PassWork]:
        """Forward passes alone, and those with backward; counts anew from here."""
        taken = self.forward, self.trained
        self._encoded.clear()
        self.forward, self.trained = PassWork(), PassWork()
        return taken


def _ends_in_padding(batch: MicroBatch, edges: Sequence[int]) -> bool:
    """Every other segment has a token that is scored, or belongs to one that has."""
    last = len(batch.parents) - 1
    if batch.parents[last] >= 0 or last in batch.parents:
        return False
    return not len(batch.loss_rows) or int(batch.loss_rows.max()) < edges[last]


@dataclass(frozen=True)
class StepWork:
    """What a step has taken of all ranks; the same on each."""

    flops: float  # of the model, see `estimate.step_flops`
    tokens: int  # trained, prompts included, each as often as it is in a row
    peak_flops: float | None  # a second, of all devices together; None: nobody knows
    memory: Mapping[str, float]  # `memory/*`, GiB

    def metrics(self, seconds: float) -> dict[str, float]:
        """`flops`, `trained_tokens_per_second` and `memory/*`; `mfu` where the devices are known: the operations over
        what these could have done in the `seconds` that training took."""
        found = {"flops": self.flops, "trained_tokens_per_second": self.tokens / seconds}
        if self.peak_flops is not None:
            found["mfu"] = self.flops / (seconds * self.peak_flops)
        return {**found, **self.memory}
