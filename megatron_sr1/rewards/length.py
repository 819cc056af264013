"""Rewards of a response's length, to be made with the numbers that a run needs."""

from __future__ import annotations

from megatron_sr1.rewards.table import Reward
from megatron_sr1.types import Prompt, Rollout, RolloutPair, Stage


def soft_overlong(max_tokens: int, buffer_tokens: int, of_pass: Stage = "first") -> Reward:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13): 0 for a response of up to max_tokens - buffer_tokens
    tokens, then falling in a line to -1 at max_tokens. It is for `rollout.max_response_tokens=max_tokens`.

    Raises:
        ValueError: not 0 < buffer_tokens <= max_tokens.
    """
    if not 0 < buffer_tokens <= max_tokens:
        raise ValueError(f"soft_overlong: buffer_tokens={buffer_tokens} must be from 1 to max_tokens={max_tokens}.")

    def overlong(pair: RolloutPair, prompt: Prompt) -> float:
        response: Rollout | None = pair.first if of_pass == "first" else pair.second
        assert response is not None, "asked for where there is one"
        beyond = len(response.response_ids) - (max_tokens - buffer_tokens)
        return -min(1.0, max(0.0, beyond / buffer_tokens))

    return Reward(overlong, of_pass)
