"""Two groups of responses with their rewards, made by hand."""

from __future__ import annotations

import torch
from PIL import Image

from megatron_sr1.processor import Processor
from megatron_sr1.prompts import CAPTION_REASONER, SEE_THINK
from megatron_sr1.types import Prompt, Rollout, RolloutGroup, RolloutPair

GOOD = r"<description> The digits are 3 7 . </description> <think> 3 + 7 = 10 </think> \boxed{10}"
BROKEN = r"<think> 3 + 7 </think> \boxed{10}"
SECOND = r"<think> 3 + 7 = 10 </think> \boxed{10}"


def _rollout(processor: Processor, prompt_ids: tuple[int, ...], text: str, name: str) -> Rollout:
    ids = processor.response_ids(text)
    logprobs = tuple(-0.01 * place for place in range(len(ids)))
    return Rollout(name, prompt_ids, ids, text, logprobs, "stop", 0)


def two_groups(processor: Processor) -> list[RolloutGroup]:
    """Two prompts x two samples; the last sample has no description, so no second pass."""
    groups = []
    for group in range(2):
        image = Image.new("RGB", (56, 28), (200 * group, 10, 10))
        prompt = Prompt(f"p{group}", "What is the sum of all digits?", "10", (image,))
        grid = processor.grid(image.size)
        first_ids = processor.expand(processor.prompt_ids(SEE_THINK.user_text(prompt.problem), 1), [grid])
        pairs = []
        for sample in range(2):
            text = BROKEN if (group, sample) == (1, 1) else GOOD
            description = SEE_THINK.find_description(text)
            second = None
            if description is not None:
                ids = processor.prompt_ids(CAPTION_REASONER.user_text(prompt.problem, 0, description), 0)
                second = _rollout(processor, ids, SECOND, f"{group}/{sample}/second")
            first = _rollout(processor, first_ids, text, f"{group}/{sample}/first")
            pairs.append(RolloutPair(sample, first, second, description))
        groups.append(RolloutGroup(group, prompt, tuple(pairs)))
    return groups


def their_rewards() -> dict[str, torch.Tensor]:
    return {
        "acc": torch.tensor([1.0, 0.0, 1.0, 0.0]),
        "fmt": torch.tensor([1.0, 1.0, 1.0, 0.0]),
        "acc_vis": torch.tensor([0.0, 1.0, 1.0, 0.0]),
        "fmt_vis": torch.tensor([1.0, 1.0, 1.0, 0.0]),
        "acc_judge": torch.tensor([0.0, 1.0, 1.0, 0.0]),
    }
