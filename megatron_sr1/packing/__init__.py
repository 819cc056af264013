"""Sequences into packed rows, and per-token results back.

positions.py  where a sequence's images are, and its mRoPE positions
bins.py       which sequences share a row, which a rank
rows.py       the packed row itself
context.py    which of its tokens a context-parallel rank holds
attention.py  which of its tokens attend to which, as calls of variable-length attention
tokens.py     per-token values: rows <-> sequences
"""

from megatron_sr1.packing.attention import AttentionCall, PaddedRuns, attention_calls
from megatron_sr1.packing.bins import Family, split_for_ranks, split_groups
from megatron_sr1.packing.positions import image_starts, mrope_positions
from megatron_sr1.packing.rows import empty_row, moved, pack
from megatron_sr1.packing.tokens import gather_rows, scatter_rows

__all__ = [
    "AttentionCall",
    "Family",
    "PaddedRuns",
    "attention_calls",
    "empty_row",
    "gather_rows",
    "image_starts",
    "moved",
    "mrope_positions",
    "pack",
    "scatter_rows",
    "split_for_ranks",
    "split_groups",
]
