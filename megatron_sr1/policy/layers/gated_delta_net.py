"""A layer's gated delta rule, in place of attention: a recurrent state for each head (Gated Delta Networks, Yang et
al., arXiv 2412.06464; of Qwen3.5).

    q, k, v = silu(convolution(W_qkv x))    z = W_z x    b = sigmoid(W_b x)    g = -exp(A) softplus(W_a x + dt)
    y = W_out (RMSNorm(rule(q, k, v, g, b)) * silu(z))

All that a key head and the value heads that it serves need of x comes of neighbouring rows of one product, so the heads
are split among tensor-parallel ranks as they lie, whatever their number.

Shapes: T tokens of a packed row, g key heads of this rank with dk channels, each of which serves r value heads with dv
channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_sr1.config import LinearAttention
from megatron_sr1.kernels.delta_rule import RowPlan, causal_convolution, gated_delta_rule
from megatron_sr1.platform.norm import rms_norm
from megatron_sr1.policy.layers.deepstack import PackedRow


@dataclass
class GatedDeltaNetSubmodules:
    """Classes of the two products: split by outputs, and by inputs."""

    in_proj: Any
    out_proj: Any


class GatedDeltaNet(MegatronModule):
    """Takes the place of Megatron-Core's SelfAttention in a layer."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: GatedDeltaNetSubmodules,
        layer_number: int,
        sizes: LinearAttention,
        pg_collection: ProcessGroupCollection,
        **_: object,
    ) -> None:
        """`sizes`: of the whole layer. The rest is Megatron-Core's."""
        super().__init__(config)
        self.layer_number, self.sizes, self.tp_group = layer_number, sizes, pg_collection.tp
        heads = sizes.num_key_heads // self.tp_group.size()
        values = heads * sizes.values_per_key
        products: dict[str, Any] = {
            "config": config,
            "bias": False,
            "skip_bias_add": False,
            "is_expert": False,
            "tp_group": self.tp_group,
        }
        self.in_proj = build_module(
            submodules.in_proj,
            config.hidden_size,
            sizes.num_key_heads * sizes.rows_per_key,
            init_method=config.init_method,
            gather_output=False,
            tp_comm_buffer_name="qkv",
            **products,
        )
        self.out_proj = build_module(
            submodules.out_proj,
            sizes.num_value_heads * sizes.value_dim,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            tp_comm_buffer_name="proj",
            **products,
        )
        new: dict[str, Any] = {"dtype": config.params_dtype}
        self.conv_weight = torch.nn.Parameter(torch.empty(heads * sizes.channels_per_key, 1, sizes.taps, **new))
        self.A_log = torch.nn.Parameter(torch.empty(values, **new))
        self.dt_bias = torch.nn.Parameter(torch.empty(values, **new))
        self.norm_weight = torch.nn.Parameter(torch.empty(sizes.value_dim, **new))
        modules = config.recompute_modules or ()
        self.recomputes = config.recompute_granularity == "selective" and "core_attn" in modules

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, *, packed_seq_params: PackedRow, **_: object
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [T, 1, H] (a part under sequence parallelism) -> the same, and no bias."""
        plan = packed_seq_params.plan
        assert plan is not None, "rows of a model with such layers come with a plan"
        sizes = self.sizes
        mixed, _bias = self.in_proj(hidden_states)  # [T, 1, g * rows]
        mixed = mixed[:, 0].unflatten(1, (-1, sizes.rows_per_key))
        # each tensor-parallel rank has other heads under the same factors: their gradients are added up
        factors = copy_to_tensor_model_parallel_region(self.norm_weight, group=self.tp_group)
        if self.recomputes and torch.is_grad_enabled():
            out = checkpoint(self._mixed, mixed, factors, plan, use_reentrant=False, preserve_rng_state=False)
        else:
            out = self._mixed(mixed, factors, plan)
        return self.out_proj(out[:, None])

    def _mixed(self, mixed: Tensor, factors: Tensor, plan: RowPlan) -> Tensor:
        """[T, g, rows] -> [T, g * r * dv]."""
        sizes, served = self.sizes, self.sizes.values_per_key
        conv, gate, rate, decay = mixed.split([sizes.channels_per_key, served * sizes.value_dim, served, served], dim=2)
        heads = conv.shape[1]
        conv = causal_convolution(conv.flatten(1), self.conv_weight[:, 0], plan).unflatten(1, (heads, -1))
        query, key, value = conv.split([sizes.key_dim, sizes.key_dim, served * sizes.value_dim], dim=2)
        shape = (heads, served)
        speed = self.A_log.float().exp().view(shape)
        decay = -speed * F.softplus(decay.float() + self.dt_bias.float().view(shape))  # [T, g, r]
        value = value.unflatten(2, (served, -1))
        found = gated_delta_rule(query, key, value, decay, rate.sigmoid(), plan)  # [T, g, r, dv]
        normed = rms_norm(found.float(), factors.float(), self.config.layernorm_epsilon)
        gated = normed * F.silu(gate.unflatten(2, (served, -1)).float())
        return gated.to(mixed.dtype).flatten(1)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Megatron-Core's, which takes what is no linear layer's for the same on all tensor-parallel ranks."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        split = {"conv_weight": self.conv_weight, "A_log": self.A_log, "dt_bias": self.dt_bias}
        return state | make_sharded_tensors_for_checkpoint(
            split,
            prefix,
            dict.fromkeys(split, 0),
            sharded_offsets=sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
