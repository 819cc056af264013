"""The one table of weight names: Megatron-Core parameter <-> Hugging Face tensors, their layout and their split.

Loading, export, weight sync and the conversion tool all read it, so a name or a layout is right or wrong everywhere at
once. Megatron names count layers over the whole model and experts over all ranks, and are those of the plain torch
layers; `canonical_name` gives them for Transformer Engine's too.

One Hugging Face tensor holds the weights of all experts of a layer, [E, ...]; each expert is a Megatron parameter and a
rule of its own. The two functions that move numbers work on parts: a whole tensor, or one expert's slice of it. Whoever
writes the tensor stacks the parts of the rules that name it.

    E experts, H hidden size, I width of the (expert's) feed-forward part
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_sr1.config import HfConfig

Kind = Literal[
    "replicated",
    "columns",
    "heads",  # a number for each head of a gated delta rule
    "qkv",
    "delta_in",  # the first product of a gated delta rule, and its convolution
    "delta_conv",
    "gate_up",
    "vocabulary",
    "expert_gate_up",
    "expert_down",
]
# whose rows are in another order than those of the Hugging Face tensors
REORDERED: tuple[Kind, ...] = ("qkv", "delta_in", "delta_conv")

_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.in_proj.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.linear_fc([12])\.weight(\d+)$")
_LOCAL_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.")


@dataclass(frozen=True)
class WeightRule:
    """One Megatron parameter and the Hugging Face tensors it is made of."""

    megatron: str
    hf: tuple[str, ...]
    kind: Kind
    expert: int | None = None  # the part of the (single) tensor: its slice [expert]; None: all of it


# ---------------------------------------------------------------- names
def language_rules(sizes: HfConfig) -> list[WeightRule]:
    """All language-model rules in checkpoint order. The vision tower keeps its names (see `vision_rule`)."""
    prefix = sizes.family.language_prefix
    embedding, final_norm = f"{prefix}embed_tokens.weight", f"{prefix}norm.weight"
    rules = [WeightRule("embedding.word_embeddings.weight", (embedding,), "vocabulary")]
    for layer in range(sizes.num_layers):
        ours, theirs = f"decoder.layers.{layer}", f"{prefix}layers.{layer}"
        rules += (_delta_rules if sizes.linear_layers[layer] else _attention_rules)(ours, theirs, sizes)
        rules += _expert_rules(ours, theirs, sizes) if sizes.moe_layers[layer] else _mlp_rules(ours, theirs)
    rules.append(WeightRule("decoder.final_layernorm.weight", (final_norm,), "replicated"))
    rules.append(WeightRule("output_layer.weight", (embedding if sizes.tied else "lm_head.weight",), "vocabulary"))
    return rules


def _attention_rules(ours: str, theirs: str, sizes: HfConfig) -> list[WeightRule]:
    """The attention of a layer and both norms around it."""
    inner, outer = f"{ours}.self_attention", f"{theirs}.self_attn"
    rules = [WeightRule(f"{ours}.input_layernorm.weight", (f"{theirs}.input_layernorm.weight",), "replicated")]
    for part in ("weight", "bias") if sizes.family.qkv_bias else ("weight",):
        rules.append(WeightRule(f"{inner}.linear_qkv.{part}", tuple(f"{outer}.{x}_proj.{part}" for x in "qkv"), "qkv"))
    for x in "qk" if sizes.family.qk_norm else "":
        rules.append(WeightRule(f"{inner}.{x}_layernorm.weight", (f"{outer}.{x}_norm.weight",), "replicated"))
    return [
        *rules,
        WeightRule(f"{inner}.linear_proj.weight", (f"{outer}.o_proj.weight",), "columns"),
        WeightRule(f"{ours}.pre_mlp_layernorm.weight", (f"{theirs}.post_attention_layernorm.weight",), "replicated"),
    ]


def _delta_rules(ours: str, theirs: str, sizes: HfConfig) -> list[WeightRule]:
    """The gated delta rule of a layer and both norms around it."""
    inner, outer = f"{ours}.self_attention", f"{theirs}.linear_attn"
    products = tuple(f"{outer}.in_proj_{part}.weight" for part in ("qkv", "z", "b", "a"))
    return [
        WeightRule(f"{ours}.input_layernorm.weight", (f"{theirs}.input_layernorm.weight",), "replicated"),
        WeightRule(f"{inner}.in_proj.weight", products, "delta_in"),
        WeightRule(f"{inner}.conv_weight", (f"{outer}.conv1d.weight",), "delta_conv"),
        WeightRule(f"{inner}.A_log", (f"{outer}.A_log",), "heads"),
        WeightRule(f"{inner}.dt_bias", (f"{outer}.dt_bias",), "heads"),
        WeightRule(f"{inner}.norm_weight", (f"{outer}.norm.weight",), "replicated"),
        WeightRule(f"{inner}.out_proj.weight", (f"{outer}.out_proj.weight",), "columns"),
        WeightRule(f"{ours}.pre_mlp_layernorm.weight", (f"{theirs}.post_attention_layernorm.weight",), "replicated"),
    ]


def _mlp_rules(ours: str, theirs: str, part: str = "mlp", theirs_part: str = "mlp") -> list[WeightRule]:
    """A dense layer's feed-forward part, or the shared expert's of a mixture."""
    gate, up, down = (f"{theirs}.{theirs_part}.{x}_proj.weight" for x in ("gate", "up", "down"))
    return [
        WeightRule(f"{ours}.{part}.linear_fc1.weight", (gate, up), "gate_up"),
        WeightRule(f"{ours}.{part}.linear_fc2.weight", (down,), "columns"),
    ]


def _expert_rules(ours: str, theirs: str, sizes: HfConfig) -> list[WeightRule]:
    """The router and, expert by expert, both weights; the shared expert and its gate."""
    rules = [WeightRule(f"{ours}.mlp.router.weight", (f"{theirs}.mlp.gate.weight",), "replicated")]
    if sizes.shared_expert_size:
        rules += _mlp_rules(ours, theirs, "mlp.shared_experts", "mlp.shared_expert")
        gate = f"{theirs}.mlp.shared_expert_gate.weight"
        rules.append(WeightRule(f"{ours}.mlp.shared_experts.gate_weight", (gate,), "replicated"))
    for expert in range(sizes.num_experts):
        one = f"{ours}.mlp.experts.local_experts.{expert}"
        fused = f"{theirs}.mlp.experts"
        rules.append(WeightRule(f"{one}.linear_fc1.weight", (f"{fused}.gate_up_proj",), "expert_gate_up", expert))
        rules.append(WeightRule(f"{one}.linear_fc2.weight", (f"{fused}.down_proj",), "expert_down", expert))
    return rules


def vision_rule(megatron: str, sizes: HfConfig) -> WeightRule:
    """The vision tower is the transformers module itself, whole on every tensor-parallel rank of the first stage."""
    return WeightRule(megatron, (sizes.family.vision_prefix + megatron.removeprefix("vision."),), "replicated")


def canonical_name(megatron: str, *, first_expert: int = 0) -> str:
    """The table's name of a parameter under either layer spec.

    Args:
        megatron: as `named_parameters` says it, layers counted over the whole model already. Transformer Engine fuses
            norms into the linear layer behind them and the experts of a rank into one module.
        first_expert: the model's number of this rank's first expert.
    """
    for fused, plain in _FUSED_NORMS.items():
        if megatron.endswith(fused):
            return megatron.removesuffix(fused) + plain
    megatron = _GROUPED_EXPERT.sub(r"mlp.experts.local_experts.\2.linear_fc\1.weight", megatron)
    return _LOCAL_EXPERT.sub(lambda at: f"mlp.experts.local_experts.{int(at[1]) + first_expert}.", megatron)


# ---------------------------------------------------------------- numbers
def shard_from_hf(rule: WeightRule, parts: list[Tensor], sizes: HfConfig, rank: int, ranks: int) -> Tensor:
    """This tensor-parallel rank's parameter, from the parts of the rule's Hugging Face tensors.

    An expert is not split: pass rank 0 of 1. Its part may lie as in published checkpoints, gate_up [H, 2I] and
    down [I, H], or as transformers saves it from version 5 on, [2I, H] and [H, I]; the shape tells,
    and config.json of a family that has both ways is refused where it could not.
    """
    if rule.kind == "replicated":
        return parts[0]
    if rule.kind in ("expert_gate_up", "expert_down"):
        assert ranks == 1, "experts are whole on a rank"
        return parts[0] if parts[0].shape == _expert_shape(rule, sizes) else parts[0].T
    if rule.kind == "columns":
        return parts[0].chunk(ranks, dim=1)[rank]
    if rule.kind == "gate_up":
        return torch.cat([part.chunk(ranks)[rank] for part in parts])
    if rule.kind == "heads":
        return parts[0].chunk(ranks)[rank]
    if rule.kind in REORDERED:
        groups = _groups_of(rule, parts, sizes)
        return torch.cat(groups, dim=1).flatten(0, 1).chunk(ranks)[rank]
    padded = -(-len(parts[0]) // ranks) * ranks
    if padded > len(parts[0]):
        padding = parts[0].new_zeros(padded - len(parts[0]), *parts[0].shape[1:])
        return torch.cat([parts[0], padding]).chunk(ranks)[rank]
    return parts[0].chunk(ranks)[rank]


def hf_from_shards(
    rule: WeightRule, shards: list[Tensor], sizes: HfConfig, *, published_experts: bool = True
) -> list[Tensor]:
    """The parts of the rule's Hugging Face tensors, from the parameter of every tensor-parallel rank, in rank order
    (one, for an expert).

    Args:
        published_experts: experts lie as in published checkpoints and as vLLM reads them: where the family has
            `experts_turned` gate_up [H, 2I] and down [I, H]; else as transformers saves them, [2I, H] and [H, I]. See
            `has_published_experts`.
    """
    if rule.kind == "replicated":
        return [shards[0]]
    if rule.kind in ("expert_gate_up", "expert_down"):
        assert len(shards) == 1, "experts are whole on a rank"
        return [shards[0].T if published_experts and sizes.family.experts_turned else shards[0]]
    if rule.kind == "columns":
        return [torch.cat(shards, dim=1)]
    if rule.kind == "gate_up":
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return [torch.cat(gates), torch.cat(ups)]
    whole = torch.cat(shards)
    if rule.kind == "vocabulary":
        return [whole[: sizes.vocab_size]]
    return [whole] if rule.kind == "heads" else _from_groups(rule, whole, sizes)


def _groups_of(rule: WeightRule, parts: list[Tensor], sizes: HfConfig) -> list[Tensor]:
    """What the groups of heads have of each tensor, [groups, rows, ...], in the order in which the parameter has them:
    of each key/value head its queries, its gates where there are any, its key, its value; of each key head of a gated
    delta rule its query, its key, its values, then their output gates, learning rates and decays.

    Raises:
        ValueError: a tensor has another number of rows than config.json calls for.
    """
    if rule.kind == "qkv":
        queries, *others = parts
        split = [queries]
        if sizes.family.output_gate:  # of each head its query, then its gate
            _check_rows(rule, queries, 2 * sizes.num_heads * sizes.head_dim)
            pairs = queries.unflatten(0, (sizes.num_heads, 2, sizes.head_dim))
            split = [pairs[:, 0].flatten(0, 1), pairs[:, 1].flatten(0, 1)]
        return [part.unflatten(0, (sizes.num_kv_heads, -1)) for part in (*split, *others)]
    linear = sizes.linear
    assert linear is not None, rule
    mixed, *others = parts
    _check_rows(rule, mixed, linear.num_key_heads * linear.channels_per_key)
    width = linear.num_key_heads * linear.key_dim
    split = mixed.split([width, width, linear.num_value_heads * linear.value_dim])
    return [part.unflatten(0, (linear.num_key_heads, -1)) for part in (*split, *others)]


def _check_rows(rule: WeightRule, part: Tensor, wanted: int) -> None:
    if len(part) != wanted:
        raise ValueError(
            f"{rule.hf[0]} has {len(part)} rows, but config.json calls for {wanted}. They do not belong together."
        )


def _from_groups(rule: WeightRule, whole: Tensor, sizes: HfConfig) -> list[Tensor]:
    """The tensors that `_groups_of` took apart."""
    if rule.kind == "qkv":
        groups = whole.unflatten(0, (sizes.num_kv_heads, -1))
        shared, each = sizes.num_heads // sizes.num_kv_heads, sizes.head_dim
        num_queries = 2 if sizes.family.output_gate else 1
        *queries, keys, values = groups.split([shared * each] * num_queries + [each, each], dim=1)
        if num_queries > 1:  # [groups, shared * each] twice -> [heads, 2, each]
            queries = [torch.stack([part.unflatten(1, (shared, each)) for part in queries], dim=2).flatten(1, 3)]
        return [part.flatten(0, 1) for part in (*queries, keys, values)]
    linear = sizes.linear
    assert linear is not None, rule
    groups, served = whole.unflatten(0, (linear.num_key_heads, -1)), linear.values_per_key
    rows = [linear.key_dim, linear.key_dim, served * linear.value_dim]
    if rule.kind == "delta_in":
        rows += [served * linear.value_dim, served, served]
    mixed, others = [], []
    for number, part in enumerate(groups.split(rows, dim=1)):
        (mixed if number < 3 else others).append(part.flatten(0, 1))
    return [torch.cat(mixed), *others]


def has_published_experts(rule: WeightRule, shape: Iterable[int], sizes: HfConfig) -> bool:
    """Whether the experts of a checkpoint lie as in published ones, told by the shape [E, ...] of the rule's tensor.

    Whoever converts there and back keeps the answer, so that the tensors come back as they were.
    """
    return tuple(shape)[1:] != _expert_shape(rule, sizes)


def _expert_shape(rule: WeightRule, sizes: HfConfig) -> tuple[int, int]:
    """Of the Megatron parameter: (out, in)."""
    hidden, inner = sizes.hidden_size, sizes.expert_ffn_size
    return (2 * inner, hidden) if rule.kind == "expert_gate_up" else (hidden, inner)
