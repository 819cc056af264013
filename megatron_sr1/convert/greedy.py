"""Does transformers, given an exported model, answer as the run's own engine did?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForImageTextToText

from megatron_sr1.processor import Processor
from megatron_sr1.types import RolloutGroup


@torch.no_grad()
def compare_greedy(hf_dir: str, answers: Sequence[RolloutGroup]) -> None:
    """Generates each group's first pass greedily with transformers and compares the ids.

    Raises:
        ValueError: an answer differs; the message names the sample and both texts.
    """
    processor = Processor.from_pretrained(hf_dir)
    model = AutoModelForImageTextToText.from_pretrained(hf_dir, dtype=torch.float32).eval()
    banned = [[token] for token in processor.media_ids]
    for group in answers:
        expected = group.pairs[0].first
        ids = torch.tensor([expected.prompt_ids])
        images = [processor.encode_image(image) for image in group.prompt.images]
        vision = {}
        if images:
            vision = {
                "pixel_values": torch.cat([image.pixel_values for image in images]),
                "image_grid_thw": torch.tensor([image.grid_thw for image in images]),
                "mm_token_type_ids": (ids == processor.image_token_id).int(),
            }
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=len(expected.response_ids),
            eos_token_id=processor.end_of_turn_id,
            pad_token_id=processor.end_of_turn_id,
            bad_words_ids=banned,
            **vision,
        )
        found = tuple(output[0, ids.shape[1] :].tolist())
        if found != expected.response_ids:
            raise ValueError(
                f"{hf_dir}: transformers answers sample {group.prompt.key!r} with {processor.decode(found)!r}, the "
                f"engine of the run with {processor.decode(expected.response_ids)!r}. The export does not hold the "
                "policy."
            )
