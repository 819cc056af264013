"""Prompts with images as vLLM takes them when somebody else has prepared the images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch

from megatron_sr1.types import EncodedImage


def prepared_prompt(prompt_ids: Sequence[int], images: Sequence[EncodedImage], image_token_id: int) -> Any:
    """What vLLM's own processing makes of a prompt and its pictures, from patches that exist.

    The patches stay bytes: vLLM's models normalise on the device. An image is known to the cache of KV prefixes and of
    embeddings by its content.

    Args:
        prompt_ids: with a run of `image_token_id` for each image.

    Raises:
        ValueError: there are not as many runs as images.
    """
    from transformers import BatchFeature
    from vllm.inputs.engine import mm_input
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange

    runs = _runs(prompt_ids, image_token_id)
    if len(runs) != len(images):
        raise ValueError(f"a prompt with {len(runs)} runs of image placeholders for {len(images)} images.")
    grids = torch.tensor([image.grid_thw for image in images])
    patches = [image.patches() for image in images]
    items = MultiModalKwargsItems.from_hf_inputs(
        BatchFeature({"pixel_values": torch.cat(patches), "image_grid_thw": grids}),
        {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", grids.prod(-1)),
            "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        },
    )
    hashes = [_name(image.grid_thw, values) for image, values in zip(images, patches, strict=True)]
    places = [PlaceholderRange(offset=start, length=stop - start) for start, stop in runs]
    return mm_input(list(prompt_ids), items, {"image": hashes}, {"image": places})


def _runs(prompt_ids: Sequence[int], token_id: int) -> list[tuple[int, int]]:
    """[start, stop) of every run of `token_id`."""
    runs, place = [], 0
    for is_image, tokens in groupby(prompt_ids, lambda token: token == token_id):
        start, place = place, place + len(list(tokens))
        if is_image:
            runs.append((start, place))
    return runs


def _name(grid: tuple[int, int, int], patches: torch.Tensor) -> str:
    digest = hashlib.blake2b(repr(grid).encode(), digest_size=32)
    digest.update(patches.numpy().data)
    return digest.hexdigest()
