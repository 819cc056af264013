"""The requests of one call on one engine: first passes, the later passes of each as they become possible, whole groups.

Where requests wait for a slot, every first pass goes before every later pass: a first pass may be long and still has
others behind it, so the sooner it starts the shorter the tail, and the later passes fill the slots that the tail leaves
free. Among passes of one kind the groups go in order, so that whole groups come out early. In a stream, which forgets
groups, there is no tail before the end: what was taken first goes first, and nothing more is taken than slots are free.

A pass that reads what was said of another image waits until all first passes of all engines are done, so that who lends
the description depends on nothing but the prompts: the next one of the step whose image is another, and whose sample of
the same number has one. A pass that the starting weights read waits until the engine has them.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice

from megatron_sr1.data.shown import digest_of_images
from megatron_sr1.phases import during
from megatron_sr1.rollout.distortion import Distortion
from megatron_sr1.rollout.later import OpenReading, ask_later
from megatron_sr1.rollout.plan import PassPrompt, Planner, check_same_ids
from megatron_sr1.rollout.pool import PromptPool
from megatron_sr1.rollout.request import Draw, EngineFault, Generation, TokenEngine
from megatron_sr1.rollout.seeds import request_seed
from megatron_sr1.types import (
    SECOND,
    EncodedImage,
    LaterPass,
    OnQuestion,
    Prompt,
    PromptShare,
    Reading,
    Rollout,
    RolloutGroup,
    RolloutPair,
    Sampling,
)

SUBMITTED_AT_A_TIME = 64  # requests, between two steps of the engine: enough to fill it soon
PLANS_AT_A_TIME = 16  # of these requests, which wait for their images
PREPARED_AHEAD = 32  # plans whose images are begun; more would not be kept until they are submitted


@dataclass(frozen=True)
class _Request:
    group: int
    sample: int
    plan: PassPrompt
    asked: OpenReading | None = None  # of a later pass
    distorted: bool = False  # it sees noisy images

    @property
    def request_id(self) -> str:
        return f"{self.group}/{self.sample}/{self.plan.pass_name}"

    @property
    def place(self) -> tuple[int, int]:
        return self.group, self.sample

    @property
    def seen(self) -> tuple[int, bool]:
        """The same of requests that share a prompt and its images."""
        return id(self.plan), self.distorted


@dataclass(frozen=True)
class Described:
    """What a first pass has said of its image."""

    group: int
    sample: int
    text: str
    shown: str  # digest of the images


class PassRequests:
    """What has been asked for and what has come back; it outlives the engine that answers."""

    def __init__(
        self,
        planner: Planner,
        prompts: PromptShare,
        sampling: Sampling,
        step: int,
        on_group: Callable[[RolloutGroup], None] | None = None,
        on_question: OnQuestion | None = None,
        on_first: Callable[[RolloutGroup], None] | None = None,
        *,
        streamed: bool = True,
        holds_reference: bool = False,
        pool: PromptPool | None = None,
        slots: int = 0,
        keeps: bool = True,
    ) -> None:
        """
        Args:
            prompts: those that the engine begins with.
            on_group: takes each group as soon as its last pass is done.
            on_question: takes what an endpoint is to be asked as soon as it is known.
            on_first: takes each sample as soon as its first pass is done, as a group of one pair.
            streamed: False: the later passes start when the whole first pass is done.
            holds_reference: the passes of the starting weights wait for `release_reference`.
            pool: further prompts, which are taken while fewer than `slots` first passes are open.
            keeps: a group that `on_group` has taken is among `groups`; else it is forgotten, and prompts are taken
                while fewer than `slots` requests are open, of whichever pass.
        """
        self._planner = planner
        self._processor = planner.processor
        self._prompts: dict[int, Prompt] = {}
        self._shown: dict[int, str] = {}  # digests of images, by group, where they were asked for
        self._num_prompts = len(prompts.keys)
        self._sampling = sampling
        self._step = step
        self._distortion = Distortion(planner.processor, sampling, step)
        self._streamed = streamed
        self._on_group = on_group
        self._on_question = on_question
        self._on_first = on_first
        self.holds_reference = holds_reference
        self._keeps = keeps
        self._start = time.perf_counter()
        self._open: dict[str, _Request] = {}  # asked for, not answered
        self._lent: list[tuple[LaterPass, tuple[int, int]]] = []  # passes that read of another image, and whose
        self._held: list[_Request] = []  # for the starting weights
        self._first_draw = _first_draws(prompts.keys, sampling.num_samples)
        self._left: dict[int, int] = {}  # samples of each group that are not complete
        self._missing: dict[tuple[int, int], int] = {}  # answers of later passes that a sample waits for
        self._queued: dict[str, float] = {}
        self._pairs: dict[tuple[int, int], RolloutPair] = {}  # later passes may still be missing
        self._pool, self._slots = pool, slots
        self._turns: dict[int, int] = {}  # of the groups, as they were taken
        self._num_turns = 0
        for group, prompt in prompts.own.items():
            self._begin(group, prompt)

    @property
    def is_stream(self) -> bool:
        """Whether groups are forgotten."""
        return not self._keeps

    @property
    def num_open(self) -> int:
        """Requests that are known and unanswered."""
        return len(self._open) + len(self._held) + len(self._lent)

    def run(self, engine: TokenEngine) -> None:
        """Answers all that is open. After a fault, `run` on an engine that works goes on, to the same tokens.

        Raises:
            EngineFault: the engine failed; what it had finished before is kept.
            ValueError: the engine expanded a prompt otherwise than the processor, or a description that was cut to its
                limit became longer again as a part of the prompt, and too long for the engine.
        """
        waiting = self._possible()
        self._take_some(waiting)
        while waiting or engine.has_unfinished():
            self._submit_some(engine, waiting)
            with _engine_call(), during.marked(self._range):
                generations = engine.step()
            for generation in generations:
                further = self._finish(self._open.pop(generation.request_id), generation, engine)
                self._open |= {request.request_id: request for request in further}
                if self._streamed:
                    for request in further:
                        self._submit_all(engine, [request])
            self._take_some(waiting)
            if not self._streamed and not waiting and not engine.has_unfinished():
                waiting = self._possible()

    def _range(self) -> str:
        """What a profiler calls a step of the engine: that of first passes, while there are some in it."""
        firsts = any(request.asked is None for request in self._open.values())
        return "rollout/first" if firsts else "rollout/second"

    def descriptions(self) -> list[Described]:
        """What the responses of this engine describe."""
        pairs = self._pairs.items()
        return [
            Described(*place, pair.description, self._shown_by(place[0]))
            for place, pair in pairs
            if pair.description is not None
        ]

    def lend(self, everything: Sequence[Described]) -> None:
        """Those of all engines are known: `run` answers what has waited for them."""
        lent, self._lent = self._lent, []
        descriptions = {(one.group, one.sample): one for one in everything}
        for later, place in lent:
            self._open |= {request.request_id: request for request in self._borrow(later, place, descriptions)}

    def release_reference(self) -> None:
        """The engine has the starting weights now: `run` answers what has waited for them."""
        self._open |= {request.request_id: request for request in self._held}
        self._held = []

    def groups(self) -> list[RolloutGroup]:
        """Those of this engine, in order."""
        assert not self.num_open, "run() has not ended"
        return [RolloutGroup(group, self._prompts[group], self._group_pairs(group)) for group in sorted(self._left)]

    def _begin(self, group: int, prompt: Prompt) -> list[_Request]:
        """The first passes of a prompt are open from now on."""
        plan = self._planner.first(prompt, self._sampling.passes_of(prompt).template)
        noisy = self._distortion.samples(prompt)
        siblings = range(self._sampling.num_samples)
        requests = [_Request(group, sample, plan, distorted=sample in noisy) for sample in siblings]
        self._prompts[group] = prompt
        self._turns[group] = self._num_turns
        self._num_turns += 1
        self._left[group] = self._sampling.num_samples
        self._open |= {request.request_id: request for request in requests}
        return requests

    def _take_some(self, waiting: deque[list[_Request]]) -> None:
        """Begins prompts of the pool while first passes do not fill the slots, as many as are submitted at a time.
        Later passes do not count where, among requests that wait, first passes go before them."""
        if self._pool is None:
            return
        num_open = sum(request.asked is None or not self._keeps for request in self._open.values())
        num_waiting = sum(map(len, waiting))
        while num_open < self._slots and num_waiting < SUBMITTED_AT_A_TIME:
            taken = self._pool.take()
            if taken is None:
                return
            requests = self._begin(*taken)
            waiting.extend(_by_what_they_see(requests))
            num_open, num_waiting = num_open + len(requests), num_waiting + len(requests)

    def _draw(self, place: tuple[int, int]) -> int:
        return self._first_draw[place[0]] + place[1]

    def _possible(self) -> deque[list[_Request]]:
        """Everything that is open, or behind a barrier the first passes alone while there are some; those together that
        share a prompt and its images."""
        requests = list(self._open.values())
        firsts = [request for request in requests if request.asked is None]
        return deque(_by_what_they_see(firsts if firsts and not self._streamed else requests))

    def _submit_some(self, engine: TokenEngine, waiting: deque[list[_Request]]) -> None:
        """The next ones, so that the engine decodes while images are prepared. How many does not depend on what is
        ready: the ranks of an engine must submit the same before a step."""
        for first, *_ in islice(waiting, PREPARED_AHEAD):
            for image in self._images(first):
                image.patches.start()
        submitted = plans = 0
        while waiting and submitted < SUBMITTED_AT_A_TIME and plans < PLANS_AT_A_TIME:
            requests = waiting.popleft()
            self._submit_all(engine, requests)
            submitted, plans = submitted + len(requests), plans + 1

    def _submit_all(self, engine: TokenEngine, requests: Sequence[_Request]) -> None:
        """Requests of one plan, which share its images."""
        images = self._images(requests[0], last=True)
        with _engine_call():
            prepared = engine.prepare(requests[0].plan.expanded_ids, images)
        for request in requests:
            self._submit(engine, request, prepared)

    def _images(self, request: _Request, *, last: bool = False) -> list[EncodedImage]:
        """What a request sees. `last`: nobody asks again; noisy images would be made anew, to the same bits."""
        if request.distorted:
            of_prompt = self._distortion.take if last else self._distortion.begin
            return of_prompt(request.plan, self._first_draw[request.group])
        return [self._processor.encode_image(image) for image in request.plan.images]

    def _submit(self, engine: TokenEngine, request: _Request, prepared: object) -> None:
        plan = request.plan
        draw = Draw(
            temperature=self._sampling.temperature,
            max_tokens=self._sampling.max_response_tokens,
            seed=request_seed(self._sampling.seed, self._step, plan.key, self._draw(request.place), plan.pass_name),
            end_of_turn_id=self._processor.end_of_turn_id,
            banned_ids=self._processor.media_ids,
            priority=self._priority(request),
        )
        self._queued.setdefault(request.request_id, time.perf_counter() - self._start)
        with _engine_call():
            engine.add(request.request_id, prepared, draw)

    def _priority(self, request: _Request) -> int:
        """The lowest goes first."""
        if not self._keeps:
            return self._turns[request.group]
        return request.group + (0 if request.asked is None else self._num_prompts)

    def _finish(self, request: _Request, generation: Generation, engine: TokenEngine) -> list[_Request]:
        """Notes the answer; returns the requests that it makes possible."""
        check_same_ids(request.plan, generation.prompt_ids)
        rollout = self._rollout(request, generation, engine.weight_version)
        if request.asked is not None:
            self._read(request.place, request.asked, rollout)
            return []
        return self._after_first(request, rollout)

    def _after_first(self, request: _Request, rollout: Rollout) -> list[_Request]:
        prompt, place = self._prompts[request.group], request.place
        passes = self._sampling.passes_of(prompt)
        later = passes.later
        # a response that was cut short is no complete first pass, whatever it has described by then
        whole = rollout.finish_reason == "stop"
        written = self._planner.template(passes.template).find_description(rollout.response_text) if whole else None
        description = None if written is None else self._planner.cut(written)
        is_cut, distorted = description != written, request.distorted
        self._pairs[place] = RolloutPair(request.sample, rollout, None, description, is_cut, distorted=distorted)
        if self._on_first is not None:
            self._on_first(RolloutGroup(request.group, prompt, (self._pairs[place],)))
        self._missing[place] = 1  # until all have been asked
        further: list[_Request] = []
        for one in later:
            if one.context == "other_description":
                self._lent.append((one, place))
                self._missing[place] += one.samples
            elif one.context != "description":
                further += self._ask(one, place, self._planner.given(prompt, one))
            elif description is not None:
                further += self._ask(one, place, description)
        self._answered(place)
        return further

    def _ask(self, later: LaterPass, place: tuple[int, int], text: str | None) -> list[_Request]:
        """The requests of a later pass that the engine can take now; an endpoint is asked, others are held."""
        (group, sample), prompt = place, self._prompts[place[0]]
        passes, requests = self._sampling.passes_of(prompt), []
        for asked in ask_later(later, prompt, text):
            if later.reader == "endpoint":
                if self._on_question is not None:
                    name = f"{self._step}/{prompt.key}/{self._draw(place)}/{later.name_of(asked.number)}"
                    empty = Rollout(name, (), (), "", (), "stop", 0)
                    reading = Reading(later.name, asked.number, empty, asked.context, asked.question)
                    self._on_question(group, sample, self._planner.question(prompt, passes, asked), reading)
                continue
            requests.append(_Request(group, sample, self._planner.later(prompt, passes, asked), asked))
            self._missing[place] += 1
        if later.reader == "reference" and self.holds_reference:
            self._held += requests
            return []
        return requests

    def _borrow(
        self, later: LaterPass, place: tuple[int, int], descriptions: Mapping[tuple[int, int], Described]
    ) -> list[_Request]:
        """The requests of a pass that reads what was said of another image; none where nobody else has said a thing."""
        group, sample = place
        others = chain(range(group + 1, self._num_prompts), range(group))
        said = (descriptions[other, sample] for other in others if (other, sample) in descriptions)
        own = self._shown_by(group)
        lender = next((one for one in said if one.shown != own), None)
        requests = [] if lender is None else self._ask(later, place, lender.text)
        for _ in range(later.samples):
            self._answered(place)
        return requests

    def _shown_by(self, group: int) -> str:
        if group not in self._shown:
            self._shown[group] = digest_of_images(self._prompts[group].images)
        return self._shown[group]

    def _read(self, place: tuple[int, int], asked: OpenReading, rollout: Rollout) -> None:
        pair, name = self._pairs[place], asked.later.name
        if name == SECOND.name and asked.number == 0:
            self._pairs[place] = replace(pair, second=rollout)
        else:
            reading = Reading(name, asked.number, rollout, asked.context, asked.question)
            self._pairs[place] = replace(pair, further=(*pair.further, reading))
        self._answered(place)

    def _answered(self, place: tuple[int, int]) -> None:
        """One thing less that a sample waits for; the last one completes it, and perhaps its group."""
        self._missing[place] -= 1
        if self._missing[place]:
            return
        pair, group = self._pairs[place], place[0]
        order = {one.name: index for index, one in enumerate(self._sampling.later)}
        further = sorted(pair.further, key=lambda reading: (order[reading.pass_name], reading.number))
        self._pairs[place] = replace(pair, further=tuple(further))
        self._left[group] -= 1
        if self._left[group]:
            return
        if self._on_group is not None:
            self._on_group(RolloutGroup(group, self._prompts[group], self._group_pairs(group)))
        if not self._keeps:
            self._forget(group)

    def _forget(self, group: int) -> None:
        del self._prompts[group], self._left[group], self._turns[group]
        self._shown.pop(group, None)
        for sample in range(self._sampling.num_samples):
            del self._pairs[group, sample], self._missing[group, sample]

    def _group_pairs(self, group: int) -> tuple[RolloutPair, ...]:
        return tuple(self._pairs[group, sample] for sample in range(self._sampling.num_samples))

    def _rollout(self, request: _Request, generation: Generation, weight_version: int) -> Rollout:
        stopped = generation.finish_reason == "stop"
        text_ids = generation.response_ids[:-1] if stopped else generation.response_ids
        return Rollout(
            rollout_id=f"{self._step}/{request.plan.key}/{self._draw(request.place)}/{request.plan.pass_name}",
            prompt_ids=generation.prompt_ids,
            response_ids=generation.response_ids,
            response_text=self._processor.decode(text_ids),
            generator_logprobs=generation.logprobs,
            finish_reason=generation.finish_reason,
            weight_version=weight_version,
            experts=self._experts(request, generation),
            queued_at=self._queued.pop(request.request_id),
            finished_at=time.perf_counter() - self._start,
        )

    def _experts(self, request: _Request, generation: Generation) -> bytes:
        """See `Rollout`. Siblings share their first prompt: where it is sent is said once."""
        if not self._sampling.notes_experts:
            return b""
        num_prompt = len(generation.prompt_ids)
        token_bytes, rest = divmod(len(generation.experts), num_prompt + len(generation.response_ids) - 1)
        assert rest == 0 and token_bytes > 0, f"{len(generation.experts)} bytes of experts"
        brings_prompt = request.asked is not None or request.sample == 0
        return generation.experts if brings_prompt else generation.experts[num_prompt * token_bytes :]


def _by_what_they_see(requests: Sequence[_Request]) -> list[list[_Request]]:
    together: dict[tuple[int, bool], list[_Request]] = {}
    for request in requests:
        together.setdefault(request.seen, []).append(request)
    return list(together.values())


def _first_draws(keys: Sequence[str], num_samples: int) -> list[int]:
    """The number of each prompt's first draw in the step: one that comes again, as in a data set smaller than a step,
    goes on counting, or its responses would be the same once more."""
    seen: Counter[str] = Counter()
    first = []
    for key in keys:
        first.append(seen[key] * num_samples)
        seen[key] += 1
    return first


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
