"""Activations that one language layer keeps for backward, tensor by tensor.

After Korthikanti et al. 2022 (Reducing Activation Recomputation in Large Transformer Models, arXiv 2205.05198, section
4), for what this policy's layers are: grouped queries, SwiGLU, RMSNorm, no dropout, attention that keeps no scores
(their term 5 a s / h), a packed row instead of a batch. Transformer Engine's layers are meant; plain ones keep one more
hidden state for each norm.

    T tokens of a rank: the row's / context ranks        S  of these in norms: T / tensor with sequence parallelism
    t tensor ranks    H hidden, F feed-forward width    h, g heads and key/value heads of d channels
    e bytes of an element, 2 in fp8 too: what that keeps in 1 byte is not taken off
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sr1.config import LayoutConfig, LinearAttention
from megatron_sr1.kernels.delta_rule import CHUNK
from megatron_sr1.policy.architecture import Architecture

EXPERT_IMBALANCE = 1.5  # tokens of the busiest expert rank over the mean; routers are not balanced by a loss here
_ATTENTION = (
    "attention norm",
    "query, key, value",
    "head norms",
    "turned",
    "others' keys and values",
    "attention",
    "sums of scores",
)


_DELTA = ("convolution", "delta rule", "delta norm")  # made again with core_attn


@dataclass(frozen=True)
class LayerShape:
    """A layer's sizes on one rank of a layout, and the tokens it is given."""

    tokens: float  # T
    norm_tokens: float  # S
    hidden: int
    heads: float  # of a rank
    kv_heads: float
    head_dim: int
    qk_norm: bool
    ffn: float  # of a rank; of one expert in a mixture
    chosen_experts: int = 0  # of a token; 0: the feed-forward part is dense
    num_experts: int = 0
    shared: float = 0.0  # width of a rank's part of the shared expert
    element: int = 2  # bytes
    linear: LinearAttention | None = None  # a gated delta rule in place of attention
    key_heads: float = 0.0  # of it, of a rank
    gate: bool = False  # of attention's output
    others: float = 0.0  # tokens of other ranks, whose keys and values rows with shared prefixes have here


def layer_shape(
    model: Architecture,
    layout: LayoutConfig,
    row_tokens: int,
    *,
    element: int,
    is_moe: bool,
    gathers: bool = False,
    is_linear: bool = False,
) -> LayerShape:
    """The shape of one layer for a packed row. `gathers`: context ranks have each other's keys and values; `is_linear`:
    it has a gated delta rule in place of attention."""
    tokens = row_tokens / layout.context
    linear = model.linear if is_linear else None
    return LayerShape(
        tokens=tokens,
        norm_tokens=tokens / layout.tensor if layout.sequence_parallel else tokens,
        hidden=model.hidden_size,
        heads=model.num_heads / layout.tensor,
        kv_heads=max(1.0, model.num_kv_heads / layout.tensor),
        head_dim=model.head_dim,
        qk_norm=model.family.qk_norm,
        ffn=model.expert_ffn_size if is_moe else model.ffn_size / layout.tensor,
        chosen_experts=model.experts_per_token if is_moe else 0,
        num_experts=model.num_experts if is_moe else 0,
        shared=model.shared_expert_size / layout.tensor if is_moe else 0.0,
        element=element,
        linear=linear,
        key_heads=linear.num_key_heads / layout.tensor if linear is not None else 0.0,
        gate=model.family.output_gate,
        others=row_tokens - tokens if gathers else 0.0,
    )


