"""Both passes of Vision-SR1 over one engine per rank, the second pass streamed.

The moment a first pass ends, its description is cut out and the second-pass request joins the requests that still run.
A global barrier between the passes would leave the engine idle behind the longest first pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from megatron_sr1.processor import Processor
from megatron_sr1.rollout.balance import assign_prompts
from megatron_sr1.rollout.passes import Passes, PassOptions
from megatron_sr1.rollout.plan import Limits, plan_first, refusals
from megatron_sr1.rollout.request import EngineFault, TokenEngine
from megatron_sr1.types import Prompt, RolloutGroup, Sampling

if TYPE_CHECKING:
    from torch import Tensor

Gather = Callable[[list[Any]], list[Any]]
MAX_RESTARTS = 2  # of one call: a fault that comes back is not an accident

logger = logging.getLogger(__name__)


class TwoPassGenerator:
    """Implements `types.Generator`: prompts are assigned to the engines, all ranks get all groups."""

    def __init__(
        self,
        engine: TokenEngine,
        processor: Processor,
        *,
        max_description_tokens: int,
        rank: int = 0,
        num_ranks: int = 1,
        gather: Gather = list,
        streamed: bool = True,
        weights: Callable[[], Iterable[tuple[str, Tensor]]] | None = None,
    ) -> None:
        """
        Args:
            max_description_tokens: a longer description is cut before the second pass.
            rank: which of the `num_ranks` engines this is; the ranks of one engine pass the same number.
            gather: gives every rank the concatenation of all ranks' lists, in any order; for one rank the list itself.
            streamed: False starts the second pass when the whole first pass is done; the tokens are the same.
            weights: streams the policy's present weights, collectively, into an engine that had to be restarted;
                None: the engine's model directory holds them.
        """
        self._engine = engine
        self._processor = processor
        self._options = PassOptions(max_description_tokens, streamed)
        self._rank = rank
        self._num_ranks = num_ranks
        self._gather = gather
        self._weights = weights

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._engine.update_weights(weights, version)

    def sleep(self) -> None:
        """Gives the engine's memory to the trainer, where the platform can; the next `update_weights` wakes it."""
        self._engine.sleep()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        step: int,
        on_group: Callable[[RolloutGroup], None] | None = None,
    ) -> list[RolloutGroup]:
        """K samples of both passes for each prompt, in the order of `prompts`. Collective.

        Args:
            on_group: takes each group of this rank's engine as soon as it is complete, while others still run.

        Raises:
            ValueError: before anything is submitted, and on every rank: a prompt does not fit the engine.
            ValueError: the engine expanded a prompt otherwise than the processor.
            EngineFault: on every rank: an engine failed again after MAX_RESTARTS restarts, or it had been updated and
                cannot be refilled. On one rank: it failed alone among the ranks of its engine.
        """
        share = assign_prompts(self._processor, prompts, sampling, self._num_ranks)[self._rank]
        plans = {group: plan_first(self._processor, prompts[group], sampling.template) for group in share}
        refused = self._gather([text for group in share for text in self._refusals(prompts[group], sampling)])
        if refused:
            raise ValueError("\n".join(sorted(set(refused))))
        passes = Passes(self._processor, prompts, plans, sampling, step, self._options, on_group)
        self._run(passes)
        pairs = dict(self._gather(list(passes.pairs().items())))  # without the prompts: all ranks have their images
        return [RolloutGroup(group, prompt, pairs[group]) for group, prompt in enumerate(prompts)]

    def _run(self, passes: Passes) -> None:
        """Answers everything; where an engine fails all of them restart, as engines are made together. Collective."""
        for restarts in range(MAX_RESTARTS + 1):
            faults = self._gather(self._attempt(passes))
            if not faults:
                return
            if restarts < MAX_RESTARTS:
                logger.warning("restarting the engines, %d requests are open here: %s", passes.num_open, faults[0])
                self._restart()
        raise EngineFault(f"the engine failed {MAX_RESTARTS + 1} times in one batch of rollouts, last with {faults[0]}")

    def _attempt(self, passes: Passes) -> list[str]:
        try:
            passes.run(self._engine)
        except EngineFault as fault:
            logger.warning("an engine failed", exc_info=fault)
            self._engine.meet_after_fault(passes.num_open)
            return [str(fault)]
        return []

    def _restart(self) -> None:
        version = self._engine.weight_version
        self._engine.restart()
        if self._weights is not None:
            self._engine.update_weights(self._weights(), version)
        elif version != self._engine.weight_version:
            raise EngineFault(
                f"the engine had weights of version {version} and was restarted with those of its model directory; it "
                "cannot be refilled, as this generator was made without `weights`."
            )

    def _refusals(self, prompt: Prompt, sampling: Sampling) -> Iterator[str]:
        limits = (sampling.max_response_tokens, self._engine.max_model_tokens, self._options.max_description_tokens)
        return refusals(self._processor, prompt, sampling.template, sampling.second_pass, Limits(*limits))
