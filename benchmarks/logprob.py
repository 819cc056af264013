"""linear_logprob against every other way to the log-prob of a token: time and peak memory, side by side.

    python -m benchmarks.logprob                      # this machine's defaults: reduced sizes without a GPU
    python -m benchmarks.logprob --tokens 8192 --hidden 128 --vocab 640 --tp 1 --output results.md

Candidates: our three back ends (and triton with bfloat16 logits), materialised logits, Liger (per token, and its Triton
kernel for the summed loss), Apple's cut cross-entropy, verl's kernel and torch's own op. What is not installed, or does
not run here, is named with the reason.

Times are medians in milliseconds, the candidates taking turns: forward without a graph, forward, backward, and both.
Behind a time is how many times faster it is than materialised logits, and which part it reaches of the time
that the matrix products alone take (one forward, three backward, measured in the same run; whoever keeps logits makes
one fewer and may pass 100 %). Memory is the growth of
the peak over the inputs in one forward and backward (MiB), gradients included: of allocated memory on a GPU, of the
resident set of a fresh process on the CPU. With tp = n a candidate computes the shard of one of n ranks, V / n
columns; the collectives between the ranks are not counted.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from megatron_sr1.kernels import linear_logprob

Candidate = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, targets -> log-probs [T] or their sum
COLUMNS = ("no-grad ms", "forward ms", "backward ms", "fwd+bwd ms", "memory MiB")
PRODUCTS = (1, 1, 3, 4)  # matrix products of T*H*V behind each time, logits being made twice
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "verl")
OWN = (None, "triton")  # packages of candidates that are ours or torch's: one that fails is an error
# of another project's kernel, which may not fit what is installed here: it is named, and the others are measured
PEER_FAILURES = (ImportError, AttributeError, TypeError, ValueError, RuntimeError, AssertionError)
TILE = 8192  # columns of one product when the floor is measured


@dataclass(frozen=True)
class Shape:
    """One benchmark."""

    tokens: int
    hidden: int
    vocab: int  # of this rank: the whole vocabulary over tp
    tp: int
    dtype: str
    threads: int


# ---------------------------------------------------------------- candidates
def logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    log_p = functional.linear(hidden, weight).float().log_softmax(-1)
    return log_p.gather(1, targets.unsqueeze(1)).squeeze(1)


def ours_torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, targets, backend="torch").logprobs


def ours_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    result = linear_logprob(hidden, weight, targets, entropy=True)
    return result.logprobs + 0.01 * result.entropy


def ours_triton(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, targets, backend="triton").logprobs


def ours_triton_bf16(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, targets, backend="triton", logits="bf16").logprobs


def ours_fused(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, targets, backend="fused").logprobs


def torch_op(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -functional.linear_cross_entropy(hidden, weight, targets, reduction="sum")


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets)


def liger_summed(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets)


def apple(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="none")


def verl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, targets, 1.0, "none", None)[0]


@dataclass(frozen=True)
class Entry:
    """A candidate and what it needs."""

    run: Candidate
    package: str | None = None
    needs_gpu: bool = False
    function: str | None = None  # of torch.nn.functional, which older releases do not have

    def missing(self) -> str | None:
        """Why it does not run here; None: it does."""
        if self.package is not None and find_spec(self.package) is None:
            return f"absent: {self.package} is not installed"
        if self.function is not None and not hasattr(functional, self.function):
            return f"absent: torch {torch.__version__} has no {self.function}"
        if self.needs_gpu and not torch.cuda.is_available():
            return "needs a GPU"
        return None


CANDIDATES: dict[str, Entry] = {
    "logits": Entry(logits),
    "ours torch": Entry(ours_torch),
    "ours +entropy": Entry(ours_entropy),
    "ours triton": Entry(ours_triton, "triton", True),
    "ours triton bf16": Entry(ours_triton_bf16, "triton", True),
    "ours fused": Entry(ours_fused, "triton", True),
    "torch op": Entry(torch_op, function="linear_cross_entropy"),
    "liger": Entry(liger, "liger_kernel"),
    "liger summed": Entry(liger_summed, "liger_kernel", True),
    "apple cce": Entry(apple, "cut_cross_entropy", True),
    "verl": Entry(verl, "verl", True),
}


# ---------------------------------------------------------------- measuring
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    torch.set_num_threads(shape.threads)
    dtype = getattr(torch, shape.dtype)
    hidden = torch.randn(shape.tokens, shape.hidden, device=device()).to(dtype).requires_grad_()
    weight = (torch.randn(shape.vocab, shape.hidden, device=device()) * 0.1).to(dtype).requires_grad_()
    targets = torch.randint(0, shape.vocab, (shape.tokens,), device=device())
    return hidden, weight, targets, torch.ones(shape.tokens, device=device())


def now() -> float:
    """Milliseconds, after all that was asked of the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * time.perf_counter()


