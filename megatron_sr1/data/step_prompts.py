"""The prompts of one training step, which may ask for more than it began with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from megatron_sr1.ahead import Later
from megatron_sr1.data.feed import Batch, SampleFeed
from megatron_sr1.data.kinds import only_prompts
from megatron_sr1.ranks import agreed
from megatron_sr1.types import ImageRef, Prompt, PromptShare

if TYPE_CHECKING:
    from PIL.Image import Image


class StepPrompts:
    """Drawn from `data.train`, in flight until `finish`: a state that is saved before draws all of them again.

    Implements `types.DrawnPrompts`: this rank has its share of them, and reads another one where it is asked to.
    """

    def __init__(self, feed: SampleFeed, count: int, *, taken: bool = True) -> None:
        """Draws the prompts that the step begins with. Collective; raises as `more`.

        Args:
            taken: False: they are only looked at, see `SampleFeed.look`, and come again. Then there are no `more`.
        """
        self._feed, self._taken = feed, taken
        self.bad: list[str] = []  # of those that are only looked at, why one was left out
        self._batches: list[Batch] = []
        self._prompts: list[Later[Prompt]] = []  # by number
        self._own: set[int] = set()
        self.keys: list[str] = []
        self.first = self._next(count, distinct=False)

    def more(self, count: int) -> PromptShare:
        """The next `count` prompts, or those before the first that the step holds already: a small data set comes
        round. Collective.

        Raises:
            ValueError: a sample is no prompt; see `SampleFeed.next`.
        """
        return self._next(count, distinct=True)

    def finish(self) -> None:
        """All of them have done their work, those too that were not trained on."""
        for batch in self._batches:
            self._feed.finish(batch)

    def read(self, number: int) -> Prompt:
        """See `types.DrawnPrompts`."""
        return self._prompts[number]()

    def images(self, number: int, sizes: Sequence[tuple[int, int]]) -> tuple[Image | ImageRef, ...]:
        """See `types.DrawnPrompts`."""
        if number in self._own or self._prompts[number].started:
            return self.read(number).images
        return tuple(ImageRef(size, Later(partial(self._image, number, index))) for index, size in enumerate(sizes))

    def _image(self, number: int, index: int) -> Image:
        return self.read(number).images[index]

    def _next(self, count: int, *, distinct: bool) -> PromptShare:
        if self._taken:
            batch = self._feed.next(count, distinct=distinct)
        else:
            batch, self.bad = self._feed.look(count)
        prompts = agreed(self._feed.ranks, lambda: only_prompts(batch.samples, "data.train"))
        own, start = dict(zip(batch.own, prompts, strict=True)), len(self.keys)
        self._batches.append(batch)
        self.keys += batch.keys
        for place, index in enumerate(batch.indices):
            make = partial(own.__getitem__, place) if place in own else partial(self._read, index)
            self._prompts.append(Later(make))
        self._own |= {start + place for place in own}
        return PromptShare(batch.keys, own, batch.shares, lambda place: self.read(start + place))

    def _read(self, index: int) -> Prompt:
        (prompt,) = only_prompts([self._feed.read(index)], "data.train")
        return prompt
