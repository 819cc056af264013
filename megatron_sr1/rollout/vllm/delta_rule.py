"""The gated delta rule of an engine on a CPU, in fp32 and for any size of heads: vLLM's own operation there takes bf16
and heads of 128 channels alone.

Shapes: T tokens of all sequences that a forward pass has, N sequences, H hidden, C channels of the convolution, g key
heads of this rank, each of which serves r value heads.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sr1.kernels.delta_rule import continued_convolution, continued_rule
from megatron_sr1.rollout.vllm.private import compute_with


def use_torch_rule(model: torch.nn.Module) -> None:
    """Has the layers of vLLM's `model` that have such a rule compute it here."""
    from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention

    for module in model.modules():
        if isinstance(module, QwenGatedDeltaNetAttention):
            compute_with(module, partial(_forward, module))


def _forward(layer: Any, hidden: Tensor) -> Tensor:
    """[T, H] -> [T, H]."""
    from vllm.forward_context import get_forward_context

    mixed, _ = layer.in_proj_qkvz(hidden)
    rates, _ = layer.in_proj_ba(hidden)
    value_width = layer.value_dim // layer.tp_size
    conv, gate = mixed.split([mixed.shape[1] - value_width, value_width], dim=1)
    gate = gate.unflatten(1, (-1, layer.head_v_dim))
    out = torch.zeros_like(gate)
    of_layers = get_forward_context().attn_metadata
    if of_layers is not None:  # else vLLM measures its memory
        found = _attended(layer, of_layers[layer.prefix], conv, rates)
        out[: len(found)] = found.to(out.dtype)
    output, _ = layer.out_proj(layer.norm(out, gate).flatten(1))
    return output


def _attended(layer: Any, metadata: Any, conv: Tensor, rates: Tensor) -> Tensor:
    """[tokens, value heads, dv] of the tokens that are sequences' and no filling; the caches go on by them."""
    from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first

    number, decoding = metadata.num_decodes + metadata.num_prefills, metadata.num_decodes
    if not number:
        return conv.new_zeros(0, *layer.A_log.shape, layer.head_v_dim)
    assert metadata.spec_sequence_masks is None, "the engine guesses no tokens"
    edges = metadata.non_spec_query_start_loc[: number + 1]
    lengths, num_tokens = torch.diff(edges).tolist(), int(edges[-1])
    slots = metadata.non_spec_state_indices_tensor[:number].long()
    begun = torch.ones(number, dtype=torch.bool)
    if metadata.num_prefills:
        begun[decoding:] = metadata.has_initial_state[decoding:number]

    earlier, states = layer.kv_cache[0], layer.kv_cache[1]  # [slots, K - 1, C], [slots, g * r, dv, dk]
    earlier = earlier.transpose(1, 2) if is_conv_state_dim_first() else earlier
    weight = layer.conv1d.weight.flatten(1)  # [C, K]
    x, last = continued_convolution(conv[:num_tokens], weight, lengths, _of(earlier, slots, begun))
    earlier[slots] = last.to(earlier.dtype)

    heads, served = layer.num_k_heads // layer.tp_size, layer.num_v_heads // layer.num_k_heads
    width = layer.key_dim // layer.tp_size
    query, key, value = x.split([width, width, layer.value_dim // layer.tp_size], dim=1)
    query, key = (part.unflatten(1, (heads, -1)) for part in (query, key))
    rate, fading = (part[:num_tokens].unflatten(1, (heads, served)) for part in rates.chunk(2, dim=1))
    speed, start = (part.float().view(heads, served) for part in (layer.A_log, layer.dt_bias))
    decay = -speed.exp() * F.softplus(fading.float() + start)
    before = _of(states, slots, begun).float().mT.unflatten(1, (heads, served))
    value = value.unflatten(1, (heads, served, -1))
    out, after = continued_rule(query, key, value, decay, rate.float().sigmoid(), lengths, before)
    states[slots] = after.flatten(1, 2).mT.to(states.dtype)
    return out.flatten(1, 2)


def _of(cache: Tensor, slots: Tensor, begun: Tensor) -> Tensor:
    """What the cache has of sequences [N], 0 of those that have not begun."""
    return torch.where(begun.view(-1, *[1] * (cache.dim() - 1)), cache[slots], 0)
