"""Builds the quickstart: shards of questions about real handwritten digits, and a tiny Qwen2.5-VL to train.

    python tools/build_digits.py --out runs/quickstart

writes OUT/data/{train,heldout,cold_start}-*.tar, OUT/base/ (Hugging Face format) and OUT/manifest.json. Nothing is
downloaded: the scans come with scikit-learn. A second call with the same arguments has nothing to do.

With --questions 3 each picture is asked about in three prompts, of five kinds, and every prompt's metadata hold all the
others as `questions`: for passes and controls that ask another one (docs/study.md).

With --published the demonstrations are of the published Vision-SR1 prompts; train and evaluate with these by

    objective.template=vision_sr1 objective.second_template=vision_sr1_reasoner objective.plain_template=vision_sr1_cot
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

import megatron_sr1.digits
import megatron_sr1.prompts
from megatron_sr1.data import write_shards
from megatron_sr1.digits import ALL_KINDS, make_demonstrations, make_prompts
from megatron_sr1.prompts import SHIPPED
from megatron_sr1.types import SftSample, TemplateName

SAMPLES_PER_SHARD = 1000
MANIFEST = "manifest.json"
PUBLISHED = {"see_think": "vision_sr1", "cot": "vision_sr1_cot", "caption_reasoner": "vision_sr1_reasoner"}
MAX_TOKENIZER_SAMPLES = 1000  # the texts repeat; more of them change no merge


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    args = _parse(arguments)
    console = Console()
    wanted = {
        "train": args.train,
        "heldout": args.heldout,
        "demonstrations": args.demonstrations,
        "seed": args.seed,
        "published": args.published,
        "questions": args.questions,
        "builder": _builder_digest(),
    }
    if is_complete(args.out, wanted):
        console.print(f"{args.out} is complete already; nothing to do.")
    else:
        _build(args, wanted, console)
    _print_summary(args.out, console)


def is_complete(out: Path, wanted: dict[str, Any]) -> bool:
    """Whether `out` holds the manifest of just these arguments, and every file in it with the size it says."""
    manifest = out / MANIFEST
    if not manifest.is_file():
        return False
    found = json.loads(manifest.read_text())
    sizes = {name: (out / name).stat().st_size if (out / name).is_file() else None for name in found["files"]}
    return found["arguments"] == wanted and found["files"] == sizes


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    parser.add_argument("--train", type=int, default=4000, help="prompts for reinforcement learning")
    parser.add_argument("--heldout", type=int, default=400, help="prompts for evaluation, on scans used nowhere else")
    parser.add_argument("--demonstrations", type=int, default=8000, help="cold-start samples, half for either pass")
    parser.add_argument("--questions", type=int, default=1, help="about each picture; above 1 of more kinds")
    parser.add_argument("--published", action="store_true", help="demonstrations of the published Vision-SR1 prompts")
    parser.add_argument("--seed", type=int, default=1, help="of the data and of the model's weights")
    args = parser.parse_args(arguments)
    for name in ("train", "heldout", "demonstrations"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: it must be 1 or more.")
    if not 1 <= args.questions <= len(ALL_KINDS):
        parser.error(f"--questions {args.questions}: it must be 1 ... {len(ALL_KINDS)}, a kind each.")
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: it must be 0 or more.")
    return args


def _build(args: argparse.Namespace, wanted: dict[str, Any], console: Console) -> None:
    (args.out / MANIFEST).unlink(missing_ok=True)  # from here on the directory is incomplete until the end
    demonstrations: list[SftSample] = []
    files: list[Path] = []
    for part in track(("train", "heldout", "cold_start", "base"), description="digits", console=console):
        if part == "base":
            plain = PUBLISHED["cot"] if args.published else "cot"
            files += _build_model(demonstrations, args.out / "base", args.seed, plain)
        elif part == "cold_start":
            demonstrations = make_demonstrations(args.demonstrations, args.seed, args.questions)
            if args.published:
                demonstrations = [replace(sample, template=PUBLISHED[sample.template]) for sample in demonstrations]
            files += write_shards(demonstrations, args.out / "data", part, SAMPLES_PER_SHARD)
        else:
            prompts = make_prompts(part, wanted[part], args.seed, args.questions)
            files += write_shards(prompts, args.out / "data", part, SAMPLES_PER_SHARD)
    sizes = {str(path.relative_to(args.out)): path.stat().st_size for path in files}
    temporary = args.out / (MANIFEST + ".tmp")
    temporary.write_text(json.dumps({"arguments": wanted, "files": sizes}, indent=2) + "\n")
    os.replace(temporary, args.out / MANIFEST)


def _build_model(demonstrations: Sequence[SftSample], base: Path, seed: int, plain: TemplateName) -> list[Path]:
    """Returns the files of the model; its tokenizer has seen every instruction and a part of the responses."""
    # here, because both import torch, and a directory that is complete needs neither
    from megatron_sr1.digits.tiny_model import create_tiny_model
    from megatron_sr1.platform.torchvision_ops import define_missing_torchvision_ops

    texts = [text for sample in demonstrations[:MAX_TOKENIZER_SAMPLES] for text in _texts(sample, plain)]
    define_missing_torchvision_ops()
    create_tiny_model(base, texts, seed)
    return sorted(path for path in base.iterdir() if path.is_file())


def _texts(sample: SftSample, plain: TemplateName) -> list[str]:
    problem, description = sample.prompt.problem, sample.description
    asked = SHIPPED.by_name[sample.template]
    if description is not None:
        return [asked.user_text(problem, 0, description), sample.response]
    return [asked.user_text(problem), SHIPPED.by_name[plain].user_text(problem), sample.response]


def _builder_digest() -> str:
    """sha256 of the code that decides what is built: data made by other code is rebuilt."""
    rooms = (megatron_sr1.digits, megatron_sr1.prompts)
    sources = [path for room in rooms for path in sorted(Path(room.__file__).parent.glob("*.py"))]
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _print_summary(out: Path, console: Console) -> None:
    manifest = json.loads((out / MANIFEST).read_text())
    table = Table(title=str(out))
    for column in ("file", "KiB"):
        table.add_column(column, justify="right" if column == "KiB" else "left")
    for name, size in manifest["files"].items():
        table.add_row(name, f"{size / 1024:.0f}")
    console.print(table)
    counts = ", ".join(f"{manifest['arguments'][name]} {name}" for name in ("train", "heldout", "demonstrations"))
    console.print(f"samples: {counts}")


if __name__ == "__main__":
    main()
