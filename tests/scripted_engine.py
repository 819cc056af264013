"""An engine that answers from a script, and what it takes for a processor, prompts and a generator on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from megatron_sr1.ahead import Later
from megatron_sr1.data import IndexedSample
from megatron_sr1.ranks import Ranks
from megatron_sr1.rollout.balance import deal_prompts
from megatron_sr1.rollout.plan import Limits, Planner
from megatron_sr1.rollout.request import Draw, Generation, OwnView
from megatron_sr1.rollout.two_pass import TwoPassGenerator
from megatron_sr1.types import EncodedImage, Normalisation, Prompt, PromptShare, Sampling, Turn

EOT, IMAGE = 1, 2
PATCHES = torch.arange(24.0).reshape(12, 2)  # of every image
SEEN = "<description> a {} </description> <think> </think> \\boxed{{1}}"


class Picture:
    """All that a prompt's plan may know of an image: to read pixels would be an AttributeError."""

    size = (84, 28)


class Letters:
    """A processor whose text ids are code points; every image is three visual tokens."""

    end_of_turn_id = EOT
    media_ids = (IMAGE, 3)
    merge_size = 2
    num_frames = 1

    def turn_ids(self, turn: Turn, num_images: int) -> tuple[int, ...]:
        system = "" if turn.system is None else f"[{turn.system}]"
        return self.text_ids(system + turn.before) + (IMAGE,) * num_images + self.text_ids(turn.after)

    def prompt_ids(self, user_text: str, num_images: int) -> tuple[int, ...]:
        return self.turn_ids(Turn(user_text), num_images)

    def num_visual_tokens(self, size: tuple[int, int]) -> int:
        return math.prod(self.grid(size)) // self.merge_size**2

    def expand(self, prompt_ids: Sequence[int], grids: Sequence[Any]) -> tuple[int, ...]:
        return tuple(token for i in prompt_ids for token in ((i, i, i) if i == IMAGE else (i,)))

    def grid(self, size: tuple[int, int]) -> tuple[int, int, int]:
        assert size == Picture.size
        return 1, 2, 6

    def encode_image(self, image: Any) -> EncodedImage:
        return EncodedImage((1, 2, 6), Later(lambda: PATCHES.byte()), Normalisation(1.0, (0.0,), (1.0,)))

    def changed(self, image: EncodedImage, change: Callable[[torch.Tensor], torch.Tensor]) -> EncodedImage:
        return EncodedImage(image.grid_thw, Later(lambda: change(image.patches())), image.normalisation)

    def text_ids(self, text: str) -> tuple[int, ...]:
        return tuple(ord(letter) for letter in text)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids)


class ScriptedEngine:
    """Finishes one request per step, the latest first; the second pass says OK."""

    weight_version = 9
    sees = PATCHES

    def __init__(
        self, answer: Callable[[str], str] = lambda request_id: SEEN.format(request_id), limit: int = 1000
    ) -> None:
        self.max_model_tokens = limit
        self.log: list[str] = []
        self.draws: dict[str, Draw] = {}
        self.prompts: dict[str, str] = {}
        self._answer = answer
        self._queue: list[tuple[str, tuple[int, ...]]] = []

    def prepare(self, prompt_ids: Sequence[int], images: Sequence[Any]) -> object:
        self.log.append("prepare")
        return prompt_ids

    def own_view(self, prompt_ids: Sequence[int], images: Sequence[Any]) -> OwnView:
        self.log.append("own_view")
        seen = [(Letters().encode_image(image).grid_thw, self.sees) for image in images]
        return OwnView(Letters().expand(prompt_ids, images), seen)

    def add(self, request_id: str, prepared: Any, draw: Draw) -> None:
        self.log.append(f"add {request_id}")
        self.draws[request_id] = draw
        self.prompts[request_id] = Letters().decode(prepared)
        self._queue.append((request_id, prepared))

    def step(self) -> list[Generation]:
        request_id, prompt = self._queue.pop()
        self.log.append(f"end {request_id}")
        text = self._answer(request_id) if request_id.endswith("first") else "OK"
        ids = (*Letters().text_ids(text), EOT)
        return [Generation(request_id, prompt, ids, (-0.5,) * len(ids), "stop")]

    def has_unfinished(self) -> bool:
        return bool(self._queue)

    def update_weights(self, weights: Iterable[Any], version: int) -> None:
        self.weight_version = version
        self.log.append(f"weights {dict(weights)}")

    def sleep(self) -> None:
        self.log.append("sleep")

    def meet_after_fault(self, num_open: int) -> None:
        self.log.append(f"meet {num_open}")

    def restart(self) -> None:
        self.log.append("restart")
        self._queue.clear()
        self.weight_version = 0


def sampling(**changes: Any) -> Sampling:
    return Sampling(**({"num_samples": 2, "temperature": 1.0, "max_response_tokens": 90, "seed": 1} | changes))


def prompt(key: str, num_images: int = 1) -> Prompt:
    return Prompt(key, "How many?", "1", images=(Picture(),) * num_images)  # type: ignore[arg-type]


def planner(limit: int = 1000, max_description: int = 50) -> Planner:
    return Planner(Letters(), Limits(90, limit, max_description))  # type: ignore[arg-type]


def generator(engine: ScriptedEngine, max_description: int = 50, **changes: Any) -> TwoPassGenerator:
    return TwoPassGenerator(engine, planner(engine.max_model_tokens, max_description), **changes)


whole = PromptShare.whole


def known(prompt: Prompt) -> IndexedSample:
    """What an index would say of it."""
    kinds = ("json", *(f"{number}.png" for number in range(len(prompt.images))))
    sizes = tuple(image.size for image in prompt.images)
    return IndexedSample(prompt.key, kinds, (0,) * len(kinds), (len(prompt.problem), *(0 for _ in sizes)), sizes)


def dealt(prompts: Sequence[Prompt], how: Sampling, engines: Ranks) -> PromptShare:
    """Those of an engine, as the loop deals them out."""
    letters: Any = Letters()
    mine = deal_prompts(letters, how, [known(prompt) for prompt in prompts], engines.num_ranks)[engines.rank]
    return PromptShare([prompt.key for prompt in prompts], {place: prompts[place] for place in mine})
