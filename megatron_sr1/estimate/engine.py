"""What a generation engine holds on each of its ranks: weights, KV cache, what a forward pass needs, a weight sync.

    KV cache, a token:  2 * layers * max(1, g / t) * d * e     (keys and values; t ranks share g heads, or repeat them)
    a forward pass of n tokens: residual, normed and attention states 6 n H e, gate, up and product 3 n F / t e, encoder
    cache n (1 + L) H e, the vision tower's states and feed-forward part, fp32 logits and log-probs of every running
    request

L DeepStack features. vLLM is given the bytes of the KV cache. Every rank of an engine has the whole vision tower,
and some of the images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_sr1.config import (
    Config,
    LayoutConfig,
    batched_tokens,
    graph_sizes,
    kv_request_bytes,
    kv_token_bytes,
    running_requests,
)
from megatron_sr1.estimate.saved import WholeCount
from megatron_sr1.estimate.vision import tower_sizes
from megatron_sr1.policy.architecture import Architecture
from megatron_sr1.policy.parameter_counts import count_stages

_LOGIT_COPIES = 3  # logits, processed logits and log-probs of a step
_GRAPH_BYTES = 16 << 20  # of a captured decoding step: what its launches take; taken as given, not derived


@dataclass(frozen=True)
class EngineBytes:
    """Of one rank."""

    weights: int
    kv_cache: int
    kv_tokens: int  # that the cache of the whole engine holds
    requests: int  # that it decodes at a time
    forward: int
    graphs: int  # captured decoding steps, which stay when the engine sleeps
    sync: int  # beside the weights, while new ones arrive


def engine_bytes(
    model: Architecture, config: Config, *, element: int = 2, whole: WholeCount | None = None
) -> EngineBytes:
    """An engine of `rollout.engine_tensor` ranks.

    Args:
        element: bytes of a weight and of a cached value; 4 on a CPU.
        whole: see `engine_parameters`.
    """
    rollout = config.rollout
    ranks = rollout.engine_tensor
    weights = engine_parameters(config.model.hf_dir, model, ranks, whole) * element
    kv_cache = int(rollout.kv_cache_gib * 2**30)
    cached = kv_token_bytes(model, ranks, element=element)
    requests = running_requests(rollout, cached, kv_request_bytes(model, ranks, element=element))
    batched = batched_tokens(rollout.max_model_tokens, rollout.engine)
    hidden = 6 * model.hidden_size + (1 + len(model.deepstack_layers)) * model.hidden_size
    width = model.expert_ffn_size * model.experts_per_token + model.shared_expert_size or model.ffn_size
    forward = batched * (hidden + 3 * width // ranks) * element
    forward += _encoder_bytes(model, batched * element) // ranks
    forward += _LOGIT_COPIES * 4 * requests * model.vocab_size
    graphs = 0
    if rollout.cuda_graphs:  # one pool serves all sizes: that of the largest step
        graphs = _GRAPH_BYTES * len(graph_sizes(requests)) + requests * (hidden + 3 * width // ranks) * element
    # a bucket, or the largest tensor where that is more, as the parts that arrive and as the whole; and one layer of
    # the engine, which is filled beside the old one
    largest = model.vocab_size * model.hidden_size * element
    sync = 2 * max(rollout.sync_bucket_mib << 20, largest) + weights // model.num_layers
    return EngineBytes(weights, kv_cache, kv_cache // cached, requests, forward, graphs, sync)


def _encoder_bytes(model: Architecture, values: int) -> int:
    """Of the vision tower over as many visual tokens as a forward pass may take: states and the feed-forward part."""
    tower = tower_sizes(model)
    return tower["spatial_merge_size"] ** 2 * values * (6 * tower["hidden_size"] + 3 * tower["intermediate_size"])


def engine_parameters(hf_dir: str, model: Architecture, ranks: int, whole: WholeCount | None = None) -> int:
    """Parameters on one of the `ranks` of an engine.

    Args:
        whole: the model's, of which a rank is then taken to have an even share, as a process that is one of several
            ranks must; None: they are counted.
    """
    if whole is not None:
        return (whole.language + whole.experts) // ranks + _repeated(model, ranks) + whole.vision
    # vLLM cuts every expert, Megatron deals whole ones: as many parameters, where both share them evenly
    dealt = math.gcd(ranks, model.num_experts) if model.num_experts else 1
    count = count_stages(hf_dir, LayoutConfig(tensor=ranks, sequence_parallel=ranks > 1, expert=dealt), ranks)[0]
    experts = count.experts * dealt // ranks
    language = count.language - count.experts + experts + _repeated(model, ranks)
    return language + count.vision  # the ranks share images, not layers


def _repeated(model: Architecture, ranks: int) -> int:
    """Parameters of keys and values that a rank has because there are fewer heads of them than ranks."""
    return int(
        max(0.0, 1 - model.num_kv_heads / ranks) * 2 * model.head_dim * model.hidden_size * model.num_attention_layers
    )
