"""Fused log-prob against materialised logits on the CPU: time and peak memory, side by side.

    python -m benchmarks.logprob --tokens 8192 --hidden 128 --vocab 640

Times are the least of the repeats, in milliseconds, the candidates taking turns. Memory is how much the peak resident
set of a fresh process grows over its inputs in one forward and backward (MiB), gradients included.
Ratios are to `logits`.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from megatron_sr1.kernels import linear_logprob

Candidate = Callable[[Tensor, Tensor, Tensor], Tensor]


def logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    log_p = functional.linear(hidden, weight).float().log_softmax(-1)
    return log_p.gather(1, targets.unsqueeze(1)).squeeze(1)


def fused(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, targets).logprobs


def fused_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    result = linear_logprob(hidden, weight, targets, entropy=True)
    return result.logprobs + 0.01 * result.entropy


CANDIDATES: dict[str, Candidate] = {"logits": logits, "fused": fused, "fused+entropy": fused_entropy}


def make_inputs(arguments: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    hidden = torch.randn(arguments.tokens, arguments.hidden).to(dtype).requires_grad_()
    weight = (torch.randn(arguments.vocab, arguments.hidden) * 0.1).to(dtype).requires_grad_()
    targets = torch.randint(0, arguments.vocab, (arguments.tokens,))
    return hidden, weight, targets, torch.randn(arguments.tokens)


def step(candidate: Candidate, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[float, float, float]:
    """Milliseconds of: forward without a graph, forward, backward."""
    hidden, weight, targets, gradient = inputs
    hidden.grad = weight.grad = None
    marks = [time.perf_counter()]
    with torch.no_grad():
        candidate(hidden, weight, targets)
    marks.append(time.perf_counter())
    logprobs = candidate(hidden, weight, targets)
    marks.append(time.perf_counter())
    logprobs.backward(gradient)
    marks.append(time.perf_counter())
    no_grad, forward, backward = (1e3 * (b - a) for a, b in itertools.pairwise(marks))
    return no_grad, forward, backward


def peak_resident_kib() -> int:
    """VmHWM of this process (Linux). getrusage's ru_maxrss would start from the parent's peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def peak_memory(name: str, arguments: argparse.Namespace) -> float:
    hidden, weight, targets, gradient = make_inputs(arguments)
    # A first small step loads the libraries' code and their buffers.
    CANDIDATES[name](hidden[:8], weight, targets[:8]).backward(gradient[:8])
    hidden.grad = weight.grad = None
    before = peak_resident_kib()
    CANDIDATES[name](hidden, weight, targets).backward(gradient)
    return (peak_resident_kib() - before) / 1024


def measure(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Per candidate: forward without a graph, forward, backward, forward + backward (ms), memory (MiB)."""
    inputs = make_inputs(arguments)
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in CANDIDATES}
    for _ in range(arguments.repeats):
        for name, candidate in CANDIDATES.items():
            times[name].append(step(candidate, inputs))
    table = {}
    for name, steps in times.items():
        parts = [min(column) for column in zip(*steps, strict=True)]
        table[name] = [*parts, min(forward + backward for _, forward, backward in steps)]
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            table[name].append(pool.apply(peak_memory, (name, arguments)))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 8192), ("hidden", 128), ("vocab", 640), ("repeats", 10), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16"))
    arguments = parser.parse_args()
    table = measure(arguments)
    columns = ("no-grad ms", "forward ms", "backward ms", "fwd+bwd ms", "memory MiB")
    print(
        f"T={arguments.tokens} H={arguments.hidden} V={arguments.vocab} {arguments.dtype} threads={arguments.threads}"
    )
    print(f"{'':14}" + "".join(f"{column:>19}" for column in columns))
    for name, row in table.items():
        cells = (f"{v:10.1f} ({v / base:5.2f}x)" for v, base in zip(row, table["logits"], strict=True))
        print(f"{name:14}" + "".join(f"{cell:>19}" for cell in cells))


if __name__ == "__main__":
    main()
