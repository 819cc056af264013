"""Log-probability (and entropy) of target tokens straight from hidden states and the output head.

    z = (hidden @ weight.T + logit_bias) / temperature
    logprob = z[target] - logsumexp(z),   entropy = -sum_j p_j log p_j

The logits [T, V] never exist: they are made in tiles and, but for a fixed number of them, made again in backward
(chunked.py): 8*T*H*V operations for forward and backward together, against 6*T*H*V with all logits kept. Of these,
6 are backward's and go only over the rows that take part in it.

Numbers. Softmax statistics, log-probs and both gradient accumulators are float32 (float64 for float64 inputs). The
results are the same bits in every run on one machine: the order of every sum is fixed. They are also the same with and
without a graph, so a reference with the same weights is at distance 0.

Tensor parallelism. Every rank of `tp_group` passes the same hidden states and targets and its own rows of the head;
shards may be uneven. The log-probs and the entropy come out equal on all ranks. The gradient of `weight` is this
rank's shard, complete. The gradient of `hidden` is only this rank's part of the sum over the vocabulary and is NOT
reduced here: the region operation through which the caller brought the hidden states to the head does it
(`copy_to_tensor_model_parallel_region` all-reduces in backward,
`gather_from_sequence_parallel_region(tensor_parallel_output_grad=True)` reduce-scatters).

Rounding. `logits="bf16"` rounds every product hidden @ weight.T to bfloat16, in the target's logit, in the softmax and
in backward alike, as an inference engine does that scores with bfloat16 logits: up to 0.05 nats a token.

Rows of backward. Rows that take no part get gradient 0 and cost nothing in backward. `grad_rows` names the others
before ([G], as when a group's advantages are all 0: any gradient that comes in for another row is dropped), at no cost.
Leaving rows out changes the order of sums, so the last bits of the gradient of `weight`.

The main gradient. Backward adds the gradient of `weight` to `accumulate_into` in place, tile by tile, rounded nowhere;
`weight` itself gets zeros and `weight.grad_added_to_main_grad = True`, as from Megatron's linear layers with gradient
accumulation fusion, so that its DDP does not add twice. A weight that is an embedding too needs Megatron's
`zero_out_wgrad = True`, which Megatron sets on tied weights, or DDP drops the embedding's part.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_sr1.kernels.linear_logprob.arguments import (
    accumulator,
    bias_of,
    check_tensors,
    inverse_temperature_of,
    is_rounded,
    vocabulary_size,
)
from megatron_sr1.kernels.linear_logprob.backends import BackendName, select_backend
from megatron_sr1.kernels.linear_logprob.chunked import Plan, chunked_logprob
from megatron_sr1.kernels.linear_logprob.tiles import VocabShard
from megatron_sr1.types import LogProbs

IGNORE_INDEX = -100  # a target with this value is not scored


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    tp_group: ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    logit_bias: Tensor | None = None,
    backend: BackendName = "auto",
    logits: Literal["fp32", "bf16"] = "fp32",
    grad_rows: Tensor | None = None,
    accumulate_into: Tensor | None = None,
    top: bool = False,
) -> LogProbs:
    """Natural-log probability of `targets`, differentiable in `hidden` and `weight`; the module tells the details.

    The host looks at the targets once, and once more at a temperature or grad_rows that is a tensor, which waits for
    the device.

    Args:
        hidden: [T, H] float; T may be 0.
        weight: [V_local, H], same dtype; this rank's rows of the head. A frozen head costs no weight gradient.
        targets: [T] int64 ids in the whole vocabulary; IGNORE_INDEX gives log-prob 0, entropy 0, no gradient.
        temperature: divides the logits; a number, or [T] one per token (no gradient flows to it).
        entropy: also return the entropy, in nats; it is differentiable too.
        tp_group: the ranks that share the vocabulary, in vocabulary order; None: the weight is the whole head.
        vocab_start: id of the first row of `weight`.
        vocab_size: number of true ids; rows of the head from here on are padding, of probability 0 and gradient 0.
            None: there is no padding.
        logit_bias: [V_local], added to the logits before the temperature, as a sampler's logit bias is; constant.
        backend: how tiles are computed (backends.py). Log-probs to be compared bit by bit need the same one.
        logits: whether products are rounded to bfloat16; "fp32" keeps them in the accumulation dtype.
        grad_rows: [G] int64, ascending numbers of the rows that take part in backward; None: all.
        accumulate_into: [V_local, H] in the accumulation dtype, such as `weight.main_grad`.
        top: also say of each target whether no id has a larger logit; of tokens that are not scored it is False.

    Raises:
        ValueError: shapes, dtypes or options that do not fit, a temperature that is not positive, a shard that is not
            where it should be, a target that is no id and not IGNORE_INDEX, a back end that cannot run here, or `top`
            where a gradient is followed.
    """
    if top and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        raise ValueError("linear_logprob: top=True needs torch.no_grad(): it is for measuring, not for training.")
    check_tensors(hidden, weight, targets)
    size = vocabulary_size(weight, tp_group, vocab_start, vocab_size)
    scored = _scored_rows(targets, size)
    columns = min(max(size - vocab_start, 0), weight.shape[0])
    plan = Plan(
        shard=VocabShard(vocab_start, columns, tp_group, bias_of(logit_bias, weight)),
        backend=select_backend(backend, hidden),
        entropy=entropy,
        rounded=is_rounded(logits),
        grad_rows=_grad_rows(grad_rows, targets, scored),
        accumulate_into=accumulator(accumulate_into, weight),
        top=top,
    )
    return _score(hidden, weight, targets, inverse_temperature_of(temperature, hidden), scored, plan)


def _score(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    inverse_temperature: Tensor | None,
    scored: Tensor | None,
    plan: Plan,
) -> LogProbs:
    """Unscored rows are taken out, not masked: they cost nothing, and what they hold cannot reach a gradient."""
    if scored is None:
        logprobs, nats, is_top = chunked_logprob(hidden, weight, targets, inverse_temperature, plan)
        return LogProbs(logprobs, nats, is_top=is_top)
    if inverse_temperature is not None:
        inverse_temperature = inverse_temperature[scored]
    parts = chunked_logprob(hidden.index_select(0, scored), weight, targets[scored], inverse_temperature, plan)
    logprobs, nats, is_top = (
        part if part is None else part.new_zeros(targets.shape).index_copy(0, scored, part) for part in parts
    )
    assert logprobs is not None
    return LogProbs(logprobs, nats, is_top=is_top)


def _grad_rows(rows: Tensor | None, targets: Tensor, scored: Tensor | None) -> Tensor | None:
    """The chosen rows, as places among the scored rows; None where nothing is chosen beforehand."""
    if rows is None:
        return None
    num_rows = len(targets)
    if rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(f"linear_logprob: grad_rows is {rows.dtype} {tuple(rows.shape)}; it must be int64, [G].")
    if bool(((rows < 0) | (rows >= num_rows)).any() | (rows.diff() <= 0).any()):
        raise ValueError(
            f"linear_logprob: grad_rows must be ascending row numbers, each once, in [0, {num_rows}): "
            f"got {rows.numel()} numbers that are not. Sort them and take out the repeated ones."
        )
    if scored is None:
        return rows
    chosen = torch.zeros(num_rows, dtype=torch.bool, device=rows.device)
    chosen[rows] = True
    return chosen[scored].nonzero().squeeze(1)


def _scored_rows(targets: Tensor, size: int) -> Tensor | None:
    """Indices of the rows to score, None where that is all of them. One look at the data on the host."""
    outside = (targets < 0) | (targets >= size)
    if not outside.any():
        return None
    ignored = targets == IGNORE_INDEX
    wrong = (outside & ~ignored).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"linear_logprob: targets[{row}] is {int(targets[row])}, not in the vocabulary [0, {size}) and not "
            f"{IGNORE_INDEX} (ignored). {len(wrong)} of {len(targets)} targets are like this."
        )
    return (~ignored).nonzero().squeeze(1)
