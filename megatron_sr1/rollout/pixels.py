"""Does the engine look at the pictures that the trainer looks at?

Token counts, which are compared for every request, do not show it: a picture on its side has as many.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_sr1.processor import Processor
from megatron_sr1.rollout.plan import PassPrompt, id_difference
from megatron_sr1.rollout.request import TokenEngine
from megatron_sr1.types import EncodedImage

TOLERANCE = 1e-3  # of a normalised value; a grey level of 8 bit is about 0.015


def pixel_differences(engine: TokenEngine, processor: Processor, plans: Sequence[PassPrompt]) -> list[str]:
    """Compares every prompt of `plans` as the engine by itself prepares it with the trainer's: its ids, and of every
    image the grid and every value of its patches, in their order.

    Returns:
        For each image that differs its sample's key, how it differs and what to look at; the same for other ids.
    """
    texts = []
    for plan in plans:
        view = engine.own_view(plan.ids, plan.images)
        if not texts and (text := id_difference(plan, view.prompt_ids)) is not None:
            texts.append(text)
        for number, (image, (grid, patches)) in enumerate(zip(plan.images, view.images, strict=True)):
            difference = _difference(processor.encode_image(image), grid, patches)
            if difference is not None:
                texts.append(
                    f"sample {plan.key!r}, image {number}: {difference}. Trainer and engine must see the same "
                    "picture: both read the model folder's preprocessor files, under model.min_pixels and "
                    "model.max_pixels, and images come upright and as RGB."
                )
    return texts


def _difference(ours: EncodedImage, grid: tuple[int, ...], patches: Tensor) -> str | None:
    if grid != ours.grid_thw:
        return f"the engine's grid (time, height, width) is {grid}, the trainer's {ours.grid_thw}: another size or turn"
    values = ours.pixel_values
    if values.shape != patches.shape:
        return f"the engine's patches are {tuple(patches.shape)}, the trainer's {tuple(values.shape)}"
    gap = (values - patches).abs().max().item()
    if gap <= TOLERANCE:
        return None
    if (values.flatten().sort().values - patches.flatten().sort().values).abs().max().item() <= TOLERANCE:
        return f"values differ by up to {gap:.3g}, but are the same in another order: another turn or order of patches"
    return f"values differ by up to {gap:.3g}: another resizing, image_mean, image_std or rescale_factor"
