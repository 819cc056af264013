"""Builds WebDataset shards from rows, conversations or other shards; leaves out what cannot be trained on.

    python tools/build_shards.py --input PATH --format parquet|jsonl|json|llava|webdataset --out DIR [--model HF_DIR]
    python tools/build_shards.py --check --out DIR

PATH is a file, a folder or a pattern in quotes. DIR gets NAME-00000.tar ... with an index beside each,
NAME.report.json, and NAME.problems.jsonl: one line for every sample that was left out. Run it again after an
interruption: it goes on after its last whole shard, and the bytes are the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megatron_sr1.config import ModelConfig, PixelLimits, RolloutConfig, check_pixels, pixel_limits
from megatron_sr1.data import ShardDataset
from megatron_sr1.data.build.builder import BuildOptions, BuildReport, build_shards, problems_path
from megatron_sr1.data.build.check import check_shards
from megatron_sr1.data.build.layouts import boxed_answer
from megatron_sr1.data.build.samples import Question
from megatron_sr1.data.sources.columns import Columns
from megatron_sr1.data.sources.opening import WITH_IMAGE_FOLDER, open_source
from megatron_sr1.data.sources.source import Format, Source
from megatron_sr1.prompts import SHIPPED
from megatron_sr1.types import SftSample, TemplateName

if TYPE_CHECKING:
    from megatron_sr1.processor import Processor

MAX_LISTED = 20  # of what is wrong; the rest is counted
BYTES_PER_MB = 1_000_000


@dataclass(frozen=True)
class ModelRules:
    """Layouts as `prompts` parses them, lengths as the model's own tokenizer and image processor make them."""

    hf_dir: str | None
    max_prompt_tokens: int | None
    pixels: PixelLimits | None = None  # of an image; None: what the model's files say

    @cached_property
    def _processor(self) -> Processor:
        from megatron_sr1.platform.torchvision_ops import define_missing_torchvision_ops
        from megatron_sr1.processor import Processor

        assert self.hf_dir is not None
        define_missing_torchvision_ops()
        return Processor.from_pretrained(self.hf_dir, pixels=self.pixels)

    @property
    def tokenizer(self) -> str:
        """The model that counts."""
        return self.hf_dir or ""

    def prompt_tokens(self, question: Question) -> tuple[int, int] | None:
        """Of the prompt as training renders it: a demonstration's by its template, others' by See-Think."""
        if self.hf_dir is None:
            return None
        ids = self._processor.prompt_ids(
            _user_text(question.template or "see_think", question), len(question.image_sizes)
        )
        grids = [self._processor.grid(size) for size in question.image_sizes]
        return len(ids), len(self._processor.expand(ids, grids))

    def shown_prompt(self, question: Question) -> str:
        """The prompt as the model's chat template makes it, an image as one `<|image_pad|>`; without a model, what
        the user's turn holds. Prompts are asked by See-Think, those without images plainly."""
        num_images = len(question.image_sizes)
        text = _user_text(question.template or ("see_think" if num_images else "cot"), question)
        if self.hf_dir is None:
            return "".join(f"<image {number}>" for number in range(1, num_images + 1)) + text
        return self._processor.decode(self._processor.prompt_ids(text, num_images))

    def boxed_answer(self, template: TemplateName, response: str) -> str | None:
        """The answer in the response, or None where its layout is broken."""
        return boxed_answer(template, response)


