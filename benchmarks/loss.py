"""The fused policy loss against the readable one: time, operations and memory, side by side.

    python -m benchmarks.loss --tokens 4096 16384 65536

One micro-batch of R scored tokens and two streams, off-policy, with a reference and both clips. Times are medians of
the repeats, the candidates taking turns, in microseconds; on a GPU until the device is done. Operations are what one
forward and backward runs: kernels on a GPU, aten operations that are no views on the CPU. `kept` is what waits for
backward besides the inputs; `peak` how much memory grows at most over the inputs in forward and backward, gradient
included: torch's allocator on a GPU, else the peak resident set of a fresh process. Both in units of one [R] float32
tensor. Ratios are to `reference`.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.logprob import peak_resident_kib
from megatron_sr1.kernels.policy_loss.fused import fused_stream_loss
from megatron_sr1.objective import stream_loss
from megatron_sr1.types import Clip, LossInputs, RewardStream

Candidate = Callable[[LossInputs], tuple[Tensor, Mapping[str, Tensor]]]
CANDIDATES: dict[str, Candidate] = {
    "reference": stream_loss,
    "fused torch": partial(fused_stream_loss, backend="torch"),
    "fused triton": partial(fused_stream_loss, backend="triton"),
}
STREAMS = tuple(
    RewardStream(name, "first", "response", (("acc", 1.0),), weight, clip=Clip(0.2, 0.28, 3.0))
    for name, weight in (("answer", 1.0), ("visual", 0.5))
)


def make_inputs(num_tokens: int, device: str) -> LossInputs:
    torch.manual_seed(0)
    trainer = -3 * torch.rand(num_tokens)
    constants = {
        "old_logprobs": trainer + 0.1 * torch.randn(num_tokens),
        "ref_logprobs": trainer + 0.1 * torch.randn(num_tokens),
        "advantages": torch.randn(len(STREAMS), num_tokens),
        "token_weights": torch.rand(len(STREAMS), num_tokens) / num_tokens,
    }
    constants = {name: value.to(device) for name, value in constants.items()}
    return LossInputs(trainer.to(device).requires_grad_(), **constants, streams=STREAMS)


def synchronize(inputs: LossInputs) -> None:
    if inputs.trainer_logprobs.is_cuda:
        torch.cuda.synchronize()


def step(candidate: Candidate, inputs: LossInputs) -> tuple[float, float, float]:
    """Microseconds of forward, backward and both."""
    marks = [time.perf_counter()]
    loss, _ = candidate(inputs)
    synchronize(inputs)
    marks.append(time.perf_counter())
    torch.autograd.grad(loss, inputs.trainer_logprobs)
    synchronize(inputs)
    marks.append(time.perf_counter())
    forward, backward = (1e6 * (b - a) for a, b in itertools.pairwise(marks))
    return forward, backward, forward + backward


class _Operations(TorchDispatchMode):
    """Counts the operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operations(candidate: Candidate, inputs: LossInputs) -> int:
    if inputs.trainer_logprobs.is_cuda:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step(candidate, inputs)
        return sum(event.count for event in profile.key_averages() if event.device_type.name == "CUDA")
    with _Operations() as counter:
        step(candidate, inputs)
    return counter.count


def kept_tensors(candidate: Candidate, inputs: LossInputs) -> float:
    given = (inputs.trainer_logprobs, inputs.old_logprobs, inputs.ref_logprobs, inputs.advantages, inputs.token_weights)
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = candidate(inputs)  # alive while the storages are told apart by their addresses
    for tensor in given:
        seen.pop(tensor.untyped_storage().data_ptr(), None)
    del kept
    return sum(seen.values()) / inputs.trainer_logprobs.nbytes


def peak_bytes(name: str, num_tokens: int, device: str) -> int:
    """In a process that has done nothing else."""
    torch.set_num_threads(1)
    inputs, small = make_inputs(num_tokens, device), make_inputs(64, device)
    step(CANDIDATES[name], small)  # loads the libraries' code, or compiles the kernels
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(CANDIDATES[name], inputs)
        return torch.cuda.max_memory_allocated() - before
    before = peak_resident_kib()
    step(CANDIDATES[name], inputs)
    return 1024 * (peak_resident_kib() - before)


def measure(num_tokens: int, device: str, repeats: int) -> dict[str, list[float]]:
    """Per candidate: forward, backward, both (us), operations, kept and peak memory ([R] tensors)."""
    inputs = make_inputs(num_tokens, device)
    names = [name for name in CANDIDATES if device == "cuda" or name != "fused triton"]
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    for name in names * 3:
        step(CANDIDATES[name], inputs)
    for _ in range(repeats):
        for name in names:
            times[name].append(step(CANDIDATES[name], inputs))
    table = {}
    for name in names:
        row = [statistics.median(column) for column in zip(*times[name], strict=True)]
        row += [operations(CANDIDATES[name], inputs), kept_tensors(CANDIDATES[name], inputs)]
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row.append(pool.apply(peak_bytes, (name, num_tokens, device)) / inputs.trainer_logprobs.nbytes)
        table[name] = row
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    card = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{platform.machine()}, 1 thread"
    print(f"S={len(STREAMS)} float32, {card}, torch {torch.__version__}")
    columns = ("forward us", "backward us", "both us", "operations", "kept [R]", "peak [R]")
    print(f"{'R':>7} {'':13}" + "".join(f"{column:>17}" for column in columns))
    for num_tokens in arguments.tokens:
        table = measure(num_tokens, arguments.device, arguments.repeats)
        for name, row in table.items():
            ratios = (v / base if base else 1.0 for v, base in zip(row, table["reference"], strict=True))
            cells = (f"{v:.1f} ({ratio:4.2f}x)" for v, ratio in zip(row, ratios, strict=True))
            print(f"{num_tokens:>7} {name:13}" + "".join(f"{cell:>17}" for cell in cells))


if __name__ == "__main__":
    main()
