"""What a run writes: a checkpoint and an export, from the parameters of a rank of every pipeline stage.

    checkpoint  P w + T * 12      the weights as they are trained, and of trained ones fp32 values and two moments
    its hf      P w               with train.save_hf
    export      P w

P parameters of the whole model, T of them trained, w bytes of a weight. A tensor-parallel rank holds a share of the
language model and the whole vision tower. What such ranks hold alike (norms, routers, the padding of the vocabulary) is
counted for each of them, and a tied head once more where it is a copy. What files say of themselves is left out, half a
MiB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sr1.config import Config
from megatron_sr1.estimate.state import weight_bytes
from megatron_sr1.policy.parameter_counts import StageCount

STATE_BYTES = 12  # of a trained parameter: its fp32 value and two moments


@dataclass(frozen=True)
class WholeCount:
    """Parameters of the whole model, about."""

    language: int  # without experts
    experts: int
    vision: int
    trained: int  # of all

    @property
    def total(self) -> int:
        return self.language + self.experts + self.vision

    @classmethod
    def of(cls, counts: Sequence[StageCount], config: Config) -> WholeCount:
        """From a rank of every pipeline stage, in order."""
        tensor, expert = config.layout.tensor, config.layout.expert
        trained = 0
        for count in counts:
            seeing = count.trained_tower + count.trained_mergers
            language = count.trained - count.trained_experts - seeing
            trained += language * tensor + count.trained_experts * expert + seeing
        return cls(
            language=sum(count.language - count.experts for count in counts) * tensor,
            experts=sum(count.experts for count in counts) * expert,
            vision=sum(count.vision for count in counts),
            trained=trained,
        )


def checkpoint_bytes(counts: Sequence[StageCount], config: Config) -> int:
    """Of one checkpoint, about: all ranks' files.

    Args:
        counts: of a rank of every pipeline stage, see `count_stages` and `Scorer.stage_counts`.
    """
    whole = WholeCount.of(counts, config)
    return export_bytes(counts, config) * (1 + config.train.save_hf) + whole.trained * STATE_BYTES


def export_bytes(counts: Sequence[StageCount], config: Config) -> int:
    """Of the weights in Hugging Face format, about. `counts`: as in `checkpoint_bytes`."""
    return WholeCount.of(counts, config).total * weight_bytes(config)
