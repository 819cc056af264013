"""`megatron-sr1 convert`: checkpoints between Hugging Face and Megatron-Core, and their comparison.

    megatron-sr1 convert hf-to-megatron --hf DIR --out DIR
    megatron-sr1 convert megatron-to-hf --megatron DIR --out DIR
    megatron-sr1 convert verify A B [--logits --tp 2]

A Megatron checkpoint loads in any layout. Tensors stream: memory holds a piece of one at a time. A result appears under
its name only when it is complete, so a conversion may be interrupted at any time and run again.
Exit status: 0 done, or equal; 1 different; 2 an error, which the last line names.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sr1.config import Config, LayoutConfig, ModelConfig, TrainConfig
from megatron_sr1.config.mistakes import EXPECTED_ERRORS, one_line

if TYPE_CHECKING:
    from megatron_sr1.convert.parity import Agreement

_IMPORTS = tuple(f"megatron_sr1.convert.{name}" for name in ("save", "export", "parity"))  # of the ranks
TABLE_WIDTH = 200  # columns, where the output is no terminal
EQUAL, DIFFERENT, ERROR = 0, 1, 2
TOLERANCE = 1e-5  # relative, of log-probs and entropies in fp32


def main(arguments: Sequence[str] | None = None) -> int:
    """The command alone, as tools/convert.py; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="convert.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_convert_options(parser)
    return run_convert(parser.parse_args(arguments))


def run_convert(args: argparse.Namespace) -> int:
    """Returns the exit status; an error is one line on stderr."""
    from torch.multiprocessing.spawn import ProcessException

    try:
        return args.run(args)
    except EXPECTED_ERRORS as error:
        text = one_line(error)
    except ProcessException as error:  # a rank's; the message holds its traceback
        text = str(error)
    print(f"convert {args.conversion}: {text}", file=sys.stderr)
    return ERROR


def add_convert_options(parser: argparse.ArgumentParser) -> None:
    """The three conversions, each with its options."""
    commands = parser.add_subparsers(dest="conversion", required=True)
    there = commands.add_parser("hf-to-megatron", help="a Hugging Face folder into a Megatron checkpoint")
    there.add_argument("--hf", required=True, help="a model in Hugging Face format")
    there.set_defaults(run=_hf_to_megatron)
    back = commands.add_parser("megatron-to-hf", help="a Megatron checkpoint into a Hugging Face folder")
    back.add_argument("--megatron", required=True, help="what hf-to-megatron wrote, or a run's checkpoints/step_000010")
    back.add_argument("--hf", help="configuration and tokenizer, where the checkpoint does not bring them along")
    back.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the result; default: as stored")
    back.add_argument("--max-shard-gb", type=float, default=5.0, help="size of a safetensors file (default: 5)")
    back.set_defaults(run=_megatron_to_hf)
    for command in (there, back):
        command.add_argument("--out", required=True, type=Path, help="the result")
        command.add_argument("--overwrite", action="store_true", help="replace a checkpoint that lies at --out")
        command.add_argument("--nproc", type=int, default=1, help="processes that share the work (default: 1)")
    verify = commands.add_parser("verify", help="compare two checkpoints of either kind")
    verify.add_argument("first", metavar="A")
    verify.add_argument("second", metavar="B")
    verify.add_argument("--hf", help="configuration, for a Megatron checkpoint that does not bring one along")
    verify.add_argument("--only-differences", action="store_true", help="leave equal tensors out of the table")
    verify.add_argument("--logits", action="store_true", help="also compare log-probs of a small built-in batch")
    for name, meaning in (("tp", "tensor"), ("pp", "pipeline"), ("cp", "context")):
        verify.add_argument(f"--{name}", type=int, default=1, help=f"{meaning} parallel ranks for --logits")
    verify.set_defaults(run=_verify)


# ---------------------------------------------------------------- conversion
def _hf_to_megatron(args: argparse.Namespace) -> int:
    return _convert(args, Path(args.hf), _rank_hf_to_megatron, args.hf)


def _megatron_to_hf(args: argparse.Namespace) -> int:
    options = (args.megatron, args.hf, args.dtype, int(args.max_shard_gb * 1e9))
    return _convert(args, Path(args.megatron), _rank_megatron_to_hf, *options)


