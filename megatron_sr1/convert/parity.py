"""Do two checkpoints say the same? Log-probs and entropies of a small built-in batch, in any layout."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_sr1.config import Config
from megatron_sr1.packing import pack
from megatron_sr1.platform import Platform
from megatron_sr1.policy import Scorer
from megatron_sr1.processor import Processor
from megatron_sr1.types import MicroBatch, Scoring, TokenSequence

_QUESTION = "Which of these numbers is the largest: 17, 4 or 23? Look closely, then answer."
_ANSWER = "There are three numbers. The largest of 17, 4 and 23 is 23."
_SIZES = ((112, 84), (60, 140), (84, 56))  # width, height in pixels; none square, no two alike
_SAMPLES = {"text only": (), "one image": (0,), "several images": (0, 1, 2)}


@dataclass(frozen=True)
class Agreement:
    """How far two checkpoints are apart on one kind of sample."""

    sample: str
    num_tokens: int
    logprob_abs: float  # nats, largest difference
    logprob_rel: float  # largest difference over the largest value
    entropy_abs: float
    entropy_rel: float


def compare_scores(first: Config, second: Config, platform: Platform) -> list[Agreement]:
    """Builds a model for each configuration, one after the other, and scores the built-in batch. All ranks call it.

    The processor is the first one's: both score the same ids and images.

    Raises:
        ValueError: what `Policy` says about a configuration, or about its weights.
    """
    batches = built_in_batch(Processor.from_pretrained(first.model.hf_dir), first)
    results = [_scores(config, batches, platform) for config in (first, second)]
    agreements = []
    for number, sample in enumerate(_SAMPLES):
        (logprobs, entropy), (other_logprobs, other_entropy) = (result[number] for result in results)
        agreements.append(
            Agreement(
                sample,
                len(logprobs),
                *_apart(logprobs, other_logprobs),
                *_apart(entropy, other_entropy),
            )
        )
    return agreements


def built_in_batch(processor: Processor, config: Config) -> list[MicroBatch]:
    """One micro-batch for each kind of sample, in this order: text only, one image, several images."""
    images = [processor.encode_image(_picture(*size)) for size in _SIZES]
    answer = processor.response_ids(_ANSWER)
    batches = []
    for chosen in _SAMPLES.values():
        mine = tuple(images[number] for number in chosen)
        prompt = processor.expand(
            processor.prompt_ids(_QUESTION, num_images=len(mine)), [image.grid_thw for image in mine]
        )
        multiple = config.row_multiple
        batches += pack(
            [TokenSequence(prompt, answer, mine)],
            max_tokens=-(-config.model.max_position // multiple) * multiple,
            row_multiple=multiple,
            sequence_multiple=config.sequence_multiple,
            image_token_id=processor.image_token_id,
            merge_size=processor.merge_size,
        )
    return batches


def _picture(width: int, height: int) -> Image.Image:
    """Two slopes and a chequerboard: every patch differs from every other."""
    rows, columns = np.mgrid[0:height, 0:width]
    channels = (255 * rows / height, 255 * columns / width, 255 * ((rows // 12 + columns // 8) % 2))
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8), "RGB")


def _scores(config: Config, batches: list[MicroBatch], platform: Platform) -> list[tuple[Tensor, Tensor]]:
    scores = Scorer(config, platform).logprobs(batches, Scoring())
    return [(score.logprobs.double().cpu(), score.entropy.double().cpu()) for score in scores]


def _apart(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Largest difference, absolute and relative to the largest value. A value that is not finite counts as infinite."""
    if not (torch.isfinite(first).all() and torch.isfinite(second).all()):
        return float("inf"), float("inf")
    apart = float((first - second).abs().max())
    return apart, apart / max(float(first.abs().max()), torch.finfo(torch.float32).tiny)
