"""The quickstart's task: questions about rows of handwritten digits, real scans from scikit-learn's `load_digits`."""

from megatron_sr1.digits.images import SPLITS, compose, load_scans
from megatron_sr1.digits.questions import ALL_KINDS, KINDS, describe, make_demonstrations, make_prompts

__all__ = [
    "ALL_KINDS",
    "KINDS",
    "SPLITS",
    "compose",
    "describe",
    "load_scans",
    "make_demonstrations",
    "make_prompts",
]
