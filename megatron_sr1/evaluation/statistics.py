"""Shares and their differences with their uncertainty, and pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054  # the standard normal's 97.5 % quantile


def wilson(share: float, num_trials: float, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share.

        (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Source: Wilson, JASA 22 (1927); unlike p -+ z se it stays in [0, 1] and is not empty at 0 and 1.

    Args:
        share: p in [0, 1].
        num_trials: n > 0; an effective number need not be whole.
    """
    assert 0.0 <= share <= 1.0 and num_trials > 0, (share, num_trials)
    scale = 1.0 + z * z / num_trials
    centre = share + z * z / (2 * num_trials)
    half = z * math.sqrt(share * (1.0 - share) / num_trials + (z / (2 * num_trials)) ** 2)
    # at the ends the two terms are equal up to rounding
    return 0.0 if share == 0.0 else (centre - half) / scale, 1.0 if share == 1.0 else (centre + half) / scale


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Probability that of k samples, drawn without replacement from those of one prompt, at least one is right.

        1 - C(n - c, k) / C(n, k)

    Source: Chen et al. 2021, arXiv 2107.03374, equation 1; unbiased where n samples were drawn independently.

    Raises:
        ValueError: k is not in [1, n].
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples is not defined: k must be 1 ... {num_samples}.")
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def ks_of(num_samples: int) -> list[int]:
    """The k that pass@k is reported for: powers of two, and the number of samples itself."""
    powers = [1 << i for i in range(num_samples.bit_length()) if 1 << i < num_samples]
    return [*powers, num_samples]


@dataclass(frozen=True)
class Share:
    """A share over the samples of several prompts."""

    value: float
    low: float  # of the 95 % interval
    high: float
    num_samples: int


def share_of(counts: Sequence[tuple[int, int]]) -> Share | None:
    """The share of hits over all samples, with a 95 % interval that knows that samples of one prompt are alike.

    Wilson's interval with the effective number of samples n* for which p (1 - p) / n* is the variance of a ratio of two
    sums over prompts (Cochran, Sampling Techniques, 3rd ed. 1977, section 3.12; Kish's design effect is N / n*):

        p = sum x_i / sum m_i,   v = sum (x_i - p m_i)^2 / (sum m_i)^2,   n* = p (1 - p) / v

    The factor n / (n - 1) of the variance is left out, so that with one sample a prompt n* is the number of prompts
    exactly. Where p is 0 or 1 it is taken to be that, too: how alike siblings are cannot be seen then. It never exceeds
    the number of samples.

    Args:
        counts: (hits x_i, samples m_i) of each prompt, of the samples that count; prompts with m_i = 0 are passed over.

    Returns:
        None where no sample counts.
    """
    kept = [(hits, samples) for hits, samples in counts if samples]
    if not kept:
        return None
    num_samples = sum(samples for _, samples in kept)
    value = sum(hits for hits, _ in kept) / num_samples
    spread = math.fsum((hits - value * samples) ** 2 for hits, samples in kept)
    effective = float(len(kept))
    if 0.0 < value < 1.0 and len(kept) < num_samples:
        variance = spread / num_samples**2
        effective = num_samples if variance == 0 else min(num_samples, value * (1.0 - value) / variance)
    return Share(value, *wilson(value, effective), num_samples)


def difference_of(counts: Sequence[tuple[int, int, int]]) -> Share:
    """The difference p - q of two shares of the same samples, with a 95 % interval that knows that they are paired.

    Newcombe's square-and-add interval (Statistics in Medicine 17 (1998) 2635), from the two shares' own intervals
    [l_p, u_p] and [l_q, u_q], which are those of `share_of`:

        low  = p - q - sqrt((p - l_p)^2 - 2 phi (p - l_p) (u_q - q) + (u_q - q)^2)
        high = p - q + sqrt((u_p - p)^2 - 2 phi (u_p - p) (q - l_q) + (q - l_q)^2)

    phi is the correlation of the two over prompts, of x_i - p m_i and y_i - q m_i; with one sample a prompt that is the
    phi coefficient of the fourfold table. It is 0 where one of the two does not vary.

    Args:
        counts: (hits x_i, hits y_i, samples m_i > 0) of each prompt; at least one.
    """
    first = share_of([(x, m) for x, _, m in counts])
    second = share_of([(y, m) for _, y, m in counts])
    assert first is not None and second is not None
    p, q = first.value, second.value
    apart = [(x - p * m, y - q * m) for x, y, m in counts]
    both = math.fsum(r * r for r, _ in apart) * math.fsum(s * s for _, s in apart)
    phi = math.fsum(r * s for r, s in apart) / math.sqrt(both) if both > 0 else 0.0

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one * one - 2 * phi * one * other + other * other))

    low = p - q - reach(p - first.low, second.high - q)
    high = p - q + reach(first.high - p, q - second.low)
    return Share(p - q, low, high, first.num_samples)
