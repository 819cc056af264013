"""Builds shards for `megatron-sr1 evaluate` from a copy of a public benchmark, in the layout its authors publish.

    python tools/build_benchmark.py NAME --input PATH --out DIR [--split SPLIT] [--images DIR] [--model HF_DIR]

PATH is the folder the set was downloaded to, a file, or a pattern in quotes. DIR gets NAME-00000.tar ... with an index
beside each, NAME.report.json, and NAME.problems.jsonl: one line for every row that was left out, for example because
its answer is not published. `tools/build_shards.py --check --out DIR` compares the shards with their indices.

{table}
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool

from build_shards import add_build_arguments, check_build_arguments, run_build
from rich.console import Console

from megatron_sr1.data.benchmarks import BENCHMARKS, open_benchmark


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exit status 2: a wrong argument or input."""
    parser = _parser()
    args = parser.parse_args(arguments)
    args.name = args.name or args.benchmark
    check_build_arguments(args, parser)
    benchmark = BENCHMARKS[args.benchmark]
    settings = {"benchmark": benchmark.name, "split": args.split or benchmark.split, "images": args.images}
    try:
        source = open_benchmark(benchmark, args.input, args.split, args.images)
        run_build(source, settings, args, not args.drop_duplicates, Console())
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")
    except BrokenProcessPool:
        parser.exit(2, "a worker was killed, most likely for want of memory. Run again with fewer --workers.\n")


def _parser() -> argparse.ArgumentParser:
    table = "\n".join(
        f"    {benchmark.name:17}{benchmark.dataset:27}{benchmark.split or 'all its files'}"
        for benchmark in BENCHMARKS.values()
    )
    description = (__doc__ or "").format(table=f"NAME, where it is published, and the split that is built:\n{table}")
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", metavar="NAME", choices=tuple(BENCHMARKS), help="one of the table above")
    parser.add_argument("--input", required=True, help="a folder, a file, or a pattern in quotes")
    parser.add_argument("--split", help="another one than in the table")
    parser.add_argument("--images", metavar="DIR", help="JSON: where image paths begin; default: beside the file")
    parser.add_argument("--name", help="shards are called NAME-00000.tar; default: the benchmark's name")
    parser.add_argument(
        "--drop-duplicates",
        action="store_true",
        help="leave out rows of equal content; published figures count every row",
    )
    add_build_arguments(parser)
    return parser


if __name__ == "__main__":
    main()
