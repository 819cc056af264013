"""Layouts for numbers of GPUs that nobody has to have yet."""

from __future__ import annotations

import argparse

from megatron_sr1.config import Config, check_command, load_config


def run_plan(args: argparse.Namespace) -> None:
    """Prints, for each number of GPUs, the layouts of a GRPO run that are expected to be fastest.

    Raises:
        ValueError: what is wrong with the configuration; a number of GPUs on which no layout fits.
    """
    counts = _counts(args.gpus)
    if args.top < 1:
        raise ValueError(f"--top {args.top} is not allowed: it must be 1 or more.")
    base = load_config(args.config, args.overrides)
    check_command("grpo", base)
    from megatron_sr1.platform import start_platform

    start_platform()
    from megatron_sr1.estimate import SUPPOSED, Machine, candidates

    def load(overrides: list[str]) -> Config:
        config = load_config(args.config, [*args.overrides, *overrides])
        check_command("grpo", config)
        return config

    machine = Machine(args.gpu_gib, args.gpus_per_node, args.host_gib)
    terms: list[str] = []
    for count in counts:
        found = candidates(base, load, count, machine)
        if not found:
            raise ValueError(
                f"no layout of {count} GPUs fits. Give more of them, or see what keeps one from it with megatron-sr1 "
                f"grpo {args.config} --dry-run nproc={count}."
            )
        if not terms:
            terms = list(found[0].expected.terms)
            heads = ["GPUs", "tensor", "pipeline", "data", "engine", "GiB", "step s", *terms]
            print("".join(f"{head:>10}" for head in heads))
        for one in found[: args.top]:
            sizes = (count, one.tensor, one.pipeline, one.plan.config.data_ranks, one.engine_tensor)
            seconds = [one.expected.total, *(one.expected.terms[name] for name in terms)]
            print("".join(f"{size:>10}" for size in sizes) + "".join(f"{x:>10,.1f}" for x in (one.gib, *seconds)))
        print(f"# {' '.join(found[0].overrides)}")
    print(f"# {SUPPOSED}")


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ValueError(f"--gpus {text!r} is not allowed: it must be numbers of 1 or more, such as 64,128,256,512.")
    return counts
