"""The weight table: every layout splits and joins to the same bits, by hand-made expectations and for random sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sr1.convert.table import WeightRule, hf_from_shards, language_rules, shard_from_hf, vision_rule


@dataclass(frozen=True)
class Sizes:
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    vocab_size: int = 10
    tied: bool = True
    head: int = 2
    hidden: int = 4
    inner: int = 8


def _hf_tensors(sizes: Sizes, rule: WeightRule) -> list[torch.Tensor]:
    """Every element is distinct, so that a wrong place is a wrong value."""
    rows = {
        "q_proj": sizes.num_heads * sizes.head,
        "k_proj": sizes.num_kv_heads * sizes.head,
        "v_proj": sizes.num_kv_heads * sizes.head,
        "gate_proj": sizes.inner,
        "up_proj": sizes.inner,
        "embed_tokens": sizes.vocab_size,
        "lm_head": sizes.vocab_size,
    }
    columns = {"down_proj": sizes.inner, "o_proj": sizes.num_heads * sizes.head}
    tensors, start = [], 0
    for name in rule.hf:
        part = name.split(".")[-2]
        shape = (rows.get(part, sizes.hidden), columns.get(part, sizes.hidden))
        shape = shape[:1] if name.endswith("bias") or "norm" in name else shape
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
)
def test_every_rule_joins_what_it_split(ranks: int, kv_heads: int, repeats: int, vocab: int, tied: bool) -> None:
    heads = kv_heads * repeats * 4
    sizes = Sizes(num_heads=heads, num_kv_heads=kv_heads, vocab_size=vocab, tied=tied)
    for rule in language_rules(sizes):
        tensors = _hf_tensors(sizes, rule)
        shards = [shard_from_hf(rule, tensors, sizes, rank, ranks) for rank in range(ranks)]
        assert len({shard.shape for shard in shards}) == 1, f"{rule.megatron}: shards of different shapes"
        joined = hf_from_shards(rule, shards, sizes)
        assert len(joined) == len(tensors)
        for found, expected in zip(joined, tensors, strict=True):
            assert torch.equal(found, expected), rule.megatron


def test_fused_qkv_keeps_each_group_together() -> None:
    """4 query heads in 2 groups, head size 1: q0 q1 k0 v0 | q2 q3 k1 v1; rank 1 of 2 holds the second group."""
    sizes = Sizes(head=1)
    rule = WeightRule("x", ("q", "k", "v"), "qkv")
    query, key, value = torch.tensor([0.0, 1, 2, 3]), torch.tensor([10.0, 11]), torch.tensor([20.0, 21])
    assert shard_from_hf(rule, [query, key, value], sizes, 0, 1).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert shard_from_hf(rule, [query, key, value], sizes, 1, 2).tolist() == [2, 3, 11, 21]


def test_gate_and_up_are_split_each_for_itself() -> None:
    rule = WeightRule("x", ("gate", "up"), "gate_up")
    gate, up = torch.tensor([0.0, 1, 2, 3]), torch.tensor([10.0, 11, 12, 13])
    assert shard_from_hf(rule, [gate, up], Sizes(), 1, 2).tolist() == [2, 3, 12, 13]


def test_vocabulary_is_padded_with_zeros_to_equal_shards() -> None:
    rule = WeightRule("x", ("e",), "vocabulary")
    last = shard_from_hf(rule, [torch.ones(10, 3)], Sizes(), 3, 4)
    assert last.shape == (3, 3) and last[:1].eq(1).all() and last[1:].eq(0).all()


def test_names_are_those_of_the_published_checkpoints() -> None:
    tied = {name for rule in language_rules(Sizes()) for name in rule.hf}
    untied = {name for rule in language_rules(Sizes(tied=False)) for name in rule.hf}
    assert "model.layers.1.self_attn.q_proj.bias" in tied and "model.norm.weight" in tied
    assert untied - tied == {"lm_head.weight"}
    assert vision_rule("vision.blocks.0.attn.qkv.weight").hf == ("visual.blocks.0.attn.qkv.weight",)


def test_the_table_covers_a_real_checkpoint_exactly(tiny_model_dir: str) -> None:
    from safetensors import safe_open

    with safe_open(Path(tiny_model_dir) / "model.safetensors", "pt") as file:
        names = {name for name in file.keys() if not name.startswith("visual.")}  # noqa: SIM118, not a mapping
    assert names == {name for rule in language_rules(Sizes()) for name in rule.hf}


def test_a_folder_without_weights_says_what_is_missing(tmp_path: Path) -> None:
    from megatron_sr1.convert.weights import HfTensors

    with pytest.raises(ValueError, match=r"model\.safetensors"):
        HfTensors(str(tmp_path))
