"""What is reported of two objectives that look at the same responses. Plain numbers and texts.

The credit of a token is what multiplies d log p of it in the first update of the policy: the sum over the streams of
loss_weight * advantage * token weight. That of a sample is the sum over the tokens of all its responses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Signs:
    """How many things have which signs, each with one number under a first and one under a second."""

    same: int  # neither is 0
    opposite: int
    only_first: int  # 0 under the second
    only_second: int  # 0 under the first
    neither: int  # 0 under both

    @property
    def total(self) -> int:
        """All of them."""
        return self.same + self.opposite + self.only_first + self.only_second + self.neither


@dataclass(frozen=True)
class Shift:
    """What becomes of the credit of samples, or of tokens, from a first to a second."""

    signs: Signs
    gained: int  # more credit under the second: pushed up more, or down less
    lost: int


@dataclass(frozen=True)
class Comparison:
    """Of all credit under a first and a second."""

    samples: Shift
    tokens: Shift
    masses: tuple[float, float]  # the sum of |credit| over the tokens
    moved: float  # in [0, 1]: the share of |credit| that lies on other tokens, both masses taken for 1


@dataclass(frozen=True)
class StreamLine:
    """A stream of an objective."""

    name: str
    pass_name: str
    tokens: str
    rewards: str  # with their weights
    loss_weight: float
    how: str  # advantage, scope, aggregation
    dead: int  # groups


@dataclass(frozen=True)
class StreamPair:
    """The advantages that samples have in two streams of one objective."""

    names: tuple[str, str]
    advantages: Signs


@dataclass(frozen=True)
class Switch:
    """What turning a switch of an objective does to its credit."""

    name: str
    here: str  # how the objective has it
    effect: Comparison  # from the first of its states to the second


@dataclass(frozen=True)
class Side:
    """One of the two objectives."""

    label: str
    streams: tuple[StreamLine, ...]
    dead: int  # groups that are dead to every stream with a loss_weight
    pairs: tuple[StreamPair, ...]
    switches: tuple[Switch, ...]
    recomputed: tuple[str, ...] = ()  # rewards that the rollouts do not have, graded again from the texts


@dataclass(frozen=True)
class Region:
    """All tokens of one segment of one pass."""

    pass_name: str
    segment: str
    num_tokens: int
    masses: tuple[float, float]
    gained: int
    lost: int


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of one credit."""

    text: str
    credits: tuple[float, float]  # of each of them


@dataclass(frozen=True)
class ShownResponse:
    """A response as the page shows it."""

    pass_name: str
    number: int  # among the samples of its pass
    cut: bool  # by the token limit
    num_tokens: int
    credits: tuple[float, float]  # of all its tokens
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class ShownSample:
    """A sample as the page shows it."""

    key: str
    sample: int
    problem: str
    answer: str
    change: float  # the sum over its tokens of |credit under the second - credit under the first|
    credits: tuple[float, float]
    rewards: Mapping[str, float]
    advantages: tuple[Mapping[str, float], Mapping[str, float]]  # by stream, under each
    responses: tuple[ShownResponse, ...]


@dataclass(frozen=True)
class CreditReport:
    """Of one step of a run."""

    run: str
    step: int
    num_drawn: int  # prompts
    skipped: Mapping[int, str]  # by number: why the group could not be graded
    num_graded: int  # groups, of which some are dead
    num_trained: int  # groups of the batch; what is credited is of these
    num_samples: int  # of each group
    num_tokens: int  # of all responses that one of the two scores
    notes: tuple[str, ...]
    sides: tuple[Side, Side]
    comparison: Comparison
    regions: tuple[Region, ...]
    samples: tuple[ShownSample, ...]  # those of the largest change, the largest first
