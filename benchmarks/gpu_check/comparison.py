"""Two policies of the same weights, one after the other in one process: how far apart, how fast each.

A process has one policy at a time, whose groups go with it. The first is built and measured again after the second:
what differs between its two times is the card's, not the policies'.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_check.policies import build, seconds_of, size_here
from benchmarks.gpu_check.report import Figure, Report, Table

REPEATS = 5
GIB = 2**30


@dataclass(frozen=True)
class Bounds:
    """What is still near."""

    logprob: float  # nats a token, mean
    grad_norm: float  # relative


@dataclass(frozen=True)
class Measured:
    """Of one policy, before it has trained; then its speed."""

    logprobs: Tensor  # of all scored tokens, on the host
    loss: float
    grad_norm: float
    micro_batches: int
    score_tokens_per_s: float
    step_tokens_per_s: float
    peak_gib: float | None  # of the device; None on a CPU


def compare(model: Path, words: Mapping[str, Sequence[str]], bounds: Bounds, *, siblings: bool = False) -> Report:
    """The second of `words` (name -> overrides) against the first; `siblings`: see `policies.build`."""
    (base, base_words), (other, other_words) = words.items()
    one, two, again = (_measured(model, overrides, siblings) for overrides in (base_words, other_words, base_words))
    figures, wrong = distances({base: one, other: two}, bounds)
    rows = []
    for what, key in (("scoring", "score_tokens_per_s"), ("training step", "step_tokens_per_s")):
        speeds = [getattr(found, key) for found in (one, two, again)]
        for name, speed, found in zip((base, other, f"{base}, again"), speeds, (one, two, again), strict=True):
            rows.append((what, name, speed, 2 * speed / (speeds[0] + speeds[2]), found.peak_gib))
    columns = ("what", "policy", "tokens/s", f"ratio to the mean of {base}", "peak GiB")
    return Report(figures, [Table("speed, medians, in the order of the rows", columns, rows)], wrong)


def distances(found: Mapping[str, Measured], bounds: Bounds) -> tuple[dict[str, Figure], list[str]]:
    """Figures, and what is beyond the bounds."""
    (base, one), (other, two) = found.items()
    if len(one.logprobs) != len(two.logprobs):
        return {}, [f"{base} scored {len(one.logprobs)} tokens and {other} {len(two.logprobs)}"]
    apart = (one.logprobs - two.logprobs).abs()
    mean, norm_apart = apart.mean().item(), abs(two.grad_norm / one.grad_norm - 1)
    figures: dict[str, Figure] = {
        "scored tokens": len(apart),
        "micro-batches": one.micro_batches,
        "mean |difference of log-prob|, nats": mean,
        "bound of it, nats": bounds.logprob,
        "largest |difference of log-prob|, nats": apart.max().item(),
        f"loss: {base}": one.loss,
        f"loss: {other}": two.loss,
        f"gradient norm: {base}": one.grad_norm,
        f"gradient norm: {other}": two.grad_norm,
        "relative difference of gradient norm": norm_apart,
        "bound of it, relative": bounds.grad_norm,
    }
    wrong = []
    if not mean <= bounds.logprob:
        wrong.append(f"log-probs of {other} are {mean:.3g} nats from those of {base}, more than {bounds.logprob:g}")
    if not norm_apart <= bounds.grad_norm:
        wrong.append(f"the gradient norm is {two.grad_norm:.4g} with {other} and {one.grad_norm:.4g} with {base}")
    wrong += [f"the loss of {name} is {of.loss}" for name, of in found.items() if not math.isfinite(of.loss)]
    return figures, wrong


def _measured(model: Path, overrides: Sequence[str], siblings: bool) -> Measured:
    gc.collect()  # of the policy before this one
    on_card = torch.cuda.is_available()
    if on_card:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trained = build(model, size_here(), *overrides, siblings=siblings)
    logprobs = trained.score()
    loss, grad_norm = trained.step()
    seconds = seconds_of({"score": trained.score, "step": trained.step}, REPEATS)
    peak = torch.cuda.max_memory_allocated() / GIB if on_card else None
    speeds = [trained.num_tokens / seconds[name] for name in ("score", "step")]
    return Measured(logprobs, loss, grad_norm, len(trained.batches), *speeds, peak)