def forward_backward(candidate: Candidate, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    hidden, weight, targets, gradient = inputs
    scores = candidate(hidden, weight, targets)
    scores.backward(gradient.to(scores.dtype) if scores.dim() else None)


def step(candidate: Candidate, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[float]:
    """Milliseconds of: forward without a graph, forward, backward, the last two together."""
    hidden, weight, targets, gradient = inputs
    hidden.grad = weight.grad = None
    marks = [now()]
    with torch.no_grad():
        candidate(hidden, weight, targets)
    marks.append(now())
    scores = candidate(hidden, weight, targets)
    marks.append(now())
    scores.backward(gradient.to(scores.dtype) if scores.dim() else None)
    marks.append(now())
    no_grad, forward, backward = (b - a for a, b in itertools.pairwise(marks))
    return [no_grad, forward, backward, forward + backward]


def product_time(inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> float:
    """Milliseconds of hidden @ weight.T, tile by tile, nothing done with it: one product of T*H*V."""
    hidden, weight = inputs[0].detach(), inputs[1].detach()
    out = torch.empty(len(hidden), min(TILE, len(weight)), dtype=hidden.dtype, device=hidden.device)
    start = now()
    for tile in weight.split(TILE):
        torch.mm(hidden, tile.t(), out=out[:, : len(tile)] if len(tile) == out.shape[1] else None)
    return now() - start


def peak_resident_kib() -> int:
    """VmHWM of this process (Linux). getrusage's ru_maxrss would start from the parent's peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def peak_on_cpu(name: str, shape: Shape) -> float:
    """MiB; in a fresh process."""
    hidden, weight, targets, gradient = make_inputs(shape)
    # A first small step loads the libraries' code and their buffers.
    forward_backward(CANDIDATES[name].run, (hidden[:8], weight, targets[:8], gradient[:8]))
    hidden.grad = weight.grad = None
    before = peak_resident_kib()
    forward_backward(CANDIDATES[name].run, (hidden, weight, targets, gradient))
    return (peak_resident_kib() - before) / 1024


def peak_memory(name: str, shape: Shape, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> float:
    if not torch.cuda.is_available():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(peak_on_cpu, (name, shape))
    inputs[0].grad = inputs[1].grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward_backward(CANDIDATES[name].run, inputs)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@dataclass(frozen=True)
class Table:
    """Of one shape. A row holds the numbers of COLUMNS, or says why there are none."""

    shape: Shape
    rows: dict[str, list[float] | str]
    product_ms: float


def measure(shape: Shape, repeats: int) -> Table:
    inputs = make_inputs(shape)
    rows: dict[str, list[float] | str] = {}
    steps: dict[str, list[list[float]]] = {}
    for name, entry in CANDIDATES.items():
        rows[name] = entry.missing() or ""
        if not rows[name]:
            try:
                step(entry.run, inputs)  # compiles, and fills the allocator's pools
                steps[name] = []
            except torch.OutOfMemoryError:
                rows[name] = "out of memory"
            except PEER_FAILURES as error:
                if entry.package in OWN:
                    raise
                rows[name] = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    products = []
    for _ in range(repeats):
        products.append(product_time(inputs))
        for name, taken in steps.items():
            taken.append(step(CANDIDATES[name].run, inputs))
    for name, taken in steps.items():
        medians = [statistics.median(column) for column in zip(*taken, strict=True)]
        rows[name] = [*medians, peak_memory(name, shape, inputs)]
    return Table(shape, rows, statistics.median(products))


# ---------------------------------------------------------------- the report
def render(table: Table) -> str:
    shape, base = table.shape, table.rows["logits"]
    lines = [
        f"T={shape.tokens} H={shape.hidden} V={shape.vocab} (tp {shape.tp}) {shape.dtype}; "
        f"one product {table.product_ms:.2f} ms",
        f"{'':17}" + "".join(f"{column:>26}" for column in COLUMNS),
    ]
    for name, row in table.rows.items():
        if isinstance(row, str):
            lines.append(f"{name:17}  {row}")
            continue
        cells = []
        for index, value in enumerate(row):
            ratio = "" if isinstance(base, str) else f"{base[index] / max(value, 1e-9):.2f}x"
            floor = f"{PRODUCTS[index] * table.product_ms / value:.0%}" if index < len(PRODUCTS) else ""
            cells.append(f"{value:.2f} {ratio:>8} {floor:>5}".rjust(26))
        lines.append(f"{name:17}" + "".join(cells))
    return "\n".join(lines)


def header() -> str:
    """Date, machine and versions."""
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} absent")
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"
    return f"{datetime.date.today().isoformat()}; {machine}; {', '.join(versions)}"


def parse() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 65536] if gpu else [1024, 4096])
    parser.add_argument("--hidden", type=int, nargs="+", default=[2048, 3584, 8192] if gpu else [128])
    parser.add_argument("--vocab", type=int, default=152064 if gpu else 8192, help="of all ranks together")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=10 if gpu else 5)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32", choices=("float32", "float64", "bfloat16"))
    parser.add_argument("--output", type=Path, help="a file that receives the tables as well")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    parts = [header()]
    print(parts[0])
    base = Shape(0, 0, 0, 1, arguments.dtype, arguments.threads)
    for tokens, hidden, tp in itertools.product(arguments.tokens, arguments.hidden, arguments.tp):
        shape = replace(base, tokens=tokens, hidden=hidden, vocab=arguments.vocab // tp, tp=tp)
        parts.append(render(measure(shape, arguments.repeats)))
        print(f"\n{parts[-1]}", flush=True)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        tables = "\n\n".join(parts[1:])
        arguments.output.write_text(f"# linear_logprob\n\n{parts[0]}\n\n```\n{tables}\n```\n")


if __name__ == "__main__":
    main()
