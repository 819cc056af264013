"""What it takes until the ranks of a command on a CPU have imported what they need: each for itself, and forked.

    python -m benchmarks.rank_start --nproc 2 --runs 3

Both ways take turns in one run. CPU seconds and private memory (USS) are those of all processes together, the fork
server's included; a rank imports what a rank of `grpo` imports.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from importlib import import_module
from multiprocessing.connection import Connection

import psutil

from megatron_sr1.cli.runs import IMPORTS
from megatron_sr1.platform.fork_server import begin_rank, start_fork_server

MIB = 1 << 20
FORKED, SEPARATE = "forkserver", "spawn"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3, help="of each way")
    args = parser.parse_args()
    if args.nproc < 1 or args.runs < 1:
        parser.error("--nproc and --runs must be 1 or more")
    found: dict[str, list[tuple[float, float, float]]] = {SEPARATE: [], FORKED: []}
    for _ in range(args.runs):
        for method, results in found.items():
            results.append(_in_a_process(method, args.nproc))
    print(f"medians of {args.runs} runs, {args.nproc} ranks")
    print(f"{'':12}{'seconds':>10}{'CPU s':>10}{'MiB':>10}")
    medians = {method: [statistics.median(column) for column in zip(*found[method], strict=True)] for method in found}
    for method, (seconds, cpu, memory) in medians.items():
        print(f"{method:12}{seconds:10.1f}{cpu:10.1f}{memory:10.0f}")
    ratios = (forked / separate for forked, separate in zip(medians[FORKED], medians[SEPARATE], strict=True))
    print("ratio".ljust(12) + "".join(f"{ratio:10.2f}" for ratio in ratios))


def _in_a_process(method: str, num_ranks: int) -> tuple[float, float, float]:
    """A launcher of its own, so that each run has a server of its own."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    launcher = multiprocessing.get_context("spawn").Process(target=_launch, args=(method, num_ranks, sender))
    launcher.start()
    sender.close()
    result = receiver.recv()
    launcher.join()
    return result


def _launch(method: str, num_ranks: int, sender: Connection) -> None:
    start = time.perf_counter()
    if method == FORKED:
        start_fork_server(IMPORTS["grpo"])
    context = multiprocessing.get_context(method)
    pipes = [context.Pipe() for _ in range(num_ranks)]
    ranks = [context.Process(target=_rank, args=(method, theirs)) for _, theirs in pipes]
    for rank in ranks:
        rank.start()
    for mine, _ in pipes:
        mine.recv()
    seconds = time.perf_counter() - start
    processes = psutil.Process().children(recursive=True)
    cpu = sum(sum(process.cpu_times()[:2]) for process in processes)
    memory = sum(process.memory_full_info().uss for process in processes) / MIB
    for mine, _ in pipes:
        mine.send(None)
    for rank in ranks:
        rank.join()
    sender.send((seconds, cpu, memory))


def _rank(method: str, launcher: Connection) -> None:
    if method == FORKED:
        begin_rank()
    else:
        import_module("megatron_sr1.platform.fork_server_start")  # prepares the process as the server's is
        for name in IMPORTS["grpo"]:
            import_module(name)
    launcher.send(None)
    launcher.recv()


if __name__ == "__main__":
    main()
