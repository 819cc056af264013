"""Where the images of one sequence are, and the multimodal rotary positions (mRoPE) of its tokens.

    text token    (p, p, p), p counts on by 1
    image token   (p, p + row, p + column) in the grid of merged patches; then p advances by max(rows, columns)

Source: Qwen2-VL, arXiv 2409.12191, section 2.1; transformers, `Qwen2_5_VLModel.get_rope_index`. Positions belong to a
sequence, never to a packed row: they are computed before packing and start at 0 in each sequence.

    n  tokens of the sequence, prompt and response
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sr1.types import TokenSequence


def num_visual_tokens(grid_thw: tuple[int, int, int], merge_size: int) -> int:
    """Rows that the vision tower gives for one image.

    Raises:
        ValueError: the grid is no still image, or does not divide into merged patches.
    """
    time, height, width = grid_thw
    if time != 1 or height % merge_size or width % merge_size or height * width == 0:
        raise ValueError(
            f"image grid (time, height, width) = {grid_thw} is not allowed: time must be 1, height and width positive "
            f"multiples of merge_size={merge_size}. Encode the image with the model's own processor."
        )
    return height * width // merge_size**2


def image_starts(sequence: TokenSequence, *, image_token_id: int, merge_size: int) -> list[int]:
    """Position in the prompt of the first token of each image.

    Image ids in the response, or anywhere in a sequence without images, are text and are not looked at.

    Raises:
        ValueError: the image ids of the prompt are not one run of the right length per image.
    """
    if not sequence.images:
        return []
    places = [place for place, token in enumerate(sequence.prompt_ids) if token == image_token_id]
    sizes = [num_visual_tokens(image.grid_thw, merge_size) for image in sequence.images]
    if len(places) != sum(sizes):
        raise ValueError(
            f"the prompt has {len(places)} image tokens for {len(sizes)} images of {sizes} visual tokens; they must "
            "be as many. Build the prompt with Processor.prompt_ids and Processor.expand."
        )
    starts, taken = [], 0
    for number, size in enumerate(sizes):
        start, end = places[taken], places[taken + size - 1]
        if end - start != size - 1:
            raise ValueError(
                f"image {number} needs {size} image tokens in one run; the prompt spreads them over positions "
                f"{start} to {end}. Give the images in the order of their placeholders."
            )
        starts.append(start)
        taken += size
    return starts


def mrope_positions(sequence: TokenSequence, *, image_token_id: int, merge_size: int, num_pad: int = 0) -> Tensor:
    """Positions of prompt and response: [3, n + num_pad] int64, rows time, height, width.

    Padding is counted on as text would be.

    Raises:
        ValueError: images and image ids do not fit together (see `image_starts`).
    """
    starts = image_starts(sequence, image_token_id=image_token_id, merge_size=merge_size)
    num_tokens = len(sequence.prompt_ids) + len(sequence.response_ids) + num_pad
    pieces: list[Tensor] = []
    token, position = 0, 0  # the first token without a position, and the position it gets
    for start, image in zip(starts, sequence.images, strict=True):
        pieces.append(_text(position, start - token))
        position += start - token
        rows, columns = image.grid_thw[1] // merge_size, image.grid_thw[2] // merge_size
        pieces.append(_image(position, rows, columns))
        position += max(rows, columns)
        token = start + rows * columns
    pieces.append(_text(position, num_tokens - token))
    return torch.cat(pieces, dim=1)


def _text(position: int, num_tokens: int) -> Tensor:
    return torch.arange(position, position + num_tokens).expand(3, num_tokens)


def _image(position: int, rows: int, columns: int) -> Tensor:
    row = torch.arange(rows).repeat_interleave(columns)
    column = torch.arange(columns).repeat(rows)
    return torch.stack([torch.zeros_like(row), row, column]) + position
