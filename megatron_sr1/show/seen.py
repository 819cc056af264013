"""One sample as a model will see it: the prompt by its templates, the pictures after resizing, and all lengths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from megatron_sr1.processor import Processor
from megatron_sr1.prompts import OURS, SHIPPED, Asked, Templates
from megatron_sr1.types import EncodedImage, Prompt, SftSample

_CHANNELS = 3


@dataclass(frozen=True)
class Picture:
    """An image of a sample."""

    size: tuple[int, int]  # width, height in pixels, upright, as it is stored
    seen: Image.Image  # as the vision tower gets it; without a model as it is stored
    num_tokens: int | None  # visual tokens; None: no model


@dataclass(frozen=True)
class Seen:
    """A sample that can be used."""

    key: str
    template: str  # that the prompt is asked by
    prompt: str  # by the chat template, an image as one mark; without a model what the user's turn holds
    pictures: tuple[Picture, ...]
    answer: str
    choices: tuple[str, ...]
    response: str | None  # of a demonstration
    prompt_tokens: int | None  # with visual tokens
    response_tokens: int | None
    keeps_layout: bool = True  # the response, that of its template; one that does not teaches another layout


@dataclass(frozen=True)
class Look:
    """Who looks at samples. Without a processor nothing is resized or counted."""

    processor: Processor | None = None
    templates: Templates = SHIPPED
    asked: Asked = OURS

    def __call__(self, sample: Prompt | SftSample) -> Seen:
        """Raises ValueError for a sample that a run would refuse: its template, or the shape of an image."""
        prompt = sample.prompt if isinstance(sample, SftSample) else sample
        description = sample.description if isinstance(sample, SftSample) else None
        if isinstance(sample, SftSample):
            template = self.templates.of_demonstration(sample)
        else:
            template = self.asked.of(prompt).first
        num_images, response = len(prompt.images), sample.response if isinstance(sample, SftSample) else None
        keeps = response is None or template.parse(response) is not None
        if self.processor is None:
            plain = tuple(Picture(image.size, image, None) for image in prompt.images)
            text = template.user_text(prompt.problem, num_images, description)
            said = (prompt.answer, prompt.choices, response)
            return Seen(prompt.key, template.name, text, plain, *said, None, None, keeps)
        ids = self.processor.turn_ids(template.render(prompt.problem, num_images, description), num_images)
        pictures = tuple(self._picture(self.processor, image) for image in prompt.images)
        grids = [self.processor.grid(picture.size) for picture in pictures]
        return Seen(
            key=prompt.key,
            template=template.name,
            prompt=self.processor.decode(ids),
            pictures=pictures,
            answer=prompt.answer,
            choices=prompt.choices,
            response=response,
            prompt_tokens=len(self.processor.expand(ids, grids)),
            response_tokens=None if response is None else len(self.processor.response_ids(response)),
            keeps_layout=keeps,
        )

    def _picture(self, processor: Processor, image: Image.Image) -> Picture:
        encoded = processor.encode_image(image)
        return Picture(image.size, assembled(encoded, processor), processor.num_visual_tokens(image.size))


def assembled(image: EncodedImage, processor: Processor) -> Image.Image:
    """The pixels that the patches of an image hold, before they are normalised: what the vision tower is given."""
    patches = image.patches()  # [P, C * frames * p * p], the patches of a merged square one after the other
    _, rows, columns = image.grid_thw
    merge, frames = processor.merge_size, processor.num_frames
    side = round((patches.shape[1] / (_CHANNELS * frames)) ** 0.5)
    squares = patches.numpy().reshape(rows // merge, columns // merge, merge, merge, _CHANNELS, frames, side, side)[
        :, :, :, :, :, 0
    ]
    pixels = squares.transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * side, columns * side, _CHANNELS)
    return Image.fromarray(np.ascontiguousarray(pixels))
