"""Generation of training rollouts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_sr1.config.rules import COUNT, COUNT_OR_NONE, Range, check_numbers, require

TYPICAL = 0.5  # of the longest sequence: what one is taken to be long before any is known
_FEW, _STEP = (1, 2, 4), 8
_MOST_REQUESTS = 512  # that an engine is given by itself: with more, a step's logits outgrow what they bring
_NUMBERS = {
    "prompts_per_step": COUNT,
    "samples_per_prompt": COUNT,
    "dynamic_sampling": Range(0, 100),
    "temperature": Range(0, 100, above=True),
    "top_p": Range(0, 1, above=True),
    "top_k": COUNT_OR_NONE,
    "max_response_tokens": COUNT,
    "max_description_tokens": COUNT,
    "max_model_tokens": COUNT,
    "max_running_requests": COUNT,
    "max_images": Range(1, 10**5),
    "kv_cache_gib": Range(0, 1e6, above=True),
    "engine_tensor": Range(1, 10**5),
    "sync_bucket_mib": Range(1, 10**6),
    "checksum_every": COUNT,
}


@dataclass(frozen=True)
class RolloutConfig:
    """Generation of training rollouts, by engines in the training ranks."""

    prompts_per_step: int = 512  # that are answered before the policy is trained on the answers
    samples_per_prompt: int = 8  # K: responses to each prompt, which are compared with each other
    dynamic_sampling: int = 0  # rounds, at most, that replace prompts whose responses all earn the same; 0: none
    temperature: float = 1.0  # of both passes
    top_p: float = 1.0  # 1 and 0 alone: the trainer's log-probs are of the whole vocabulary, and so must the draws be
    top_k: int = 0  # see top_p
    max_response_tokens: int = 2048  # of each pass; a longer response is cut, and graded as it is
    max_description_tokens: int = 1024  # a longer description is cut here, and counted
    max_model_tokens: int = 8192  # prompt + response, both passes
    max_running_requests: int | None = None  # of an engine; null: as many typical ones as its KV cache holds, to 512
    max_images: int = 1  # images of one prompt, at most
    kv_cache_gib: float = 1.0  # of a rank
    engine_tensor: int = 1  # ranks of one engine; nproc / engine_tensor engines share the prompts
    pull: bool | None = None  # engines take prompts as they get free; null: on GPUs, unless precision.deterministic
    sleep: bool = True  # engines give their memory back while the policy trains; a CPU's engines cannot
    cuda_graphs: bool = True  # of decoding steps, where there is CUDA; False launches each kernel by itself
    engine: dict[str, Any] = field(default_factory=dict)  # further arguments of vLLM's engine, by its own names
    sync_bucket_mib: int = 256  # weights go to the engines in pieces of this size: the memory a sync takes
    checksum_every: int = 50  # weight syncs between two that are checked tensor by tensor; the first always is

    def __post_init__(self) -> None:
        check_numbers("rollout", self, _NUMBERS)
        for key, got, whole in (("top_p", self.top_p, 1.0), ("top_k", self.top_k, 0)):
            reason = "A draw from a cut distribution has another log-prob than the trainer gives it"
            require(got == whole, f"rollout.{key}", got, f"{whole}", f"{reason}; lower rollout.temperature instead.")
        need = self.max_response_tokens + self.max_description_tokens
        require(
            need < self.max_model_tokens,
            "rollout.max_model_tokens",
            self.max_model_tokens,
            f"more than max_response_tokens + max_description_tokens = {need}, or no prompt would fit",
            "Raise rollout.max_model_tokens or lower the other two.",
        )


def typical_tokens(rollout: RolloutConfig) -> tuple[float, float]:
    """What a sequence of the first pass, and of the second, is taken to be long."""
    first = TYPICAL * rollout.max_model_tokens
    return first, TYPICAL * (rollout.max_description_tokens + rollout.max_response_tokens)


def running_requests(rollout: RolloutConfig, token_bytes: int, request_bytes: int = 0) -> int:
    """Requests that an engine decodes at a time: `max_running_requests`, or what its KV cache holds of the two passes'
    mixture, which is half of each.

    Args:
        token_bytes: of a token in the cache, on one of the engine's ranks.
        request_bytes: of a request, however long.
    """
    if rollout.max_running_requests is not None:
        return rollout.max_running_requests
    typical = sum(typical_tokens(rollout)) / 2 + request_bytes / token_bytes  # in tokens
    tokens = int(rollout.kv_cache_gib * 2**30) // token_bytes
    fitting = int(tokens / typical)
    return max(1, min(_MOST_REQUESTS, fitting - fitting % 8 if fitting > 8 else fitting))


def graph_sizes(requests: int) -> list[int]:
    """The numbers of requests, up to all, for which a CUDA graph of a decoding step is captured."""
    few = [size for size in _FEW if size <= requests]
    return sorted({*few, *range(_STEP, requests, _STEP), requests})