def _convert(args: argparse.Namespace, source: Path, function: Callable[..., None], *options: object) -> int:
    from megatron_sr1.convert.output import complete_folder
    from megatron_sr1.platform import run_on_ranks

    if os.environ.get("RANK"):
        raise ValueError("started by torchrun. Start it as one process, with --nproc for more.")
    if args.nproc < 1:
        raise ValueError(f"--nproc {args.nproc} is not allowed: it must be 1 or more.")
    with complete_folder(args.out, source, overwrite=args.overwrite) as partial:
        run_on_ranks(function, args.nproc, str(partial), *options, imports=_IMPORTS)
    print(f"written: {args.out}")
    return EQUAL


def _rank_hf_to_megatron(out_dir: str, hf_dir: str) -> None:
    from megatron_sr1.platform import start_platform

    platform = start_platform()
    from megatron_sr1.convert.save import hf_to_megatron

    with _progress("Hugging Face -> Megatron", platform.is_main) as advance:
        hf_to_megatron(hf_dir, Path(out_dir), platform, advance)


def _rank_megatron_to_hf(
    out_dir: str, megatron_dir: str, hf_dir: str | None, dtype: str | None, max_shard_bytes: int
) -> None:
    import torch

    from megatron_sr1.platform import start_platform

    platform = start_platform()
    from megatron_sr1.convert.export import megatron_to_hf

    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    with _progress("Megatron -> Hugging Face", platform.is_main) as advance:
        megatron_to_hf(
            megatron_dir,
            hf_dir,
            Path(out_dir),
            platform,
            advance,
            dtype=types[dtype] if dtype else None,
            max_shard_bytes=max_shard_bytes,
        )


@contextmanager
def _progress(what: str, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar of the bytes that this process has done; the others' shares are as large."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, advance=done, total=total)


# ---------------------------------------------------------------- comparison
def _verify(args: argparse.Namespace) -> int:
    from rich.console import Console

    from megatron_sr1.platform import start_platform

    start_platform()
    from megatron_sr1.convert.tables import print_agreements, print_tensors
    from megatron_sr1.convert.verify import compare, open_checkpoint

    console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
    first, second = (open_checkpoint(folder, args.hf) for folder in (args.first, args.second))
    with _progress("comparing", True) as advance:
        found = list(compare(first, second, advance))
    print_tensors(console, found, args.only_differences)
    equal = all(item.equal for item in found)
    if args.logits:
        agreements = _logits(args)
        print_agreements(console, agreements)
        equal &= all(item.logprob_rel <= TOLERANCE and item.entropy_rel <= TOLERANCE for item in agreements)
    console.print("equal" if equal else "[bold red]different")
    return EQUAL if equal else DIFFERENT


def _logits(args: argparse.Namespace) -> list[Agreement]:
    """Both models in the layout that was asked for, on ranks of their own; the first leaves the result in a file."""
    from megatron_sr1.convert.parity import Agreement
    from megatron_sr1.platform import run_on_ranks

    configs = [_config(args, folder) for folder in (args.first, args.second)]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "logits.json"
        run_on_ranks(_rank_logits, configs[0].nproc, *configs, str(result), imports=_IMPORTS)
        return [Agreement(**entry) for entry in json.loads(result.read_text())]


def _config(args: argparse.Namespace, folder: str) -> Config:
    from megatron_sr1.convert.layout import config_dir
    from megatron_sr1.convert.verify import is_megatron_dir

    is_megatron = is_megatron_dir(Path(folder))
    hf_dir = config_dir(Path(folder), args.hf) if is_megatron else folder
    layout = LayoutConfig(
        tensor=args.tp, pipeline=args.pp, context=args.cp, sequence_parallel=args.tp > 1, distributed_optimizer=False
    )
    return Config(
        nproc=layout.model_ranks,
        model=ModelConfig(hf_dir=hf_dir, megatron_dir=folder if is_megatron else "", freeze=("vision", "merger")),
        layout=layout,
        train=TrainConfig(batch_size=1),
    )


def _rank_logits(first: Config, second: Config, result: str) -> None:
    from megatron_sr1.platform import start_platform

    platform = start_platform()
    from megatron_sr1.convert.parity import compare_scores

    agreements = compare_scores(first, second, platform)
    if platform.is_main:
        Path(result).write_text(json.dumps([asdict(item) for item in agreements]))
