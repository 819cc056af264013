"""Two policies of the same weights side by side: how far apart their numbers are, and how fast each is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu_check.policies import Trained, build, seconds_of, size_here
from benchmarks.gpu_check.report import Figure, Report, Table

REPEATS = 5


@dataclass(frozen=True)
class Bounds:
    """What is still near."""

    logprob: float  # nats a token, mean
    grad_norm: float  # relative


def compare(model: Path, words: Mapping[str, Sequence[str]], bounds: Bounds) -> Report:
    """The second of `words` (name -> overrides) against the first, before any of them has trained."""
    size = size_here()
    policies = {name: build(model, size, *overrides) for name, overrides in words.items()}
    (base, one), (other, two) = policies.items()
    scores = {name: trained.score() for name, trained in policies.items()}
    if len(scores[base]) != len(scores[other]):
        return Report(wrong=(f"{base} scored {len(scores[base])} tokens and {other} {len(scores[other])}",))
    distance = (scores[base] - scores[other]).abs()
    (base_loss, base_norm), (other_loss, other_norm) = one.step(), two.step()
    norm_distance = abs(other_norm / base_norm - 1)
    figures: dict[str, Figure] = {
        "scored tokens": len(distance),
        "micro-batches": len(one.batches),
        "mean |difference of log-prob|, nats": distance.mean().item(),
        "bound of it": bounds.logprob,
        "largest |difference of log-prob|, nats": distance.max().item(),
        f"loss: {base}": base_loss,
        f"loss: {other}": other_loss,
        f"gradient norm: {base}": base_norm,
        f"gradient norm: {other}": other_norm,
        "relative difference of gradient norm": norm_distance,
        "bound of it, relative": bounds.grad_norm,
    }
    wrong = []
    if not distance.mean().item() <= bounds.logprob:
        wrong.append(f"log-probs of {other} are {distance.mean().item():.3g} nats from those of {base}")
    if not norm_distance <= bounds.grad_norm or not math.isfinite(other_loss):
        wrong.append(f"loss {other_loss:.4g} and gradient norm {other_norm:.4g} of {other}, of {base} {base_norm:.4g}")
    return Report(figures, [_speed(policies)], wrong)


def _speed(policies: Mapping[str, Trained]) -> Table:
    rows = []
    for what in ("scoring", "training step"):
        actions = {n: partial(p.score) if what == "scoring" else partial(p.step) for n, p in policies.items()}
        seconds = seconds_of(actions, REPEATS)
        tokens = {name: policies[name].num_tokens / seconds[name] for name in policies}
        first = next(iter(tokens.values()))
        rows += [(what, name, 1e3 * seconds[name], tokens[name], tokens[name] / first) for name in policies]
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    title = "speed, medians taking turns" + ("" if memory is None else f"; peak memory of both {memory:.1f} GiB")
    return Table(title, ("what", "policy", "ms", "tokens/s", "ratio"), rows)
