"""Names that people read, of what rollouts and evaluations are measured by. What is not here keeps its own name."""

from __future__ import annotations

from collections.abc import Mapping

REWARDS: Mapping[str, str] = {
    "acc": "answer right",
    "acc_vis": "right from the description",
    "fmt": "layout",
    "fmt_cot": "layout, without description",
    "fmt_vis": "layout of the second pass",
    "format": "layout that was asked for",
    "leak": "description states the answer",
    "acc_judge": "judge: right from the description",
    "faithful": "description is true",
}
SEGMENTS: Mapping[str, str] = {"description": "description", "think": "reasoning", "answer": "answer"}
PASSES: Mapping[str, str] = {
    "first": "First pass, with the image",
    "second": "Second pass, from the description alone",
}
MEASURES: Mapping[str, str] = {  # of tokens
    "advantage": "advantage",
    "surprise": "surprise (−log p of the generator)",
    "gap": "log-prob gap, trainer − generator",
    "entropy": "entropy",
    "dependency": "visual dependency",
}


def reward_name(name: str) -> str:
    """Of `acc_vis@reader` what the reward is called, and the pass."""
    own, _, later = name.partition("@")
    if own == "acc_vis" and later:
        return f"right in the pass {later}"
    shown = REWARDS.get(own, own)
    return f"{shown}, {later}" if later else shown
