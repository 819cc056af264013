"""Both passes of Vision-SR1 over one engine per rank, the second pass streamed.

The moment a first pass ends, its description is cut out and the second-pass request joins the requests that still run.
A global barrier between the passes would leave the engine idle behind the longest first pass.
"""

from __future__ import annotations

import itertools
import logging
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_sr1.ranks import ALONE, Counter, Ranks
from megatron_sr1.rollout.passes import PassRequests
from megatron_sr1.rollout.pixels import pixel_differences
from megatron_sr1.rollout.plan import Planner
from megatron_sr1.rollout.pool import PromptPool, begun, in_turn, reads
from megatron_sr1.rollout.request import EngineFault, TokenEngine
from megatron_sr1.types import NamedTensors, OnQuestion, Prompt, PromptShare, RolloutGroup, Sampling

NUM_COMPARED = 4  # prompts of each engine whose pixels are compared with the trainer's before the first answer
DECODED_AHEAD = 16  # prompts of a stream
MAX_RESTARTS = 2  # of one call: a fault that comes back is not an accident
logger = logging.getLogger(__name__)


class TwoPassGenerator:
    """Implements `types.Generator`."""

    def __init__(
        self,
        engine: TokenEngine,
        planner: Planner,
        *,
        engines: Ranks = ALONE,
        streamed: bool = True,
        hands_on: bool = True,
        weights: Callable[[], NamedTensors] | None = None,
        start_weights: Callable[[], NamedTensors] | None = None,
        counter: Counter | None = None,
        slots: int = 0,
        patience: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            planner: plans the passes; its limits are the engine's.
            engines: all engines, and which of them this is; the ranks of one engine are the same one.
            streamed: False starts the second pass when the whole first pass is done; the tokens are the same.
            hands_on: this rank has its engine's groups; the ranks of an engine made the same, and one of them holds
                them for all.
            weights: streams the policy's present weights, collectively, into an engine that had to be restarted;
                None: the engine's model directory holds them.
            start_weights: streams those that the run began with, for the passes of reader "reference". None: the engine
                has them.
            counter: engines take prompts from it as they get free slots, beyond those that fill them at first; None:
                each answers its own.
            slots: requests that an engine answers at a time; needed for that.
            patience: waits for all engines' ranks, however long that takes; a collective waits no longer than its
                group's timeout, which the answers of a stream may take.
        """
        assert counter is None or slots > 0, "how many prompts fill an engine hangs on its slots"
        self._counter, self._slots = counter, slots
        self._decoding = ThreadPoolExecutor(2, thread_name_prefix="pool")
        self._patience = patience
        self._engine = engine
        self._planner = planner
        self._engines = engines
        self._streamed = streamed
        self._hands_on = hands_on
        self._weights = weights
        self._start_weights = start_weights
        self._replaced: int | None = None  # the version whose place the starting weights have taken
        self._compared = False
        self._num_shared = 0  # rounds whose prompts the engines share

    def update_weights(self, weights: NamedTensors, version: int) -> None:
        self._replaced = None
        self._engine.update_weights(weights, version)

    def sleep(self) -> None:
        """Gives the engine's memory to the trainer, where the platform can; the next `update_weights` wakes it."""
        self._engine.sleep()

    def pixel_differences(self, prompts: Iterable[Prompt], sampling: Sampling) -> list[str]:
        """See `pixels.pixel_differences`, of the prompts that have images: what differs on any engine. Collective."""
        plans = [self._planner.first(prompt, sampling.template) for prompt in prompts if prompt.images]
        found = self._engines.gather(pixel_differences(self._engine, self._planner.processor, plans))
        return sorted(set(found))

    def generate(
        self,
        prompts: PromptShare,
        sampling: Sampling,
        step: int,
        on_group: Callable[[RolloutGroup], None] | None = None,
        on_question: OnQuestion | None = None,
        on_first: Callable[[RolloutGroup], None] | None = None,
    ) -> list[RolloutGroup]:
        """K samples of all passes for each prompt of this rank's engine; [] on a rank that does not hold them.
        Collective.

        Args:
            on_group: takes each group of this rank's engine as soon as it is complete, while others still run; on the
                ranks that hold them.
            on_question: takes what an endpoint is to be asked, on the same ranks.
            on_first: takes each sample when its first pass is done, as a group of one pair, on the same ranks.

        Raises:
            ValueError: before anything is submitted, and on every rank: a prompt does not fit the engine.
            ValueError: on every rank, before the first answers: the engine sees other pixels than the trainer.
            ValueError: the engine expanded a prompt otherwise than the processor.
            EngineFault: on every rank: an engine failed again after MAX_RESTARTS restarts, or it had been updated and
                cannot be refilled. On one rank: it failed alone among the ranks of its engine.
        """
        assert sampling.max_response_tokens <= self._planner.limits.max_response, "more than the plans leave room for"
        own = prompts.own.values()
        refused = self._engines.gather(
            [text for prompt in own for text in self._planner.refusals(prompt, sampling.passes_of(prompt))]
        )
        if refused:
            raise ValueError("\n".join(sorted(set(refused))))
        if not self._compared:
            with_images = [prompt for prompt in own if prompt.images][:NUM_COMPARED]
            self._compare_pixels(with_images, sampling)
        self._give_weights(sampling)
        takers = (on_group, on_question, on_first) if self._hands_on else (None, None, None)
        begins, pool = self._shared(prompts, sampling)
        requests = PassRequests(self._planner, begins, sampling, step, *takers, **self._how(sampling), pool=pool)
        self._answer(requests, sampling)
        return requests.groups() if self._hands_on else []

    def stream(
        self,
        prompts: PromptShare,
        sampling: Sampling,
        step: int,
        on_group: Callable[[RolloutGroup], None],
        on_question: OnQuestion | None = None,
    ) -> None:
        """Answers the prompts of all engines without holding them: each is read when a slot gets free for it, and
        forgotten when its group is complete. No engine waits for another before the last. Collective.

        Args:
            prompts: with the places of each engine's in `shares`, and `read`, which gives None for a prompt that is
                passed over. What `own` has is not read again.
            on_group, on_question: as in `generate`.

        Raises: as `generate`, but for prompts that do not fit; and on this rank alone what `read`, `on_group` and
            `on_question` raise.
        """
        assert self._slots > 0, "prompts are taken as slots get free"
        read, own = reads(prompts), prompts.shares[self._engines.rank]
        if not self._compared:
            found = [prompt for place in own[:NUM_COMPARED] if (prompt := read(place)) is not None and prompt.images]
            self._compare_pixels(found, sampling)
        self._give_weights(sampling)
        order, draw = list(own), itertools.count().__next__
        if self._counter is not None and len(prompts.shares) > 1:
            self._begin_counter(self._counter)
            order, draw = in_turn(prompts), self._counter.next
        pool = PromptPool(order, draw, read, self._decoding, ahead=DECODED_AHEAD)
        begins = PromptShare(prompts.keys, {})
        takers = (on_group, on_question) if self._hands_on else (None, None)
        how = {**self._how(sampling), "pool": pool, "keeps": False}
        self._answer(PassRequests(self._planner, begins, sampling, step, *takers, **how), sampling)

    def _how(self, sampling: Sampling) -> dict[str, Any]:
        holds = self._start_weights is not None and any(later.reader == "reference" for later in sampling.later)
        return {"streamed": self._streamed, "holds_reference": holds, "slots": self._slots}

    def _answer(self, requests: PassRequests, sampling: Sampling) -> None:
        """All passes. Collective."""
        self._run(requests)
        if any(later.context == "other_description" for later in sampling.later):
            requests.lend(self._engines.gather(requests.descriptions() if self._hands_on else []))
            self._run(requests)
        if requests.holds_reference:
            self._replace()
            requests.release_reference()
            self._run(requests)

    def _shared(self, prompts: PromptShare, sampling: Sampling) -> tuple[PromptShare, PromptPool | None]:
        """What this engine begins with, and what is left for whoever is free."""
        if self._counter is None or len(prompts.shares) < 2:
            return prompts, None
        self._begin_counter(self._counter)
        count = -(-self._slots // sampling.num_samples)
        pool = PromptPool(in_turn(prompts, count), self._counter.next, reads(prompts), self._decoding)
        return begun(prompts, self._engines.rank, count), pool

    def _begin_counter(self, counter: Counter) -> None:
        self._num_shared += 1
        counter.begin(f"{self._num_shared}")

    def _compare_pixels(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Raises ValueError on every rank where pixels differ, see `pixel_differences`. Collective."""
        differences = self.pixel_differences(prompts, sampling)
        if differences:
            raise ValueError("\n".join(differences))
        self._compared = True

    def _run(self, requests: PassRequests) -> None:
        """Answers everything; where an engine fails all of them restart, as engines are made together. Collective."""
        faults = self._attempt(requests)
        for _ in range(MAX_RESTARTS):
            if not faults:
                return
            logger.warning("restarting the engines, %d requests are open here: %s", requests.num_open, faults[0])
            self._restart()
            faults = self._attempt(requests)
        if not faults:
            return
        raise EngineFault(f"the engine failed {MAX_RESTARTS + 1} times in one batch of rollouts, last with {faults[0]}")

    def _attempt(self, requests: PassRequests) -> list[str]:
        """The faults of all engines. Collective."""
        faults: list[str] = []
        try:
            requests.run(self._engine)
        except EngineFault as fault:
            # as text: the traceback would hold what the engine holds, and keep its memory from the next one
            logger.warning("an engine failed: %s", "".join(traceback.format_exception(fault)))
            self._engine.meet_after_fault(requests.num_open)
            faults = [str(fault)]
        if requests.is_stream:
            self._patience()
        return self._engines.gather(faults)

    def _replace(self) -> None:
        """The engine reads with the weights of the start, as version 0, until it gets others. Collective."""
        assert self._start_weights is not None
        self._replaced = self._engine.weight_version
        self._engine.update_weights(self._start_weights(), 0)

    def _give_weights(self, sampling: Sampling) -> None:
        """The engine gets the weights that are to answer, where it has others. Collective."""
        if sampling.reader == "policy" or self._start_weights is None:
            self._take_back()
        elif self._replaced is None:
            self._replace()

    def _take_back(self) -> None:
        """The engine writes with the policy's weights again. Collective."""
        if self._replaced is None:
            return
        assert self._weights is not None, "only a policy that is trained has other weights than those of the start"
        version, self._replaced = self._replaced, None
        self._engine.update_weights(self._weights(), version)

    def _restart(self) -> None:
        version = self._engine.weight_version
        self._engine.restart()
        if self._replaced is not None:
            assert self._start_weights is not None
            self._engine.update_weights(self._start_weights(), 0)
        elif self._weights is not None:
            self._engine.update_weights(self._weights(), version)
        elif version != self._engine.weight_version:
            raise EngineFault(
                f"the engine had weights of version {version} and was restarted with those of its model directory; it "
                "cannot be refilled, as this generator was made without `weights`."
            )
