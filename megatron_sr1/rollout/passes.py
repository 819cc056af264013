"""The requests of one call on one engine: first passes, the second pass of each as it becomes possible, whole groups.

Where requests wait for a slot, every first pass goes before every second pass: a first pass may be long and still has a
second behind it, so the sooner it starts the shorter the tail, and the second passes fill the slots that the tail
leaves free. Among passes of one kind the groups go in order, so that whole groups come out early.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice

from megatron_sr1.rollout.plan import PassPrompt, Planner, check_same_ids
from megatron_sr1.rollout.request import Draw, EngineFault, Generation, TokenEngine
from megatron_sr1.rollout.seeds import request_seed
from megatron_sr1.types import Prompt, Rollout, RolloutGroup, RolloutPair, Sampling

SUBMITTED_AT_A_TIME = 16  # requests, between two steps of the engine
PREPARED_AHEAD = 32  # plans whose images are begun; more would not be kept until they are submitted


@dataclass(frozen=True)
class _Request:
    group: int
    sample: int
    plan: PassPrompt

    @property
    def request_id(self) -> str:
        return f"{self.group}/{self.sample}/{self.plan.pass_name}"


class PassRequests:
    """What has been asked for and what has come back; it outlives the engine that answers."""

    def __init__(
        self,
        planner: Planner,
        prompts: Sequence[Prompt],
        groups: Sequence[int],
        sampling: Sampling,
        step: int,
        on_group: Callable[[RolloutGroup], None] | None = None,
        *,
        streamed: bool = True,
    ) -> None:
        """
        Args:
            groups: indices into `prompts` of those that this engine answers.
            on_group: takes each group as soon as its last pass is done.
            streamed: False: the second pass starts when the whole first pass is done.
        """
        self._planner = planner
        self._processor = planner.processor
        self._prompts = prompts
        self._sampling = sampling
        self._step = step
        self._streamed = streamed
        self._on_group = on_group
        self._start = time.perf_counter()
        samples = range(sampling.num_samples)
        plans = {group: planner.first(prompts[group], sampling.passes_of(prompts[group]).template) for group in groups}
        requests = [_Request(group, sample, plan) for group, plan in plans.items() for sample in samples]
        self._open = {request.request_id: request for request in requests}  # asked for, not answered
        self._left = dict.fromkeys(plans, sampling.num_samples)  # samples of each group that are not complete
        self._queued: dict[str, float] = {}
        self._pairs: dict[tuple[int, int], RolloutPair] = {}  # second passes may still be missing

    @property
    def num_open(self) -> int:
        """Requests that are known and unanswered."""
        return len(self._open)

    def run(self, engine: TokenEngine) -> None:
        """Answers all that is open. After a fault, `run` on an engine that works goes on, to the same tokens.

        Raises:
            EngineFault: the engine failed; what it had finished before is kept.
            ValueError: the engine expanded a prompt otherwise than the processor, or a description that was cut to its
                limit became longer again as a part of the prompt, and too long for the engine.
        """
        waiting = self._possible()
        while waiting or engine.has_unfinished():
            self._submit_some(engine, waiting)
            with _engine_call():
                generations = engine.step()
            for generation in generations:
                second = self._finish(self._open.pop(generation.request_id), generation, engine)
                if second is not None:
                    self._open[second.request_id] = second
                    if self._streamed:
                        self._submit_all(engine, [second])
            if not self._streamed and not waiting and not engine.has_unfinished():
                waiting = self._possible()

    def pairs(self) -> dict[int, tuple[RolloutPair, ...]]:
        """All samples of each group of this engine, in order."""
        assert not self._open, "run() has not ended"
        return {group: self._group_pairs(group) for group in self._left}

    def _possible(self) -> deque[list[_Request]]:
        """Everything that is open, or behind a barrier the first passes alone while there are some; the requests of a
        plan together."""
        requests = list(self._open.values())
        firsts = [request for request in requests if request.plan.pass_name == "first"]
        siblings: dict[int, list[_Request]] = {}
        for request in firsts if firsts and not self._streamed else requests:
            siblings.setdefault(id(request.plan), []).append(request)
        return deque(siblings.values())

    def _submit_some(self, engine: TokenEngine, waiting: deque[list[_Request]]) -> None:
        """The next ones, so that the engine decodes while images are prepared. How many does not depend on what is
        ready: the ranks of an engine must submit the same before a step."""
        for first, *_ in islice(waiting, PREPARED_AHEAD):
            for image in first.plan.images:
                self._processor.encode_image(image).patches.start()
        submitted = 0
        while waiting and submitted < SUBMITTED_AT_A_TIME:
            requests = waiting.popleft()
            self._submit_all(engine, requests)
            submitted += len(requests)

    def _submit_all(self, engine: TokenEngine, requests: Sequence[_Request]) -> None:
        """Requests of one plan, which share its images."""
        plan = requests[0].plan
        images = [self._processor.encode_image(image) for image in plan.images]
        with _engine_call():
            prepared = engine.prepare(plan.expanded_ids, images)
        for request in requests:
            self._submit(engine, request, prepared)

    def _submit(self, engine: TokenEngine, request: _Request, prepared: object) -> None:
        plan = request.plan
        draw = Draw(
            temperature=self._sampling.temperature,
            max_tokens=self._sampling.max_response_tokens,
            seed=request_seed(self._sampling.seed, self._step, plan.key, request.sample, plan.pass_name),
            end_of_turn_id=self._processor.end_of_turn_id,
            banned_ids=self._processor.media_ids,
            priority=request.group + (0 if plan.pass_name == "first" else len(self._prompts)),
        )
        self._queued.setdefault(request.request_id, time.perf_counter() - self._start)
        with _engine_call():
            engine.add(request.request_id, prepared, draw)

    def _finish(self, request: _Request, generation: Generation, engine: TokenEngine) -> _Request | None:
        """Notes the answer; returns the second pass that a first pass leads to."""
        check_same_ids(request.plan, generation.prompt_ids)
        rollout = self._rollout(request, generation, engine.weight_version)
        place = (request.group, request.sample)
        if request.plan.pass_name == "second":
            self._complete(replace(self._pairs[place], second=rollout), place)
            return None
        # a response that was cut short is no complete first pass, whatever it has described by then
        asked = self._sampling.passes_of(self._prompts[request.group])
        whole = rollout.finish_reason == "stop" and asked.second_pass
        written = self._planner.template(asked.template).find_description(rollout.response_text) if whole else None
        if written is None:
            self._complete(RolloutPair(request.sample, rollout, None, None), place)
            return None
        description = self._planner.cut(written)
        self._pairs[place] = RolloutPair(request.sample, rollout, None, description, description != written)
        plan = self._planner.second(self._prompts[request.group], asked.second_template, description)
        return replace(request, plan=plan)

    def _complete(self, pair: RolloutPair, place: tuple[int, int]) -> None:
        group = place[0]
        self._pairs[place] = pair
        self._left[group] -= 1
        if self._left[group] == 0 and self._on_group is not None:
            self._on_group(RolloutGroup(group, self._prompts[group], self._group_pairs(group)))

    def _group_pairs(self, group: int) -> tuple[RolloutPair, ...]:
        return tuple(self._pairs[group, sample] for sample in range(self._sampling.num_samples))

    def _rollout(self, request: _Request, generation: Generation, weight_version: int) -> Rollout:
        stopped = generation.finish_reason == "stop"
        text_ids = generation.response_ids[:-1] if stopped else generation.response_ids
        return Rollout(
            rollout_id=f"{self._step}/{request.plan.key}/{request.sample}/{request.plan.pass_name}",
            prompt_ids=generation.prompt_ids,
            response_ids=generation.response_ids,
            response_text=self._processor.decode(text_ids),
            generator_logprobs=generation.logprobs,
            finish_reason=generation.finish_reason,
            weight_version=weight_version,
            queued_at=self._queued[request.request_id],
            finished_at=time.perf_counter() - self._start,
        )


@contextmanager
def _engine_call() -> Iterator[None]:
    """Tells the engine's faults from ours. What is wrong with the input (ValueError) is no fault of the engine.

    vLLM runs in this process, so a fault is whatever its forward pass or its scheduler raises: torch's errors (out of
    memory among them) are RuntimeErrors, its own invariants AssertionErrors.
    """
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        raise EngineFault(f"{type(error).__name__}: {error}") from error
