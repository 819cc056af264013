"""Prompts, a model and an engine for the tests of rollouts on the real engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed
from PIL import Image
from safetensors.torch import load_file, save_file

from megatron_sr1.config import PixelLimits
from megatron_sr1.digits.tiny_model import create_tiny_model
from megatron_sr1.types import Prompt, RolloutGroup, Sampling

MAX_MODEL_TOKENS = 512
MAX_RESPONSE = 24
TOLERANCE = 1e-3  # nats
PIXELS = PixelLimits(2 * 28**2, 24 * 28**2)  # model.min_pixels and max_pixels: not what the model's own files say
IMAGE_SIZES = [(84, 28), (56, 56), (90, 41)]  # width, height; the last is resized


def prompts(num: int) -> list[Prompt]:
    """Questions over 0, 1 or 2 noise images; one question spells special tokens."""
    rng = np.random.default_rng(0)
    made = []
    for index in range(num):
        sizes = [IMAGE_SIZES[(index + i) % 3] for i in range((1, 2, 0, 1)[index % 4])]
        images = tuple(Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes)
        problem = "What does <|image_pad|> <image> say?<|im_end|>" if index == 3 else f"What is {index} plus 3?"
        made.append(Prompt(key=f"p{index}", problem=problem, answer="0", images=images))
    return made


def sampling(**changes: Any) -> Sampling:
    defaults = {"num_samples": 2, "temperature": 1.0, "max_response_tokens": MAX_RESPONSE, "seed": 5}
    return Sampling(**(defaults | changes))


def tracks(groups: list[RolloutGroup]) -> list[Any]:
    """All token ids of all passes."""
    return [
        [(r.prompt_ids, r.response_ids) for r in (pair.first, pair.second) if r is not None]
        for group in groups
        for pair in group.pairs
    ]


def make_model(model_dir: Path) -> None:
    """A tiny one whose greedy choices are far apart."""
    texts = [
        "<description> a 3 and a 7 </description> <think> 3 + 7 = 10 </think> \\boxed{10}",
        "What is 3 plus 4?",
    ] * 20
    create_tiny_model(model_dir, texts, seed=1)
    path = model_dir / "model.safetensors"
    peaked = {name: tensor * 4 if tensor.dim() > 1 else tensor for name, tensor in load_file(path).items()}
    save_file(peaked, path, metadata={"format": "pt"})


def describing_processor(model_dir: str) -> Any:
    """Random weights never describe anything, so every response is read as a description."""
    from megatron_sr1.processor import Processor

    class Describing(Processor):
        def decode(self, ids: Any) -> str:
            return "<description>" + super().decode(ids).replace("<", "") + " .</description>"

    return Describing.from_pretrained(model_dir, pixels=PIXELS)


def finishing_engine() -> Any:
    """Random weights never end a turn, so a response of full length counts as ended; and it fails when told to."""
    from megatron_sr1.rollout import Engine

    class Finishing(Engine):
        steps_to_fault: int | None = None
        reasons: ClassVar[set[str]] = set()  # as the engine gave them

        def step(self) -> list[Any]:
            if self.steps_to_fault is not None:
                self.steps_to_fault -= 1
                if self.steps_to_fault < 0:
                    self.steps_to_fault = None
                    raise RuntimeError("a forward pass that fails")
            generations = super().step()
            self.reasons.update(generation.finish_reason for generation in generations)
            return [replace(generation, finish_reason="stop") for generation in generations]

    return Finishing


def changed_weight(name: str, tensor: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
    return tensor + 0.3 * tensor.abs().mean() * noise


def reference_differences(
    folder: Path, weights: dict[str, torch.Tensor], groups: list[RolloutGroup], media: Any
) -> float:
    """The largest |log-prob difference| to transformers, of greedy rollouts; asserts that every token is its argmax."""
    from megatron_sr1.platform.torchvision_ops import define_missing_torchvision_ops
    from megatron_sr1.processor import Processor

    define_missing_torchvision_ops()
    from transformers import Qwen2_5_VLForConditionalGeneration

    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32).eval()
    processor = Processor.from_pretrained(str(folder / "model"), pixels=PIXELS)
    worst = 0.0
    for group in groups:
        pair = group.pairs[0]
        assert (pair.second is None) == (not group.prompt.images), "without an image there is nothing to describe"
        seconds = [] if pair.second is None else [(pair.second, ())]
        for rollout, images in ((pair.first, group.prompt.images), *seconds):
            ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
            encoded = [processor.encode_image(image) for image in images]
            vision: dict[str, Any] = {"mm_token_type_ids": (ids == processor.image_token_id).int()}
            if encoded:
                vision["pixel_values"] = torch.cat([image.pixel_values for image in encoded])
                vision["image_grid_thw"] = torch.tensor([image.grid_thw for image in encoded])
            with torch.no_grad():
                logits = model(input_ids=ids, **vision).logits[0, len(rollout.prompt_ids) - 1 : -1]
            logits[:, list(media)] -= 100.0
            logprobs = logits.log_softmax(-1)
            chosen = torch.tensor(rollout.response_ids)
            assert torch.equal(logprobs.argmax(-1), chosen)
            ours = torch.tensor(rollout.generator_logprobs)
            worst = max(worst, (logprobs.gather(1, chosen[:, None])[:, 0] - ours).abs().max().item())
    return worst
