"""The presets: every variant of Vision-SR1 as a list of reward streams, written as in `objective.streams`.

A stream credits some tokens of one pass with a weighted sum of named rewards (Vision-SR1, arXiv 2508.19652, eq. 6-9).
The rewards are those of `rewards/table.py`, the tokens those of `segments.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_sr1.types import PresetName, TemplateName

Written = Mapping[str, Any]  # one entry of objective.streams


def _vision_r1(alpha: float) -> tuple[TemplateName, list[Written]]:
    """Answer-only GRPO with the plain chain-of-thought prompt."""
    return "cot", [{"name": "answer", "rewards": {"acc": 1.0, "fmt_cot": alpha}}]


def _see_think(alpha: float) -> tuple[TemplateName, list[Written]]:
    """Answer-only GRPO with the See-Think prompt: the paper's ablation without self-reward."""
    return "see_think", [{"name": "answer", "rewards": {"acc": 1.0, "fmt": alpha}}]


def _summed(alpha: float) -> tuple[TemplateName, list[Written]]:
    """One scalar for everything, (1 - alpha) acc + alpha fmt + acc_vis, on the first pass (first public code)."""
    return "see_think", [{"name": "answer", "rewards": {"acc": 1.0 - alpha, "fmt": alpha, "acc_vis": 1.0}}]


def _gdpo(alpha: float) -> tuple[TemplateName, list[Written]]:
    """Each reward normalised by itself, then summed, on the first pass (later public code; arXiv 2601.05242)."""
    rewards = {"acc": 1.0, "fmt": alpha, "acc_vis": 1.0, "fmt_vis": alpha}
    return "see_think", [{"name": "answer", "rewards": rewards, "normalize": "per_component"}]


def _vision_sr1(alpha: float) -> tuple[TemplateName, list[Written]]:
    """The paper: each pass earns its own reward on its own tokens, lambda = 1/2 each."""
    visual = {"acc_vis": 1.0, "fmt_vis": alpha}
    return "see_think", [
        {"name": "answer", "rewards": {"acc": 1.0, "fmt": alpha}, "loss_weight": 0.5},
        {"name": "visual", "pass": "second", "rewards": visual, "loss_weight": 0.5},
    ]


def _perception_credit(alpha: float) -> tuple[TemplateName, list[Written]]:
    """The visual reward credits the description that earned it; the answer reward credits the rest."""
    answer, visual = {"acc": 1.0, "fmt": alpha}, {"acc_vis": 1.0, "fmt_vis": alpha}
    return "see_think", [
        {"name": "answer", "tokens": "reasoning", "rewards": answer, "loss_weight": 0.5},
        {"name": "visual", "tokens": "description", "rewards": visual, "loss_weight": 0.5},
    ]


def _external_reasoner(alpha: float) -> tuple[TemplateName, list[Written]]:
    """As `vision_sr1`, but the description is read by a model behind an endpoint (`rewards.judge`), so that what it
    earns credits the response that holds it (RACRO, arXiv 2506.04559)."""
    return "see_think", [
        {"name": "answer", "rewards": {"acc": 1.0, "fmt": alpha}, "loss_weight": 0.5},
        {"name": "visual", "tokens": "description", "rewards": {"acc_judge": 1.0}, "loss_weight": 0.5},
    ]


# alpha, the weight of the layout -> the first pass' template and the streams
WRITTEN: Mapping[PresetName, Callable[[float], tuple[TemplateName, list[Written]]]] = {
    "vision_r1": _vision_r1,
    "see_think": _see_think,
    "summed": _summed,
    "gdpo": _gdpo,
    "vision_sr1": _vision_sr1,
    "perception_credit": _perception_credit,
    "external_reasoner": _external_reasoner,
}
