"""The prompts of one training step, which may ask for more than it began with."""

from __future__ import annotations

from megatron_sr1.data.feed import Batch, SampleFeed
from megatron_sr1.data.kinds import only_prompts
from megatron_sr1.types import Prompt


class StepPrompts:
    """Drawn from `data.train`, in flight until `finish`: a state that is saved before draws all of them again."""

    def __init__(self, feed: SampleFeed, count: int) -> None:
        """Draws the prompts that the step begins with. Collective; raises as `more`."""
        self._feed = feed
        self._batches: list[Batch] = []
        self.first = self._next(count, distinct=False)

    def more(self, count: int) -> list[Prompt]:
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

    def _next(self, count: int, *, distinct: bool) -> list[Prompt]:
        self._batches.append(self._feed.next(count, distinct=distinct))
        return only_prompts(self._batches[-1].samples, "data.train")
