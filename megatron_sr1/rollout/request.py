"""What goes into an engine and what comes out of it: the seam between the order of the passes and the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from megatron_sr1.types import EncodedImage, WeightSink

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """How one response is drawn. temperature 0 is greedy and ignores the seed."""

    temperature: float
    max_tokens: int
    seed: int
    end_of_turn_id: int  # generation stops after it; it is part of the response
    banned_ids: tuple[int, ...]  # never drawn
    priority: int = 0  # where requests wait for a slot, the smaller number goes first


@dataclass(frozen=True)
class Generation:
    """A finished request."""

    request_id: str
    prompt_ids: tuple[int, ...]  # as the engine used them: image placeholders expanded
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # natural log, of the distribution drawn from, one per response id
    finish_reason: Literal["stop", "length"]
    experts: bytes = b""  # of all tokens but the last, as `Rollout` has them; empty: not asked for


@dataclass(frozen=True)
class OwnView:
    """A prompt with images as an engine prepares it."""

    prompt_ids: tuple[int, ...]  # image placeholders expanded
    images: list[tuple[tuple[int, ...], Tensor]]  # of each its grid (time, height, width), and patches [P, C] float32


class EngineFault(RuntimeError):
    """The engine failed; its requests are lost, and so is what it holds."""


class TokenEngine(WeightSink, Protocol):
    """Continuous batching over one copy of the weights. What `prepare` makes of a prompt, whose image placeholders are
    expanded already, and of its images is opaque, and may be added often. `own_view` is how the engine by itself would
    prepare a prompt with one placeholder an image.

    `restart` drops all requests and everything held and starts as the engine was made, as version 0; all ranks call it
    together. Before it the ranks of one engine meet in `meet_after_fault`. `sleep` gives memory back until the next
    `update_weights`, where the platform can.
    """

    @property
    def max_model_tokens(self) -> int: ...

    @property
    def weight_version(self) -> int: ...

    def prepare(self, prompt_ids: Sequence[int], images: Sequence[EncodedImage]) -> object: ...

    def own_view(self, prompt_ids: Sequence[int], images: Sequence[Image]) -> OwnView: ...

    def add(self, request_id: str, prepared: object, draw: Draw) -> None: ...

    def step(self) -> list[Generation]: ...

    def has_unfinished(self) -> bool: ...

    def meet_after_fault(self, num_open: int) -> None: ...

    def restart(self) -> None: ...

    def sleep(self) -> None: ...
