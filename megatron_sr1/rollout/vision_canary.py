"""A canary: do new vision weights reach the images the engine has already seen, and does it wake as it fell asleep?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from megatron_sr1.processor import Processor
from megatron_sr1.rollout.request import Draw, TokenEngine

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_NUM_TOKENS = 4
VISION_PREFIXES = ("visual.", "model.visual.")  # as saved today, and as the module tree names them


def stale_vision_canary(
    engine: TokenEngine,
    processor: Processor,
    image: Image,
    weights: Callable[[], Iterable[tuple[str, Tensor]]],
) -> None:
    """As `canary_complaints`, which says what this is about.

    Raises:
        RuntimeError: there is one.
    """
    for complaint in canary_complaints(engine, processor, image, weights):
        raise RuntimeError(complaint)


def canary_complaints(
    engine: TokenEngine,
    processor: Processor,
    image: Image,
    weights: Callable[[], Iterable[tuple[str, Tensor]]],
) -> list[str]:
    """Run once at start-up, before the engine has answered anything. Leaves the engine with the weights it was given,
    at the version it had.

    Caches keyed by the image alone (embeddings, KV prefixes) survive a careless weight update, and the policy then
    looks at images through old eyes without any error. So: greedy log-probs of one image prompt are taken, again with
    the vision weights scrambled, and again with the true weights, for which the engine is put to sleep and woken. The
    second must differ, the third equal the first.

    Args:
        weights: streams the engine's present weights by checkpoint name; called twice.

    Returns:
        A line where the scrambled weights changed nothing, and one where the true ones did not bring the first result
        back.
    """
    version = engine.weight_version
    before = _look(engine, processor, image, "before")
    engine.update_weights(_scrambled(weights()), version)
    scrambled = _look(engine, processor, image, "scrambled")
    engine.sleep()
    engine.update_weights(weights(), version)
    after = _look(engine, processor, image, "after")
    found = []
    if scrambled == before:
        found.append(
            "the engine gave the same log-probs after its vision weights were scrambled: it serves stale image "
            f"embeddings, or the streamed weights hold no name starting with {' or '.join(VISION_PREFIXES)}."
        )
    if after != before:
        found.append(
            "the engine's log-probs did not return when its weights were restored: the streamed weights are not the "
            "ones it was loaded from, a cache was not reset, or it did not wake whole: try rollout.sleep=false."
        )
    return found


def _look(engine: TokenEngine, processor: Processor, image: Image, name: str) -> tuple[object, ...]:
    encoded = processor.encode_image(image)
    ids = processor.expand(processor.prompt_ids("?", num_images=1), [encoded.grid_thw])
    prepared = engine.prepare(ids, [encoded])
    draw = Draw(
        temperature=0.0,
        max_tokens=_NUM_TOKENS,
        seed=0,
        end_of_turn_id=processor.end_of_turn_id,
        banned_ids=processor.media_ids,
    )
    engine.add(f"canary/{name}", prepared, draw)
    finished = []
    while engine.has_unfinished():
        finished += engine.step()
    (generation,) = finished
    return generation.response_ids, generation.logprobs


def _scrambled(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        yield name, tensor.flip(0) if name.startswith(VISION_PREFIXES) else tensor
