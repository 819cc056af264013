"""The fused back end's forward: one Triton kernel multiplies hidden states with the head and reduces the logits.

A program owns `rows` tokens and `split` columns. It walks over its columns in blocks: a block of logits is summed in
float32 registers, folded there into the state of each row (max, sum of exp, z of the target, sum of exp * shifted z)
and dropped. The states of the splits, [S, 4, T] with S = V / split, are merged in split order: no atomics.

Programs are numbered so that `group` blocks of rows run over the same columns at about the same time: their hidden
states stay in the L2 cache while the head streams past once per group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_sr1.kernels.linear_logprob.tiles import Backend, Rows, VocabShard, dtypes, empty_state
from megatron_sr1.kernels.linear_logprob.triton_tiles import LOG2_E, TritonTiles


@dataclass(frozen=True)
class Blocks:
    """Sizes of the kernel's blocks, fixed before it runs: results never depend on a measurement."""

    rows: int
    columns: int
    depth: int  # of one step of the sum over H
    split: int  # columns of one program, a multiple of `columns`
    group: int  # blocks of rows that share the head's columns
    warps: int
    stages: int  # of the pipeline of loads


L2_BYTES = 16 * 2**20  # of hidden states that a group keeps there: a third of an H100's
SPLIT_COLUMNS = 4096


def blocks_for(hidden_size: int, dtype: torch.dtype) -> Blocks:
    """The block sizes for hidden states [T, H] of this dtype."""
    rows, columns, depth, warps, stages = (64, 64, 32, 8, 2) if dtype.itemsize == 4 else (128, 256, 64, 8, 3)
    group = max(1, min(32, L2_BYTES // (rows * hidden_size * dtype.itemsize)))
    return Blocks(rows, columns, depth, max(SPLIT_COLUMNS // columns, 1) * columns, group, warps, stages)


def fused_statistics(
    hidden: Tensor, weight: Tensor, rows: Rows, shard: VocabShard, entropy: bool, rounded: bool
) -> Tensor:
    """The state [4, T] over this rank's columns: max, sum of exp(z - max), z of the target, and, for the entropy,
    sum of exp(z - max) * (z - max). Memory beyond that: S * 4 * T float32."""
    accumulate, operand = dtypes(hidden)
    num_tokens, hidden_size = hidden.shape
    if num_tokens == 0 or shard.columns == 0:
        return empty_state(num_tokens, accumulate, hidden.device)
    hidden, head = hidden.to(operand).contiguous(), weight[: shard.columns].to(operand).contiguous()
    blocks = blocks_for(hidden_size, operand)
    num_splits = triton.cdiv(shard.columns, blocks.split)
    parts = torch.empty(num_splits, 4, num_tokens, dtype=accumulate, device=hidden.device)
    temperature, bias = rows.inverse_temperature, shard.bias
    _fold_blocks[(triton.cdiv(num_tokens, blocks.rows) * num_splits,)](
        TensorDescriptor.from_tensor(hidden, [blocks.rows, blocks.depth]),
        TensorDescriptor.from_tensor(head, [blocks.columns, blocks.depth]),
        rows.targets,
        parts if temperature is None else temperature,  # a pointer that is not followed
        parts if bias is None else bias,
        parts,
        num_tokens,
        shard.columns,
        0 if temperature is None else temperature.stride(0),
        HIDDEN=hidden_size,
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        DEPTH=blocks.depth,
        SPLIT=blocks.split,
        GROUP=blocks.group,
        HAS_TEMPERATURE=temperature is not None,
        HAS_BIAS=bias is not None,
        ENTROPY=entropy,
        ROUNDED=rounded,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        enable_fp_fusion=False,  # as in triton_tiles.py: the largest exponential must be exactly 1
    )
    return _merge_splits(parts)


FUSED = Backend(TritonTiles(), fused_statistics)


def _merge_splits(parts: Tensor) -> Tensor:
    """[S, 4, T] -> [4, T], the same sums in the same order in every run."""
    tops, totals, z_targets, weighted = parts.unbind(1)
    top = tops.amax(0)
    drop = tops - top
    decay = drop.exp()
    return torch.stack([top, (decay * totals).sum(0), z_targets.amax(0), (decay * (weighted + drop * totals)).sum(0)])


@triton.jit
def _fold_blocks(
    hidden, head, targets, inverse_temperature, bias, parts,
    num_tokens, num_columns, temperature_stride,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SPLIT: tl.constexpr,
    GROUP: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, HAS_BIAS: tl.constexpr, ENTROPY: tl.constexpr,
    ROUNDED: tl.constexpr,
):  # fmt: skip
    """State [4, ROWS] of one block of rows over one split of the columns, into parts[split]."""
    row_block, split = _place(tl.program_id(0), tl.cdiv(num_tokens, ROWS), tl.cdiv(num_columns, SPLIT), GROUP)
    row = row_block * ROWS + tl.arange(0, ROWS)
    known = row < num_tokens
    target = tl.load(targets + row, mask=known, other=-1)
    scale = tl.full([ROWS], 1.0, tl.float32)
    if HAS_TEMPERATURE:
        scale = tl.load(inverse_temperature + row.to(tl.int64) * temperature_stride, mask=known, other=1.0)
    smallest = -3.4028234663852886e38  # of float32; it can be subtracted from itself
    top = tl.full([ROWS], smallest, tl.float32)
    z_target = tl.full([ROWS], smallest, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    for left in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, num_columns), COLUMNS):
        z = tl.zeros([ROWS, COLUMNS], tl.float32)
        for depth in range(0, HIDDEN, DEPTH):
            z = tl.dot(hidden.load([row_block * ROWS, depth]), head.load([left, depth]).T, z, input_precision="ieee")
        if ROUNDED:
            z = z.to(tl.bfloat16).to(tl.float32)
        column = left + tl.arange(0, COLUMNS)
        inside = column < num_columns
        if HAS_BIAS:
            z += tl.load(bias + column, mask=inside, other=0.0)[None, :]
        if HAS_TEMPERATURE:
            z *= scale[:, None]
        z = tl.where(inside[None, :], z, float("-inf"))
        at_target = column[None, :] == target[:, None]
        z_target = tl.maximum(z_target, tl.max(tl.where(at_target, z, float("-inf")), 1))
        new_top = tl.maximum(top, tl.max(z, 1))
        drop = top - new_top
        decay = tl.exp2(drop * LOG2_E)
        shifted = z - new_top[:, None]
        exponentials = tl.exp2(shifted * LOG2_E)
        if ENTROPY:
            weighted = decay * (weighted + drop * total)
            weighted += tl.sum(exponentials * tl.where(inside[None, :], shifted, 0.0), 1)
        total = total * decay + tl.sum(exponentials, 1)
        top = new_top
    part = parts + split.to(tl.int64) * 4 * num_tokens + row
    tl.store(part, top, mask=known)
    tl.store(part + num_tokens, total, mask=known)
    tl.store(part + 2 * num_tokens, z_target, mask=known)
    tl.store(part + 3 * num_tokens, weighted, mask=known)


@triton.jit
def _place(program, num_row_blocks, num_splits, GROUP: tl.constexpr):
    """(row block, split) of a program: within a group of row blocks, rows move fastest."""
    group = program // (GROUP * num_splits)
    first = group * GROUP
    size = tl.minimum(num_row_blocks - first, GROUP)
    inner = program % (GROUP * num_splits)
    return first + inner % size, inner // size
