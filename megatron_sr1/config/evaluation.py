"""Evaluation on held-out shards."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluateConfig:
    """Greedy evaluation of both passes on the held-out shards."""

    max_prompts: int = 0  # 0: all
    examples: int = 12  # how many are kept with their images for the report
    verify_export: int = 0  # answers that transformers must repeat on the exported model (it loads it on one rank)
