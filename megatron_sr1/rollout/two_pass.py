"""Both passes of Vision-SR1 over one engine per rank, the second pass streamed.

The moment a first pass ends, its description is cut out and the second-pass request joins the requests that still run.
A global barrier between the passes would leave the engine idle behind the longest first pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from megatron_sr1.processing import Processor
from megatron_sr1.prompts import find_description
from megatron_sr1.rollout.plan import PassPrompt, check_same_ids, cut_description, plan_first, plan_second, refusal
from megatron_sr1.rollout.request import Draw, Generation, TokenEngine
from megatron_sr1.rollout.seeds import request_seed
from megatron_sr1.types import Prompt, Rollout, RolloutGroup, RolloutPair, Sampling

if TYPE_CHECKING:
    from torch import Tensor

Gather = Callable[[list[Any]], list[Any]]


class TwoPassGenerator:
    """Implements `types.Generator`: prompts are dealt out to the ranks, all ranks get all groups."""

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
    ) -> None:
        """
        Args:
            max_description_tokens: a longer description is cut before the second pass.
            gather: gives every rank the concatenation of all ranks' lists, in any order; for one rank the list itself.
            streamed: False starts the second pass when the whole first pass is done; the tokens are the same.
        """
        self._engine = engine
        self._processor = processor
        self._max_description_tokens = max_description_tokens
        self._rank = rank
        self._num_ranks = num_ranks
        self._gather = gather
        self._streamed = streamed

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._engine.update_weights(weights, version)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> list[RolloutGroup]:
        """K samples of both passes for each prompt, in the order of `prompts`. Collective.

        Raises:
            ValueError: before anything is submitted, and on every rank: a prompt does not fit the engine.
            ValueError: the engine expanded a prompt otherwise than the processor.
        """
        share = range(self._rank, len(prompts), self._num_ranks)  # dealt out in turn: shares differ by one at most
        plans = {group: plan_first(self._processor, prompts[group], sampling.template) for group in share}
        refusals = self._gather(
            [text for group in share for text in self._refusals(prompts[group], plans[group], sampling)]
        )
        if refusals:
            raise ValueError("\n".join(sorted(refusals)))
        passes = _Passes(self._engine, self._processor, sampling, step, self._max_description_tokens, self._streamed)
        mine = passes.run({group: (prompts[group], plan) for group, plan in plans.items()})
        pairs = dict(self._gather(list(mine.items())))  # without the prompts: their images are on every rank already
        return [RolloutGroup(group, prompt, pairs[group]) for group, prompt in enumerate(prompts)]

    def _refusals(self, prompt: Prompt, first: PassPrompt, sampling: Sampling) -> list[str]:
        limits = (sampling.max_response_tokens, self._engine.max_model_tokens)
        texts = [refusal(first, *limits)]
        if sampling.second_pass:
            shortest = plan_second(self._processor, prompt, description="")
            texts.append(refusal(shortest, *limits, reserved=self._max_description_tokens))
        return [text for text in texts if text is not None]


class _Passes:
    """The requests of one call on one rank."""

    def __init__(
        self,
        engine: TokenEngine,
        processor: Processor,
        sampling: Sampling,
        step: int,
        max_description_tokens: int,
        streamed: bool,
    ) -> None:
        self._engine = engine
        self._processor = processor
        self._sampling = sampling
        self._step = step
        self._max_description_tokens = max_description_tokens
        self._streamed = streamed
        self._running: dict[str, tuple[int, int, PassPrompt]] = {}  # request id -> group, sample, what was asked
        self._waiting: list[tuple[int, int, PassPrompt]] = []  # second passes behind the barrier
        self._first: dict[tuple[int, int], Rollout] = {}
        self._second: dict[tuple[int, int], Rollout] = {}
        self._descriptions: dict[tuple[int, int], str] = {}

    def run(self, firsts: dict[int, tuple[Prompt, PassPrompt]]) -> dict[int, tuple[RolloutPair, ...]]:
        samples = range(self._sampling.num_samples)
        for group, (_, plan) in firsts.items():
            prepared = self._engine.prepare(plan.ids, plan.images)
            for sample in samples:
                self._submit(group, sample, plan, prepared)
        while self._engine.has_unfinished():
            for generation in self._engine.step():
                group, sample, plan = self._running.pop(generation.request_id)
                self._finish(group, sample, plan, generation, firsts[group][0])
            if self._waiting and not self._running:
                for group, sample, plan in self._waiting:
                    self._submit(group, sample, plan, self._engine.prepare(plan.ids, plan.images))
                self._waiting.clear()
        return {group: tuple(self._pair(group, sample) for sample in samples) for group in firsts}

    def _submit(self, group: int, sample: int, plan: PassPrompt, prepared: object) -> None:
        request_id = f"{group}/{sample}/{plan.pass_name}"
        draw = Draw(
            temperature=self._sampling.temperature,
            max_tokens=self._sampling.max_response_tokens,
            seed=request_seed(self._sampling.seed, self._step, plan.key, sample, plan.pass_name),
            end_of_turn_id=self._processor.end_of_turn_id,
            banned_ids=self._processor.media_ids,
        )
        self._engine.add(request_id, prepared, draw)
        self._running[request_id] = (group, sample, plan)

    def _finish(self, group: int, sample: int, plan: PassPrompt, generation: Generation, prompt: Prompt) -> None:
        check_same_ids(plan, generation.prompt_ids)
        rollout = self._rollout(sample, plan, generation)
        if plan.pass_name == "second":
            self._second[group, sample] = rollout
            return
        self._first[group, sample] = rollout
        description = find_description(rollout.response_text) if self._sampling.second_pass else None
        if description is None:
            return
        description = cut_description(self._processor, description, self._max_description_tokens)
        self._descriptions[group, sample] = description
        second = plan_second(self._processor, prompt, description)
        text = refusal(second, self._sampling.max_response_tokens, self._engine.max_model_tokens)
        if text is not None:
            raise ValueError(text)
        if self._streamed:
            self._submit(group, sample, second, self._engine.prepare(second.ids, second.images))
        else:
            self._waiting.append((group, sample, second))

    def _rollout(self, sample: int, plan: PassPrompt, generation: Generation) -> Rollout:
        stopped = generation.finish_reason == "stop"
        text_ids = generation.response_ids[:-1] if stopped else generation.response_ids
        return Rollout(
            rollout_id=f"{self._step}/{plan.key}/{sample}/{plan.pass_name}",
            prompt_ids=generation.prompt_ids,
            response_ids=generation.response_ids,
            response_text=self._processor.decode(text_ids),
            generator_logprobs=generation.logprobs,
            finish_reason=generation.finish_reason,
            weight_version=self._engine.weight_version,
        )

    def _pair(self, group: int, sample: int) -> RolloutPair:
        place = (group, sample)
        return RolloutPair(sample, self._first[place], self._second.get(place), self._descriptions.get(place))
