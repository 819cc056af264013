"""The gated delta rule over packed rows whose sequences share prefixes, against transformers' token by token, each
sequence for itself; and the convolution before it against torch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

from megatron_sr1.kernels.delta_rule import CHUNK, causal_convolution, gated_delta_rule, row_plan
from tests.policy_cases import relative_error

TOLERANCE = 2e-6  # relative, fp32
KEYS, SERVED, KEY, VALUE, CHANNELS, TAPS = 2, 3, 8, 16, 10, 4
# lengths of a row's segments and what each follows: less than a chunk, a chunk, one more, one of two tokens whose
# neighbours the convolution reaches over, a parent shorter than the convolution
ROWS = {
    "sequences": ([5, CHUNK, 1, 2 * CHUNK + 1, 3], [-1] * 5),
    "families": ([5, 70, CHUNK, 1, 130, 2, 3, 66, 2, 5, 1], [-1, -1, 1, 1, -1, 4, 4, -1, -1, 8, 8]),
}


def _leaves(num_tokens: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    rule = [drawn(num_tokens, KEYS, KEY), drawn(num_tokens, KEYS, KEY), drawn(num_tokens, KEYS, SERVED, VALUE)]
    rule += [-drawn(num_tokens, KEYS, SERVED).abs(), drawn(num_tokens, KEYS, SERVED).sigmoid()]
    return [x.requires_grad_() for x in (*rule, drawn(num_tokens, CHANNELS), drawn(CHANNELS, TAPS))]


def _one_by_one(leaves: list[Tensor], edges: list[int], parents: list[int]) -> tuple[Tensor, Tensor]:
    query, key, value, decay, rate, x, weight = leaves
    outs, convolved = [], []
    for number, parent in enumerate(parents):
        own = range(edges[number], edges[number + 1])
        tokens = [*(range(edges[parent], edges[parent + 1]) if parent >= 0 else ()), *own]
        q, k = (part[tokens][None].repeat_interleave(SERVED, 2) for part in (query, key))
        v, g, b = (part[tokens][None].flatten(2, 3) for part in (value, decay, rate))
        out, _ = torch_recurrent_gated_delta_rule(q, k, v, g, b, use_qk_l2norm_in_kernel=True)
        outs.append(out[0, -len(own) :].unflatten(1, (KEYS, SERVED)))
        padded = F.conv1d(x[tokens].T[None], weight[:, None], padding=TAPS - 1, groups=CHANNELS)[0, :, : len(tokens)]
        convolved.append(F.silu(padded.T[-len(own) :]))
    return torch.cat(outs), torch.cat(convolved)


def test_a_packed_row_is_its_sequences() -> None:
    for name, (lengths, parents) in ROWS.items():
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        edges = cu_seqlens.tolist()
        leaves = _leaves(edges[-1])
        plan = row_plan(cu_seqlens, parents, TAPS)
        found = (gated_delta_rule(*leaves[:5], plan), causal_convolution(*leaves[5:], plan))
        expected = _one_by_one(leaves, edges, parents)
        asked = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in expected]
        for ours, theirs in zip(found, expected, strict=True):
            assert relative_error(ours, theirs) < TOLERANCE, name
        gradients = [torch.autograd.grad(outs, leaves, asked) for outs in (found, expected)]
        for number, (ours, theirs) in enumerate(zip(*gradients, strict=True)):
            assert relative_error(ours, theirs) < TOLERANCE, (name, number)
