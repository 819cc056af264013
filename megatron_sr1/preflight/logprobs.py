"""Trainer and generator must be one policy, before anything is trained on what the generator draws."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_sr1.preflight.rows import Row, not_checked
from megatron_sr1.training.logprob_gap import check_logprob_gap

LOGPROBS = "log-probs"


def logprob_row(gaps: Mapping[str, float] | None, bound: float) -> Row:
    """
    Args:
        gaps: see `Trainer.compare`.
        bound: nats a token.
    """
    if gaps is None:
        why = "fewer responses were drawn than the policy has replicas"
        return not_checked(LOGPROBS, why, "Raise preflight.prompts.")
    try:
        check_logprob_gap(gaps, bound)
    except ValueError as error:
        return Row(LOGPROBS, "fail", str(error))
    gap = gaps["logprob_gap"]
    return Row(
        LOGPROBS, "pass", f"trainer and generator are {gap:.2g} nats a token apart, at most {bound:g} is allowed"
    )
