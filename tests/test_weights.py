"""The weight table: every layout splits and joins to the same bits, by hand-made expectations and for random sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sr1.config import HfConfig, LinearAttention, read_hf_config
from megatron_sr1.weights.name_table import (
    WeightRule,
    canonical_name,
    has_published_experts,
    hf_from_shards,
    language_rules,
    shard_from_hf,
    vision_rule,
)
from megatron_sr1.weights.safetensors import read_header
from tests.hf_config_cases import DENSE, MIXTURE, QWEN3, RECURRENT, RECURRENT_MIXTURE, hf_config
from tests.model_zoo import ZOO, create_family, publish_experts

EXPERTS = {"num_experts": 3, "expert_ffn_size": 3, "moe_layers": (False, True)}
DELTA = LinearAttention(num_key_heads=4, num_value_heads=8, key_dim=2, value_dim=3, taps=4)
LINEAR = {"linear": DELTA, "linear_layers": (True, False)}


def hf_part(rule: WeightRule, tensor: torch.Tensor) -> torch.Tensor:
    """What the rule takes of one of its tensors: the expert's slice, or everything."""
    return tensor if rule.expert is None else tensor[rule.expert]


def rules_by_hf(rules: list[WeightRule]) -> dict[str, list[WeightRule]]:
    """For each Hugging Face tensor the rules that name it."""
    found: dict[str, list[WeightRule]] = {}
    for rule in rules:
        for name in rule.hf:
            found.setdefault(name, []).append(rule)
    return found


def _hf_tensors(sizes: HfConfig, rule: WeightRule) -> list[torch.Tensor]:
    """Every element is distinct, so that a wrong place is a wrong value."""
    rows = {
        "q_proj": sizes.num_heads * sizes.head_dim * (2 if sizes.family.output_gate else 1),
        "k_proj": sizes.num_kv_heads * sizes.head_dim,
        "v_proj": sizes.num_kv_heads * sizes.head_dim,
        "gate_proj": sizes.ffn_size,
        "up_proj": sizes.ffn_size,
        "gate": sizes.num_experts,
        "embed_tokens": sizes.vocab_size,
        "lm_head": sizes.vocab_size,
        "in_proj_qkv": 2 * 4 * 2 + 8 * 3,
        "in_proj_z": 8 * 3,
        "in_proj_b": 8,
        "in_proj_a": 8,
        "shared_expert_gate": 1,
    }
    columns = {"down_proj": sizes.ffn_size, "o_proj": sizes.num_heads * sizes.head_dim, "out_proj": 8 * 3}
    turned = sizes.family.experts_turned
    fused = {
        "heads": (8,),
        "delta_conv": (2 * 4 * 2 + 8 * 3, 1, 4),
        "expert_gate_up": (sizes.num_experts, sizes.hidden_size, 2 * sizes.expert_ffn_size),
        "expert_down": (sizes.num_experts, sizes.expert_ffn_size, sizes.hidden_size),
    }
    if not turned:
        fused |= {kind: (shape[0], *shape[:0:-1]) for kind, shape in fused.items() if kind.startswith("expert_")}
    tensors, start = [], 0
    for name in rule.hf:
        part = name.split(".")[-2]
        shape = (rows.get(part, sizes.hidden_size), columns.get(part, sizes.hidden_size))
        shape = shape[:1] if name.endswith("bias") or "norm" in name else shape
        shape = fused.get(rule.kind, shape)
        count = int(torch.tensor(shape).prod())
        tensors.append(torch.arange(start, start + count, dtype=torch.float32).reshape(shape))
        start += count
    return tensors


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.sampled_from([1, 2, 4]),
    kv_heads=st.sampled_from([1, 2, 4]),
    repeats=st.sampled_from([1, 2]),
    vocab=st.integers(5, 23),
    tied=st.booleans(),
    family=st.sampled_from(
        [
            *((DENSE, {}), (QWEN3, {}), (MIXTURE, EXPERTS), (RECURRENT, LINEAR)),
            (RECURRENT_MIXTURE, LINEAR | EXPERTS | {"shared_expert_size": 8}),
        ]
    ),
)
def test_every_rule_joins_what_it_split(
    ranks: int, kv_heads: int, repeats: int, vocab: int, tied: bool, family: tuple[str, dict[str, Any]]
) -> None:
    heads = kv_heads * repeats * 4
    class_name, experts = family
    sizes = hf_config(class_name, num_heads=heads, num_kv_heads=kv_heads, vocab_size=vocab, tied=tied, **experts)
    for rule in language_rules(sizes):
        parts = [hf_part(rule, tensor) for tensor in _hf_tensors(sizes, rule)]
        width = 1 if rule.expert is not None else ranks
        shards = [shard_from_hf(rule, parts, sizes, rank, width) for rank in range(width)]
        assert len({shard.shape for shard in shards}) == 1, f"{rule.megatron}: shards of different shapes"
        joined = hf_from_shards(rule, shards, sizes)
        assert len(joined) == len(parts)
        for found, expected in zip(joined, parts, strict=True):
            assert torch.equal(found, expected), rule.megatron


