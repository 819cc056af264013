"""DeepStack (Meng et al. 2024, arXiv 2406.04334): features of several vision layers enter the first language layers.

The features ride along with the hidden states, `cat([hidden, ds_1, ..., ds_n])` along the tokens. Each layer takes the
first part, computes, adds ds_1 and passes the rest on; after n layers nothing is left. So pipeline stages, chunks and
recomputation move them like any other activation.

Shapes: T_part tokens of the row in this rank's hidden states (context and sequence parallelism split them), n features
that remain.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_sr1.kernels.delta_rule import RowPlan
from megatron_sr1.packing import AttentionCall
from megatron_sr1.policy.layers.routing import RankRouting, routed


@dataclass
class PackedRow(PackedSeqParams):
    """A packed row as the layers see it."""

    num_local_tokens: int = 0  # T_part: without what rides along
    calls: tuple[AttentionCall, ...] = ()  # of attention; none where every segment is a sequence
    plan: RowPlan | None = None  # of recurrent layers; None where the model has none
    order: Tensor | None = None  # [T] see `packing.context.row_order`; with calls under context parallelism
    routing: RankRouting | None = None  # None: routers choose for themselves


class DeepstackLayer(TransformerLayer):
    """A layer that adds the first of the features that ride along with its input. Without any it is a plain layer."""

    def __init__(self, config: TransformerConfig, *arguments: Any, adds_gradients: bool, **options: Any) -> None:
        """
        Args:
            adds_gradients: the products of Transformer Engine's linear layers add the gradients of weights to
                `weight.main_grad` themselves. Said to the layers alone: Megatron-Core's own linear layers, of which the
                head is one, need apex for it.
        """
        if adds_gradients:
            config = copy(config)
            config.gradient_accumulation_fusion = True
        super().__init__(config, *arguments, **options)

    def forward(
        self, hidden_states: Tensor, *arguments: Any, packed_seq_params: PackedRow, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[(1 + n) * T_part, 1, H] -> [(1 + max(n - 1, 0)) * T_part, 1, H], and Megatron's context, passed through."""
        size = packed_seq_params.num_local_tokens
        assert size > 0 and len(hidden_states) % size == 0, (tuple(hidden_states.shape), size)
        hidden, *features = hidden_states.split(size)
        with routed(self, packed_seq_params.routing):
            output, context = super().forward(hidden, *arguments, packed_seq_params=packed_seq_params, **options)
        if features:
            output = torch.cat([output + features[0], *features[1:]])
        return output, context


def with_deepstack(hidden: Tensor, features: list[Tensor]) -> Tensor:
    """What the first layer takes: hidden [T_part, 1, H] and, for each language layer that adds one, a feature
    [T_part, 1, H] that is 0 at text tokens -> [(1 + n) * T_part, 1, H]."""
    assert all(feature.shape == hidden.shape for feature in features)
    return torch.cat([hidden, *features]) if features else hidden
