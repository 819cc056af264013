"""The two Triton kernels behind fused_stream_loss, and what they are made of. triton_loss.py launches them.

Names, formulas and the order of the six terms are those of fused.py. Everything is float32. Shapes: R scored
tokens, S streams, B blocks of tokens.
"""

from __future__ import annotations

import triton
from triton import language as tl

NUM_TERMS = tl.constexpr(6)


@triton.jit
def _exp(x):
    """e^x to the last digits. The GPU's own is exp2(x * log2 e), which loses one digit at |x| = 5 and two at 50, so
    x is split as n ln 2 + rest, the constants are Cephes' (expf.c). Beyond 80, where 2^n may overflow, digits do not
    matter: infinity, 0 and nan come out right."""
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = (x - n * 0.693359375) + n * 2.12194440e-4
    return tl.where(tl.abs(x) < 80.0, tl.exp2(n) * tl.exp2(rest * 1.4426950408889634), tl.exp(x))


@triton.jit
def _k3(d):
    """(e^d - d - 1, e^d - 1). Below 1 the first is its series, d^2 (1/2! + d/3! + ... + d^10/12!): the difference of
    nearly equal numbers would keep no digit of it."""
    series = tl.full(d.shape, 1.0, tl.float32)
    for k in tl.static_range(12, 2, -1):
        series = 1.0 + d * series * (1.0 / k)
    series = 0.5 * d * d * series
    is_small = tl.abs(d) < 1.0
    expm1 = _exp(d) - 1.0
    return tl.where(is_small, series, expm1 - d), tl.where(is_small, series + d, expm1)


@triton.jit
def _kl_and_slope(d, k3, expm1, ESTIMATOR: tl.constexpr):
    """The estimate k1, k2 or k3, by its number, and its derivative in the trainer log-prob. Triton 3.6 hands no text of
    a tuple on to a function."""
    if ESTIMATOR == 1:
        kl, slope = -d, tl.full(d.shape, 1.0, tl.float32)
    elif ESTIMATOR == 2:
        kl, slope = 0.5 * d * d, -d
    else:
        kl, slope = k3, -expm1
    return kl, slope


@triton.jit
def _surrogate(ratio, advantage, low, high, dual, HAS_DUAL: tl.constexpr):
    """The value, and where PPO clipping and dual clipping hold it. Written with where: maximum would lose a nan."""
    unclipped = -advantage * ratio
    bounded = -advantage * tl.minimum(tl.maximum(ratio, low), high)
    clipped = bounded > unclipped
    value = tl.where(clipped, bounded, unclipped)
    if HAS_DUAL:
        ceiling = -advantage * dual
        dual_clipped = (advantage < 0) & (value > ceiling)
        value = tl.where(dual_clipped, ceiling, value)
    else:
        dual_clipped = tl.full(value.shape, 0, tl.int1)
    return value, clipped, dual_clipped


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def loss_of_blocks(
    trainer_ptr: tl.tensor,
    old_ptr: tl.tensor,
    ref_ptr: tl.tensor,
    advantages_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    gradient_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    num_tokens: tl.tensor,
    num_blocks: tl.tensor,
    stream_weights: tl.tensor,
    kl_coefs: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    dual: tl.tensor,
    HAS_DUAL: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    ESTIMATORS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One block of tokens, all streams."""
    block = tl.program_id(0)
    token = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < num_tokens
    trainer = tl.load(trainer_ptr + token, inside, other=0.0)
    ratio = _exp(trainer - tl.load(old_ptr + token, inside, other=0.0).to(tl.float32))
    if HAS_REFERENCE:
        d = tl.load(ref_ptr + token, inside, other=0.0).to(tl.float32) - trainer
        k3, expm1 = _k3(d)
    of_ratio = tl.zeros([BLOCK], tl.float32)  # d loss / d ratio
    of_kl = tl.zeros([BLOCK], tl.float32)
    for s in tl.static_range(len(ESTIMATORS)):
        row = token + s * num_tokens
        weight = tl.load(weights_ptr + row, inside, other=0.0).to(tl.float32)
        advantage = tl.load(advantages_ptr + row, inside, other=0.0).to(tl.float32)
        active = weight != 0.0  # 0 * infinity is no part of a sum
        own_ratio = tl.where(active, ratio, 1.0)
        value, clipped, dual_clipped = _surrogate(own_ratio, advantage, low[s], high[s], dual[s], HAS_DUAL[s])
        of_ratio += tl.where(clipped | dual_clipped, 0.0, stream_weights[s] * weight * -advantage)
        kl = tl.zeros([BLOCK], tl.float32)
        if HAS_REFERENCE:
            own_kl, slope = _kl_and_slope(d, k3, expm1, ESTIMATORS[s])
            kl = tl.where(active, own_kl, 0.0)
            coefficient = kl_coefs[s] * weight
            of_kl += tl.where(coefficient == 0.0, 0.0, coefficient * slope)
        sums = partials_ptr + s * NUM_TERMS * num_blocks + block
        tl.store(sums, tl.sum(weight))
        tl.store(sums + num_blocks, tl.sum(weight * value))
        tl.store(sums + 2 * num_blocks, tl.sum(weight * kl))
        tl.store(sums + 3 * num_blocks, tl.sum(weight * own_ratio))
        tl.store(sums + 4 * num_blocks, tl.sum(tl.where(clipped, weight, 0.0)))
        tl.store(sums + 5 * num_blocks, tl.sum(tl.where(dual_clipped, weight, 0.0)))
    gradient = tl.where(of_ratio == 0.0, 0.0, of_ratio * ratio) + of_kl
    tl.store(gradient_ptr + token, gradient, inside)


@triton.jit(do_not_specialize=["num_blocks"])
def add_blocks(
    partials_ptr: tl.tensor,
    totals_ptr: tl.tensor,
    loss_ptr: tl.tensor,
    num_blocks: tl.tensor,
    stream_weights: tl.tensor,
    kl_coefs: tl.tensor,
    STREAMS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Totals [S, 6] of partials [S, 6, B], and the loss; one program."""
    loss = 0.0
    for s in tl.static_range(STREAMS):
        for term in tl.static_range(NUM_TERMS):
            row = partials_ptr + (s * NUM_TERMS + term) * num_blocks
            sums = tl.zeros([BLOCK], tl.float32)
            first = 0
            while first < num_blocks:
                block = first + tl.arange(0, BLOCK)
                sums += tl.load(row + block, block < num_blocks, other=0.0)
                first += BLOCK
            total = tl.sum(sums)
            tl.store(totals_ptr + s * NUM_TERMS + term, total)
            if term == 1:
                loss += tl.where(stream_weights[s] == 0.0, 0.0, stream_weights[s] * total)
            if term == 2:
                loss += tl.where(kl_coefs[s] == 0.0, 0.0, kl_coefs[s] * total)
    tl.store(loss_ptr, loss)
