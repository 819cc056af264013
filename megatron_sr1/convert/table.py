"""The one table of weight names: Megatron-Core parameter <-> Hugging Face tensors, their layout and their split.

Loading, export and weight sync all read it, so a name or a layout is right or wrong everywhere at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Kind = Literal["replicated", "columns", "qkv", "gate_up", "vocabulary"]


class Sizes(Protocol):
    """What the table needs to know of a model."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def tied(self) -> bool: ...


@dataclass(frozen=True)
class WeightRule:
    """One Megatron parameter. `megatron` counts layers over the whole model, not over the stage."""

    megatron: str
    hf: tuple[str, ...]
    kind: Kind


def language_rules(sizes: Sizes) -> list[WeightRule]:
    """All language-model rules in checkpoint order. The vision tower keeps its names (see `vision_rule`)."""
    rules = [WeightRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary")]
    for layer in range(sizes.num_layers):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        attention = f"{theirs}.self_attn"
        rules += [
            WeightRule(f"{ours}.input_layernorm.weight", (f"{theirs}.input_layernorm.weight",), "replicated"),
            *(
                WeightRule(
                    f"{ours}.self_attention.linear_qkv.{part}",
                    tuple(f"{attention}.{x}_proj.{part}" for x in "qkv"),
                    "qkv",
                )
                for part in ("weight", "bias")
            ),
            WeightRule(f"{ours}.self_attention.linear_proj.weight", (f"{attention}.o_proj.weight",), "columns"),
            WeightRule(
                f"{ours}.pre_mlp_layernorm.weight", (f"{theirs}.post_attention_layernorm.weight",), "replicated"
            ),
            WeightRule(
                f"{ours}.mlp.linear_fc1.weight",
                (f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight"),
                "gate_up",
            ),
            WeightRule(f"{ours}.mlp.linear_fc2.weight", (f"{theirs}.mlp.down_proj.weight",), "columns"),
        ]
    rules.append(WeightRule("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated"))
    head = "model.embed_tokens.weight" if sizes.tied else "lm_head.weight"
    rules.append(WeightRule("output_layer.weight", (head,), "vocabulary"))
    return rules


def vision_rule(megatron: str) -> WeightRule:
    """The vision tower is the transformers module itself, whole on every tensor-parallel rank of the first stage."""
    return WeightRule(megatron, ("visual." + megatron.removeprefix("vision."),), "replicated")


def shard_from_hf(rule: WeightRule, tensors: list[Tensor], sizes: Sizes, rank: int, ranks: int) -> Tensor:
    """This tensor-parallel rank's parameter, from the full Hugging Face tensors of the rule."""
    if rule.kind == "replicated":
        return tensors[0]
    if rule.kind == "columns":
        return tensors[0].chunk(ranks, dim=1)[rank]
    if rule.kind == "gate_up":
        return torch.cat([tensor.chunk(ranks)[rank] for tensor in tensors])
    if rule.kind == "qkv":
        # Megatron keeps each key/value group together: its queries, then its key, then its value
        groups = [tensor.unflatten(0, (sizes.num_kv_heads, -1)) for tensor in tensors]
        return torch.cat(groups, dim=1).flatten(0, 1).chunk(ranks)[rank]
    padded = -(-len(tensors[0]) // ranks) * ranks
    if padded > len(tensors[0]):
        padding = tensors[0].new_zeros(padded - len(tensors[0]), *tensors[0].shape[1:])
        return torch.cat([tensors[0], padding]).chunk(ranks)[rank]
    return tensors[0].chunk(ranks)[rank]


def hf_from_shards(rule: WeightRule, shards: list[Tensor], sizes: Sizes) -> list[Tensor]:
    """The full Hugging Face tensors, from the parameter of every tensor-parallel rank, in rank order."""
    if rule.kind == "replicated":
        return [shards[0]]
    if rule.kind == "columns":
        return [torch.cat(shards, dim=1)]
    if rule.kind == "gate_up":
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return [torch.cat(gates), torch.cat(ups)]
    whole = torch.cat(shards)
    if rule.kind == "vocabulary":
        return [whole[: sizes.vocab_size]]
    groups = whole.unflatten(0, (sizes.num_kv_heads, -1))
    head = len(whole) // (sizes.num_heads + 2 * sizes.num_kv_heads)
    queries, keys, values = groups.split([groups.shape[1] - 2 * head, head, head], dim=1)
    return [part.flatten(0, 1) for part in (queries, keys, values)]
