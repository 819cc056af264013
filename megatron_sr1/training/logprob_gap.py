"""Trainer and generator must be one policy: a step whose log-probs are too far apart ends the run."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_sr1.config import Config

# Nats a token, mean of a step. Healthy runs are below a tenth of it; one picture in sight of the engine alone is above.
DEFAULT_BOUNDS = {"fp32": 0.01, "bf16": 0.2, "fp8": 0.5}
_WHERE = {
    "near_image": "the pictures: other pixels, or other places of their tokens",
    "far_image": "the pictures, or places in long prompts",
    "text": "the weights or the arithmetic, as no picture is near",
}


def max_logprob_gap(config: Config, on_cpu: bool) -> float:
    """`objective.max_logprob_gap`, or the default of the coarser arithmetic of trainer and engine, whose weights are
    bf16 wherever it is not on a CPU. In nats."""
    if config.objective.max_logprob_gap is not None:
        return config.objective.max_logprob_gap
    dtype = config.precision.dtype
    return DEFAULT_BOUNDS["bf16" if dtype == "fp32" and not on_cpu else dtype]


def check_logprob_gap(metrics: Mapping[str, float], bound: float) -> None:
    """Looks at `logprob_gap`, and at the gaps by kind of token for where to search.

    Raises:
        ValueError: it is above `bound`, or no number.
    """
    gap = metrics["logprob_gap"]
    if gap <= bound:
        return
    kinds = {
        name.removeprefix("mismatch/"): value
        for name, value in metrics.items()
        if name.startswith("mismatch/") and name not in ("mismatch/weight", "mismatch/bounded")
    }
    largest = max((name for name in _WHERE if name in kinds), key=lambda name: kinds[name])
    found = ", ".join(f"{name} {value:.3g}" for name, value in sorted(kinds.items()))
    raise ValueError(
        f"the log-probs of trainer and engine differ by {gap:.3g} nats a token, and objective.max_logprob_gap is "
        f"{bound:g}: the engine samples from another policy than the one that is trained. By kind of token: {found}. "
        f"The largest is {largest}, so look first at {_WHERE[largest]}; a gap that grows with the position points to "
        "rotary embeddings or the KV cache. The step's responses are in the run folder's rollouts/."
    )