def kept_tensors(shape: LayerShape) -> dict[str, float]:
    """Bytes by name; together they are what the layer keeps where nothing is recomputed."""
    token, norm = shape.tokens * shape.element, shape.norm_tokens * shape.element
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    kept = {"attention norm": 2 * norm * shape.hidden}  # its input and its output
    if shape.linear is not None:
        kept |= _delta_tensors(shape, shape.linear)
        kept["mlp norm"] = 2 * norm * shape.hidden
        return kept | _feed_forward_tensors(shape)
    kept |= {
        "query, key, value": token * (queries + 2 * keys),  # one tensor; attention keeps the values in it
        "head norms": token * (queries + keys) if shape.qk_norm else 0.0,
        "turned": token * (queries + keys),  # queries and keys after the rotary embedding
        "others' keys and values": shape.others * shape.element * 2 * keys,
        "attention": token * queries * (3 if shape.gate else 1),  # for its own backward and the projection's; gated
        "sums of scores": 4 * shape.tokens * shape.heads,
        "mlp norm": 2 * norm * shape.hidden,
    }
    return kept | _feed_forward_tensors(shape)


def _feed_forward_tensors(shape: LayerShape) -> dict[str, float]:
    return _expert_tensors(shape) if shape.chosen_experts else _mlp_tensors(shape)


def _delta_tensors(shape: LayerShape, linear: LinearAttention) -> dict[str, float]:
    """Of a gated delta rule by flash-linear-attention, whose backward makes the states again; plain torch keeps several
    times as much. Queries and keys are repeated for the value heads that they serve."""
    token, heads = shape.tokens * shape.element, shape.key_heads * linear.values_per_key
    channels, values = shape.key_heads * linear.channels_per_key, heads * linear.value_dim
    return {
        "delta inputs": token * shape.key_heads * linear.rows_per_key,
        "convolution": 2 * token * channels,  # its input, side by side, and its output
        "delta rule": token * (heads * (2 * linear.key_dim + CHUNK) + 2 * values) + 8 * shape.tokens * heads,
        "delta norm": 2 * 4 * shape.tokens * values,  # fp32: what was found, and the gate
        "gated": token * values,
    }


def _mlp_tensors(shape: LayerShape) -> dict[str, float]:
    inner = shape.tokens * shape.element * shape.ffn
    return {"gate and up": 2 * inner, "activation": 2 * inner, "product": inner}  # silu(gate), and up once more


def _expert_tensors(shape: LayerShape) -> dict[str, float]:
    """Tokens go to the ranks of their experts: `chosen_experts` copies of each, spread over the expert ranks."""
    copies = shape.norm_tokens * shape.chosen_experts * EXPERT_IMBALANCE * shape.element
    return {
        "router": 2 * 4 * shape.norm_tokens * shape.num_experts,  # fp32 scores and probabilities
        "routed tokens": copies * shape.hidden,
        "gate and up": 2 * copies * shape.ffn,
        "activation": 2 * copies * shape.ffn,
        "product": 2 * copies * shape.ffn,  # before and after the router's weights
        "expert outputs": copies * shape.hidden,
        # as a dense part keeps them, and its output before the gate
        "shared expert": shape.element
        * (5 * shape.tokens * shape.shared + (shape.norm_tokens * shape.hidden if shape.shared else 0)),
    }


def dropped_bytes(modules: tuple[str, ...], shape: LayerShape) -> float:
    """Bytes of `kept_tensors` that selective recomputation of `modules` does not keep.

    `core_attn` keeps its inputs, and with them all but the sums of scores: attention keeps no scores anyway. Of a gated
    delta rule it keeps the outputs of the first product.
    """
    kept = kept_tensors(shape)
    inside = set(kept) - set(_ATTENTION) - set(_DELTA) - {"mlp norm", "gated", "delta inputs"}
    names: set[str] = set()
    for module in modules:
        if module == "core_attn":
            names |= {"sums of scores"} if shape.linear is None else set(_DELTA)
        elif module == ("moe" if shape.chosen_experts else "mlp"):
            names |= inside
        elif module == "moe_act" and shape.chosen_experts:
            names |= {"activation", "product"}
    norms = 0.5 * (kept["attention norm"] + kept["mlp norm"]) if "layernorm" in modules else 0.0  # their outputs
    return sum(kept[name] for name in names) + norms
