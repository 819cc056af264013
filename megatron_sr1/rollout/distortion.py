"""Which siblings of a prompt are drawn from a noisy copy of its images, and the pixels of that copy.

The noise is that of the first n of 1,000 steps of forward diffusion (Ho et al. 2020, arXiv 2006.11239, eq. 4), with the
betas that visual contrastive decoding (arXiv 2311.16922) and, after it, NoisyRollout (arXiv 2504.13055) publish:

    x' = clip(sqrt(abar) x + sqrt(1 - abar) eps, 0, 1),  x grey levels over 255,  eps ~ N(0, 1)
    abar = product over i < n of (1 - beta_i),           n = round(1000 strength)
                                                         beta_i = 1e-5 + (5e-3 - 1e-5) sigmoid(-6 + 12 i / 999)

It is put on the image as the vision tower reads it, after resizing, so no resizing takes it away again, and the grid,
with it every token and position, is that of the image. The frames that a still image is repeated in have one noise. The
siblings that see the copy see the same one: the engine encodes it, and reads its prompt, once. It is a function of the
run's seed, the step, the prompt, its draw and the place of the image alone.

Shape legend: P patches, C values of a patch (channels x frames x pixels).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from megatron_sr1.processor import Processor
from megatron_sr1.rollout.plan import PassPrompt
from megatron_sr1.rollout.seeds import request_seed
from megatron_sr1.types import EncodedImage, Prompt, Sampling

STEPS = 1000  # of the whole diffusion, a strength of 1
_BETAS = (1e-5, 5e-3)  # the least and the largest


@cache
def kept_signal(num_steps: int) -> float:
    """abar: of the variance of what is seen, the share that is the image's."""
    low, high = _BETAS
    betas = (low + (high - low) / (1.0 + math.exp(6.0 - 12.0 * i / (STEPS - 1))) for i in range(num_steps))
    return math.prod(1.0 - beta for beta in betas)


def num_noise_steps(strength: float) -> int:
    """n."""
    return round(STEPS * strength)


def noisy(patches: Tensor, num_steps: int, channels: int, frames: int, drawn: Callable[[], torch.Generator]) -> Tensor:
    """[P, C] uint8, of patches [P, C] uint8."""
    signal = kept_signal(num_steps)
    pixels = patches.unflatten(1, (channels, frames, -1)).float() / 255.0
    noise = torch.randn(len(pixels), channels, 1, pixels.shape[-1], generator=drawn())
    seen = math.sqrt(signal) * pixels + math.sqrt(1.0 - signal) * noise
    return (seen.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).flatten(1)


class Distortion:
    """Of one call on a generator."""

    def __init__(self, processor: Processor, sampling: Sampling, step: int) -> None:
        distorted = sampling.distorted
        self._processor = processor
        self._seed, self._step, self._num_samples = sampling.seed, step, sampling.num_samples
        self._num_distorted = 0 if distorted is None else distorted.samples
        self._num_steps = 0 if distorted is None else num_noise_steps(distorted.at(step))
        self._made: dict[tuple[str, int], list[EncodedImage]] = {}  # begun, and not taken

    def samples(self, prompt: Prompt) -> range:
        """The siblings that see noise: the last ones, none without images, nor where the strength has gone to 0."""
        is_noisy = bool(prompt.images) and self._num_steps > 0
        return range(self._num_samples - (self._num_distorted if is_noisy else 0), self._num_samples)

    def begin(self, plan: PassPrompt, draw: int) -> list[EncodedImage]:
        """The noisy images of a first pass, to be made in other threads.

        Args:
            draw: the first of the prompt's in the step; one that comes again is distorted otherwise.
        """
        place = plan.key, draw
        if place not in self._made:
            self._made[place] = [self._image(plan, draw, number) for number in range(len(plan.images))]
        return self._made[place]

    def take(self, plan: PassPrompt, draw: int) -> list[EncodedImage]:
        """The same, which are not kept any longer."""
        images = self.begin(plan, draw)
        del self._made[plan.key, draw]
        return images

    def _image(self, plan: PassPrompt, draw: int, number: int) -> EncodedImage:
        image = self._processor.encode_image(plan.images[number])
        seed = request_seed(self._seed, self._step, plan.key, draw, f"noise of image {number}")
        make = partial(
            noisy,
            num_steps=self._num_steps,
            channels=len(image.normalisation.mean),
            frames=self._processor.num_frames,
            drawn=lambda: torch.Generator().manual_seed(seed),
        )
        return self._processor.changed(image, make)