def _user_text(template: TemplateName, question: Question) -> str:
    asked = SHIPPED.by_name[template]
    description = (question.description or "") if asked.reads_description else None
    return asked.user_text(question.problem, len(question.image_sizes), description)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exit status 1: --check found something; 2: a wrong argument or input."""
    parser = _parser()
    args = parser.parse_args(arguments)
    console = Console()
    try:
        if args.check:
            _check(args, console)
        else:
            _build(args, parser, console)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")
    except BrokenProcessPool:
        parser.exit(2, "a worker was killed, most likely for want of memory. Run again with fewer --workers.\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", help="a file, a folder, or a pattern in quotes")
    parser.add_argument("--format", choices=get_args(Format), help="of the input")
    parser.add_argument("--name", default="train", help="shards are called NAME-00000.tar")
    add_build_arguments(parser)
    parser.add_argument(
        "--images", metavar="DIR", help="jsonl, json, llava: where image paths begin; default: beside the file"
    )
    parser.add_argument(
        "--rename", nargs="+", default=[], metavar="COLUMN=FIELD", help="e.g. question=problem; COLUMN= leaves it out"
    )
    parser.add_argument("--keep-duplicates", action="store_true", help="take samples of equal content again")
    parser.add_argument("--check", action="store_true", help="compare the shards in --out with their indices")
    return parser


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """What every tool that builds shards takes; `check_build_arguments` checks it."""
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--max-shard-mb", type=float, default=512, help="a shard's size in 10^6 bytes, at most")
    parser.add_argument(
        "--model", metavar="HF_DIR", help="counts prompt tokens and leaves out prompts that are too long"
    )
    parser.add_argument(
        "--max-prompt-tokens",
        type=int,
        default=_default_limit(),
        help="with --model; visual tokens count (%(default)s)",
    )
    parser.add_argument("--min-pixels", type=int, metavar="N", help="with --model: as model.min_pixels of the training")
    parser.add_argument("--max-pixels", type=int, metavar="N", help="with --model: as model.max_pixels of the training")
    parser.add_argument(
        "--show", type=int, default=3, metavar="N", help="print the first N samples as a model sees them (%(default)s)"
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; 0: this one")


def check_build_arguments(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Exits with status 2 where one of them is wrong."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", args.name):
        parser.error(f"--name {args.name!r}: letters, digits, _ and - only")
    if not 0 < args.max_shard_mb < math.inf or args.max_prompt_tokens < 1 or args.workers < 0 or args.show < 0:
        parser.error("--max-shard-mb and --max-prompt-tokens must be above 0, --show and --workers 0 or more")
    if args.out.is_file():
        parser.error(f"--out {str(args.out)!r}: it is a file; give a folder, or a name that is free for one")
    if args.model is not None and not (Path(args.model) / "config.json").is_file():
        parser.error(f"--model {args.model!r}: there is no config.json in it. Give a model in Hugging Face format")
    if args.model is None and (args.min_pixels, args.max_pixels) != (None, None):
        parser.error("--min-pixels and --max-pixels are for counting a model's tokens. Give --model too")


def _default_limit() -> int:
    """What rollouts leave to a prompt with the default configuration, in tokens."""
    rollout = RolloutConfig()
    return rollout.max_model_tokens - rollout.max_response_tokens - rollout.max_description_tokens


# ---------------------------------------------------------------- build
def _build(args: argparse.Namespace, parser: argparse.ArgumentParser, console: Console) -> None:
    _check_arguments(args, parser)
    columns = Columns(dict(part.split("=", 1) for part in args.rename))
    settings = {"format": args.format, "images": args.images, "rename": dict(columns.rename)}
    run_build(_source(args, columns), settings, args, args.keep_duplicates, console)


def run_build(
    source: Source, settings: Mapping[str, Any], args: argparse.Namespace, keep_duplicates: bool, console: Console
) -> None:
    """Builds the shards and prints what was built.

    Args:
        settings: what decides the samples, beside the input and the arguments of `add_build_arguments`.
        args: has --input, --name and those arguments.

    Raises:
        ValueError: as `build_shards`.
        BrokenProcessPool: a worker was killed.
    """
    limit = args.max_prompt_tokens if args.model else None
    pixels = _pixels(args)
    settings = {"input": args.input, **settings, "model": args.model, "max_prompt_tokens": limit}
    settings |= {"pixels": asdict(pixels)} if pixels is not None else {}
    max_bytes = int(args.max_shard_mb * BYTES_PER_MB)
    rules = ModelRules(args.model, limit, pixels)
    options = BuildOptions(args.out, args.name, max_bytes, args.workers, settings, keep_duplicates)
    with _progress(console) as progress:
        task = progress.add_task("samples", total=None)
        report, worked = build_shards(
            source,
            rules,
            options,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    if not worked:
        console.print(f"{args.out} is complete already; nothing to do.", soft_wrap=True)
    _print_report(report, options, console)
    _show_samples(report, options, rules, args.show, console)


def _pixels(args: argparse.Namespace) -> PixelLimits | None:
    """
    Raises:
        ConfigError: images of --model cannot be made of such a size.
    """
    if args.model is None:
        return None
    model = ModelConfig(hf_dir=args.model, min_pixels=args.min_pixels, max_pixels=args.max_pixels)
    check_pixels(model)
    return pixel_limits(model)


def _check_arguments(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if not args.input or args.format is None:
        parser.error("--input and --format are needed to build (only --check does without)")
    check_build_arguments(args, parser)
    if args.images is not None and args.format not in WITH_IMAGE_FOLDER:
        parser.error(f"--images belongs to --format jsonl, json and llava, not to {args.format}")
    if args.rename and args.format == "llava":
        parser.error("--rename does not go with --format llava, whose columns have their names")
    wrong = next((part for part in args.rename if not re.fullmatch(r"[^=]+=[^=]*", part)), None)
    if wrong is not None:
        parser.error(f"--rename {wrong!r}: write COLUMN=FIELD")
    named = [part.split("=", 1)[0] for part in args.rename]
    twice = next((name for name in named if named.count(name) > 1), None)
    if twice is not None:
        parser.error(f"--rename names the column {twice!r} twice: write one FIELD for it")
    if args.format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        parser.error("--format parquet needs pyarrow, which is not installed: pip install pyarrow")


def _source(args: argparse.Namespace, columns: Columns) -> Source:
    return open_source(args.format, args.input, columns.rename, args.images)


def _print_report(report: BuildReport, options: BuildOptions, console: Console) -> None:
    table = Table(title=str(options.out_dir))
    for column in ("shard", "samples", "MB"):
        table.add_column(column, justify="left" if column == "shard" else "right")
    for shard in report.shards[:MAX_LISTED]:
        table.add_row(shard["name"], str(shard["num_samples"]), f"{shard['num_bytes'] / BYTES_PER_MB:.1f}")
    console.print(table)
    console.print(
        f"{report.num_samples} samples in {len(report.shards)} shards, fingerprint {report.fingerprint}", soft_wrap=True
    )
    images = ", ".join(f"{number}: {count}" for number, count in report.images_per_sample.items())
    _print_lines(console, f"images per sample: {images}")
    if report.changed:
        _print_lines(console, f"changed: {_counts(report.changed)}")
    if report.left_out:
        problems = problems_path(options.out_dir, options.name)
        first = (f"  {kind}: {report.reasons[kind]}" for kind in report.left_out)
        _print_lines(console, f"left out: {_counts(report.left_out)} (see {problems}); the first of each:", *first)


def _counts(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def _print_lines(console: Console, *lines: str) -> None:
    """As they are: what data say is neither markup nor emphasis."""
    console.print("\n".join(lines), soft_wrap=True, markup=False, highlight=False, emoji=False)


def _show_samples(
    report: BuildReport, options: BuildOptions, rules: ModelRules, num_samples: int, console: Console
) -> None:
    """Reads the first samples back from the shards, as training does, and prints what a model is given."""
    shards = itertools.takewhile(lambda _: num_samples > 0, (shard["name"] for shard in report.shards))
    for name in shards:
        found = ShardDataset([options.out_dir / name])
        for i in range(min(num_samples, len(found))):
            sample = found.read(i)
            prompt = sample.prompt if isinstance(sample, SftSample) else sample
            description = sample.description if isinstance(sample, SftSample) else None
            template = sample.template if isinstance(sample, SftSample) else None
            sizes = tuple(image.size for image in prompt.images)
            lines = [
                f"\n--- sample {prompt.key!r}",
                rules.shown_prompt(Question(prompt.problem, template, description, sizes)),
                *(f"image {n}: {width} x {height} pixels" for n, (width, height) in enumerate(sizes, 1)),
                f"answer: {prompt.answer}",
            ]
            lines += [f"choices: {list(prompt.choices)}"] if prompt.choices else []
            lines += [f"response: {sample.response}"] if isinstance(sample, SftSample) else []
            _print_lines(console, *lines)
        num_samples -= len(found)


# ---------------------------------------------------------------- check
def _check(args: argparse.Namespace, console: Console) -> None:
    with _progress(console) as progress:
        task = progress.add_task("shards", total=None)
        checked = check_shards(
            args.out, args.workers, lambda done, total: progress.update(task, completed=done, total=total)
        )
    for line in checked.wrong[:MAX_LISTED]:
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"{checked.num_samples} samples in {checked.num_shards} shards: {len(checked.wrong)} wrong")
    if checked.wrong:
        raise SystemExit(1)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


if __name__ == "__main__":
    main()