def test_experts_are_slices_of_one_tensor_in_either_layout() -> None:
    """Published: gate_up [E, H, 2I]; transformers 5 saves [E, 2I, H]. Megatron holds [2I, H], gates first."""
    sizes = hf_config(MIXTURE, **EXPERTS)
    (found,) = [rules for name, rules in rules_by_hf(language_rules(sizes)).items() if name.endswith("gate_up_proj")]
    assert [rule.expert for rule in found] == [0, 1, 2]
    (published,) = _hf_tensors(sizes, found[0])
    linear = published.transpose(1, 2).contiguous()
    for tensor, is_published in ((published, True), (linear, False)):
        assert has_published_experts(found[0], tensor.shape, sizes) == is_published
        shards = [shard_from_hf(rule, [hf_part(rule, tensor)], sizes, 0, 1) for rule in found]
        assert all(torch.equal(shard, linear[index]) for index, shard in enumerate(shards))
        parts = [
            hf_from_shards(rule, [shard], sizes, published_experts=is_published)[0]
            for rule, shard in zip(found, shards, strict=True)
        ]
        assert torch.equal(torch.stack(parts), tensor)


def test_transformer_engine_spells_the_same_parameters_otherwise() -> None:
    layer = "decoder.layers.3"
    assert canonical_name(f"{layer}.self_attention.linear_qkv.layer_norm_weight") == f"{layer}.input_layernorm.weight"
    assert canonical_name(f"{layer}.mlp.linear_fc1.layer_norm_weight") == f"{layer}.pre_mlp_layernorm.weight"
    expert = f"{layer}.mlp.experts.local_experts.13.linear_fc2.weight"
    assert canonical_name(f"{layer}.mlp.experts.linear_fc2.weight5", first_expert=8) == expert
    assert canonical_name(f"{layer}.mlp.experts.local_experts.5.linear_fc2.weight", first_expert=8) == expert
    for name in ("embedding.word_embeddings.weight", f"{layer}.mlp.linear_fc1.weight", "vision.blocks.0.norm1.weight"):
        assert canonical_name(name, first_expert=8) == name


def test_fused_qkv_keeps_each_group_together() -> None:
    """4 query heads in 2 groups, head size 1: q0 q1 k0 v0 | q2 q3 k1 v1; rank 1 of 2 holds the second group."""
    sizes = hf_config(head_dim=1)
    rule = WeightRule("x", ("q", "k", "v"), "qkv")
    query, key, value = torch.tensor([0.0, 1, 2, 3]), torch.tensor([10.0, 11]), torch.tensor([20.0, 21])
    assert shard_from_hf(rule, [query, key, value], sizes, 0, 1).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert shard_from_hf(rule, [query, key, value], sizes, 1, 2).tolist() == [2, 3, 11, 21]


def test_gate_and_up_are_split_each_for_itself() -> None:
    rule = WeightRule("x", ("gate", "up"), "gate_up")
    gate, up = torch.tensor([0.0, 1, 2, 3]), torch.tensor([10.0, 11, 12, 13])
    assert shard_from_hf(rule, [gate, up], hf_config(), 1, 2).tolist() == [2, 3, 12, 13]


def test_vocabulary_is_padded_with_zeros_to_equal_shards() -> None:
    rule = WeightRule("x", ("e",), "vocabulary")
    last = shard_from_hf(rule, [torch.ones(10, 3)], hf_config(), 3, 4)
    assert last.shape == (3, 3) and last[:1].eq(1).all() and last[1:].eq(0).all()


def test_names_are_those_of_the_published_checkpoints() -> None:
    tied = {name for rule in language_rules(hf_config()) for name in rule.hf}
    untied = {name for rule in language_rules(hf_config(tied=False)) for name in rule.hf}
    assert "model.layers.1.self_attn.q_proj.bias" in tied and "model.norm.weight" in tied
    assert untied - tied == {"lm_head.weight"}
    for sizes, name in (
        (hf_config(), "visual.blocks.0.norm1.bias"),
        (hf_config(QWEN3), "model.visual.blocks.0.norm1.bias"),
    ):
        assert vision_rule("vision.blocks.0.norm1.bias", sizes).hf == (name,)
    mixture = {name for rule in language_rules(hf_config(MIXTURE, **EXPERTS)) for name in rule.hf}
    assert {name for name in mixture if name.startswith("model.language_model.layers.1.mlp")} == {
        f"model.language_model.layers.1.mlp.{name}"
        for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    }
    assert "model.language_model.layers.0.mlp.down_proj.weight" in mixture
    assert "model.language_model.layers.0.self_attn.q_norm.weight" in mixture


@pytest.mark.parametrize("family", ZOO)
def test_the_table_covers_what_transformers_saves_exactly(family: str, tmp_path: Path) -> None:
    """Names, and for experts the shapes, against files that transformers wrote."""
    from safetensors import safe_open

    folder = create_family(tmp_path / family, family, num_hidden_layers=2)
    sizes = read_hf_config(str(folder))
    if sizes.num_experts and sizes.family.experts_turned:
        publish_experts(folder)
    by_name = rules_by_hf(language_rules(sizes))
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, not a mapping
    assert {name for name in shapes if not name.startswith(sizes.family.vision_prefix)} == by_name.keys()
    for name, rules in by_name.items():
        if rules[0].expert is not None:
            assert len(rules) == shapes[name][0]
            assert has_published_experts(rules[0], shapes[name], sizes) == sizes.family.experts_turned


def test_a_folder_without_weights_says_what_is_missing(tmp_path: Path) -> None:
    from megatron_sr1.weights.load import HfTensors

    with pytest.raises(ValueError, match=r"model\.safetensors"):
        HfTensors(str(tmp_path))


def test_a_header_nested_without_end_is_corrupt(tmp_path: Path) -> None:
    header = b"[" * 100_000
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"model\.safetensors is corrupt: its header cannot be read"):
        read_header(tmp_path / "model.safetensors")
