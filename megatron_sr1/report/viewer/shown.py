"""What the viewer shows, as plain numbers and texts: a run's sets, of a training step or of an evaluation each.

Whatever was not saved is absent by name, with the reason: it is never shown as 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

GAP = "gap"  # of tokens, trainer - generator in nats; its largest finds a sample, not its mean

FILTERS: Mapping[str, tuple[str, str]] = {  # bit by bit, in this order -> (title, meaning)
    "shortcut": ("right answer, wrong description", "the first answer is right, and the description alone misleads"),
    "leak": ("leak", "the description states the answer"),
    "opposite": ("opposite advantages", "two streams with a weight in the loss pull the sample opposite ways"),
    "cut": ("cut", "a response or a description was cut by its token limit"),
    "dead": ("dead group", "every sample of the prompt has advantage 0 in every stream that has a weight"),
    "undescribed": ("no description", "the first pass was asked to describe, and has no description to read from"),
    "dropped": ("not trained on", "dynamic sampling has dropped the group"),
    "not_finite": ("not finite", "a reward, an advantage or a measure of a token is no finite number"),
    "gap": ("high log-prob gap", "a token is at least twice as likely by the trainer as by the generator, or half"),
}


@dataclass(frozen=True)
class ShownStream:
    """A reward stream of the objective that the step was trained by."""

    name: str
    pass_name: str
    tokens: str  # the segment that it credits
    rewards: str  # with their weights
    loss_weight: float
    unknown: str = ""  # why its advantages are not known


@dataclass(frozen=True)
class ShownResponse:
    """One response. Of one whose tokens are known, `text` is those joined."""

    pass_name: str
    number: int  # among the samples of its pass
    text: str
    cut: bool  # by the token limit
    num_tokens: int | None  # None: an endpoint has answered, or it was not saved
    tokens: tuple[str, ...] | None = None  # None: they cannot be told apart
    surprise: tuple[float, ...] | None = None  # -log p of each token by the generator, nats
    streams: tuple[int, ...] | None = None  # of each token: bit s is set where stream s credits it
    advantages: tuple[float | None, ...] = ()  # by stream, of this response
    blocks: tuple[tuple[str, int, int], ...] = ()  # name, [start, end) in characters of `text`
    context: str | None = None  # the text it was given in place of the image
    question: tuple[str, str] | None = None  # problem and answer that are not the prompt's own
    right: bool | None = None  # None: it is not known of this response alone
    facts: Mapping[str, str] = field(default_factory=dict)  # whatever else was saved of it
    measures: Mapping[str, Sequence[float]] = field(default_factory=dict)  # what training has measured, one a token


@dataclass(frozen=True)
class ShownSample:
    """One sample of a prompt."""

    number: int
    responses: tuple[ShownResponse, ...]  # the first pass first
    description: str | None
    rewards: Mapping[str, float | Sequence[float]]  # of several samples of a pass, one each
    advantages: Mapping[str, float | None]  # by stream: the mean over the responses of its pass
    filters: frozenset[str]
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ShownGroup:
    """All samples of a prompt. `images` are what an image store has called them."""

    number: int
    key: str
    problem: str
    answer: str
    samples: tuple[ShownSample, ...]
    images: tuple[str, ...] = ()
    no_images: str = ""  # why there are none
    prompt: str = ""  # as the engine was given it
    source: str = ""


@dataclass(frozen=True)
class ShownSet:
    """What one step has drawn, or one evaluation has answered."""

    streams: tuple[ShownStream, ...]
    absent: Mapping[str, str]  # measures of tokens and filters that are not known here -> why
    notes: tuple[str, ...]  # in sentences
    groups: Iterable[ShownGroup]  # gone through once
    measures: Mapping[str, str] = field(default_factory=dict)  # what training has measured of tokens -> its title


@dataclass(frozen=True)
class SetToShow:
    """A set that is read only when its turn comes, so that one is in memory at a time.

    `make` raises ValueError where it cannot be read.
    """

    name: str  # in addresses; unique in its run
    title: str
    kind: str  # step or evaluation
    step: int
    make: Callable[[], ShownSet]


@dataclass(frozen=True)
class RunToShow:
    """A run's sets in order."""

    name: str
    sets: Sequence[SetToShow]
    left_out: tuple[int, ...] = ()  # steps that are saved, and not in this page


def joined_blocks(blocks: Iterable[tuple[str, int, int]]) -> Iterator[tuple[str, int, int]]:
    """Those that do not overlap one before them, in order of their start."""
    end = 0
    for name, start, stop in sorted(blocks, key=lambda block: (block[1], -block[2])):
        if start >= end and stop > start:
            yield name, start, stop
            end = stop
