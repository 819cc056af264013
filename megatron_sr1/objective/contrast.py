"""How much each token depends on what a contrast takes away, and what that is good for.

The same response is scored twice by the same weights, in its own context and in another one (`streams.Contrast`):

    gap[r] = log pi(r | own context) - log pi(r | contrast)                                             nats
    D[r]   = e^-gap + gap - 1      k3 of KL(pi own || pi contrast) from a token drawn from pi own, never negative

http://joschu.net/blog/kl-approx.html has k3. As in VPPO's code, the gap is held within 20 nats and D at 10 at most: one
token does not outweigh all others. Where nothing is taken away, both are exactly 0.

Of a stream, over the n tokens of a response that it credits, with m of that response the mean of D:

    top             1 on the ceil(share * n) tokens of the largest D, else 0        VPPO, arXiv 2510.09285, section 3.2
    top_conserving  the same times n / ceil(share * n): the response keeps its mass
    proportional    n D[r] / sum D, which keeps it too; 1 where every D is 0
    gated           n g[r] / sum g, which keeps it too; g = 1 + D where D is at least the threshold, else 1: what passes
                    the gate gains, the others pay for it. After PGPO, arXiv 2604.01840, of which the abstract alone is
                    read: g is ours
    response        low + (1 - low) z / mean(z), z = (m - min m) / (max m - min m)  over the responses of the optimizer
                    step; 1 where all m are the same                                VPPO, section 3.2
                    for the consistent: the same of 1 - z                           after CapPO, arXiv 2509.21854

Weights are constants of the loss that scale advantages, see `mismatch.py`. The divergence itself can be a term of the
loss, -gamma sum w D: the policy is to depend on the image (PAPO, arXiv 2507.06448, eq. 4), or with gamma below 0 to say
the same without it.

Shape legend: R scored tokens of a row, n tokens of a response.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_sr1.types import SequenceWeightFor, TokenWeighting

MAX_GAP = 20.0  # nats
MAX_DEPENDENCY = 10.0
_SAME = 1e-6  # means of dependency that are no further apart are the same


def dependency(own: Tensor, contrast: Tensor) -> Tensor:
    """D of each token, [...] without gradient, of log-probs [...] in nats."""
    gap = (own - contrast).detach().clamp(-MAX_GAP, MAX_GAP)
    return (torch.expm1(-gap) + gap).clamp(0.0, MAX_DEPENDENCY)


def token_weighting(depends: Tensor, credited: Tensor, kind: TokenWeighting, share: float, threshold: float) -> Tensor:
    """Weights of the tokens of one response, [n]; 1 where they are not credited.

    Args:
        depends: [n], see `dependency`. Of equals the earlier goes first.
        credited: [n] bool: by the stream.
        share: of the credited tokens, that are the top.
        threshold: nats, that open the gate.
    """
    weights, number = torch.ones_like(depends), int(credited.sum())
    if kind == "none" or number == 0:
        return weights
    own = depends[credited]
    if kind == "proportional":
        weights[credited] = number * own / own.sum() if float(own.sum()) > 0 else torch.ones_like(own)
        return weights
    if kind == "gated":
        gate = 1.0 + own.masked_fill(own < threshold, 0.0)
        weights[credited] = number * gate / gate.sum()
        return weights
    kept = math.ceil(share * number)
    found = torch.zeros_like(own)
    found[own.argsort(descending=True, stable=True)[:kept]] = number / kept if kind == "top_conserving" else 1.0
    weights[credited] = found
    return weights


def response_weights(means: Tensor, low: float, whose: SequenceWeightFor) -> Tensor:
    """Weight of each response of an optimizer step, whose mean is 1 and least `low`.

    Args:
        means: [B] the mean of D over the tokens that the stream credits.
        whose: weight is more: with D (`dependent`), or against it (`consistent`).
    """
    if len(means) == 0 or float(means.max() - means.min()) <= _SAME:
        return torch.ones_like(means)
    spread = (means - means.min()) / (means.max() - means.min())
    if whose == "consistent":
        spread = 1.0 - spread
    return low + (1.0 - low) * spread / spread.mean()


def divergence(own: Tensor, contrast: Tensor) -> Tensor:
    """k3 of KL(pi own || pi contrast) by token, [R] nats, with the gradients of both log-probs. Not held anywhere."""
    gap = own - contrast
    return torch.expm1(-gap) + gap
