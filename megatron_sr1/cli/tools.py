"""`megatron-sr1 data show` and `megatron-sr1 model tiny`: to look at samples, and to have something to try them on.

Neither asks a network for anything.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_sr1.config import FAMILIES, Config, ModelConfig, check_pixels, load_config, pixel_limits

_FORMATS = ("parquet", "jsonl", "json", "webdataset", "llava")
_NUM_TEXTS = 200  # demonstrations on digits whose texts the tokenizer of a tiny model is trained on


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """What can be done with data."""
    commands = parser.add_subparsers(dest="action", required=True)
    show = commands.add_parser("show", help="samples as a model will see them, in the terminal and as a page")
    text = "shards, patterns, folders, indices, or rows; default: data.train of --config"
    show.add_argument("paths", nargs="*", metavar="PATH", help=text)
    show.add_argument("--model", metavar="DIR", help="whose processor resizes pictures and counts tokens")
    show.add_argument("--config", type=Path, metavar="CONFIG.yaml", help="model, templates and columns of a run")
    text = "which data of --config (default: train)"
    show.add_argument("--list", choices=("train", "cold_start", "heldout"), default="train", dest="name", help=text)
    show.add_argument("--format", choices=_FORMATS, help="of rows, as tools/build_shards.py takes it; default: by name")
    show.add_argument("--images", metavar="DIR", help="where image paths of rows begin; default: beside the file")
    show.add_argument("--num", type=int, default=3, metavar="N", help="samples that are shown (default: 3)")
    text = "samples that are looked at, for histograms and bad ones (default: 1000; 0: all)"
    show.add_argument("--scan", type=int, default=1000, metavar="N", help=text)
    show.add_argument("--out", type=Path, metavar="PAGE.html", help="a page with the pictures")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What can be done with models."""
    commands = parser.add_subparsers(dest="action", required=True)
    tiny = commands.add_parser("tiny", help="a small model of random weights, in Hugging Face format, to try things on")
    names = sorted(family.name for family in FAMILIES.values())
    tiny.add_argument("--family", choices=names, required=True)
    tiny.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that is not there, or is empty")
    tiny.add_argument("--seed", type=int, default=0, help="of the weights (default: 0)")


def run_data(args: argparse.Namespace) -> None:
    """Prints samples, and writes the page.

    Raises:
        ValueError: nothing to show, or what is wrong with paths, model or configuration.
    """
    if args.num < 0 or args.scan < 0:
        raise ValueError(f"--num {args.num} and --scan {args.scan} must be 0 or more.")
    config = load_config(args.config, []) if args.config is not None else None
    if args.out is not None and args.out.is_dir():
        raise ValueError(f"--out {args.out} is a folder. Give the page a name in it.")
    if args.out is not None and args.out.suffix != ".html":
        raise ValueError(f"--out {args.out} is not allowed: it is a page, and replaces what is there. Name it .html.")
    paths = args.paths or (list(getattr(config.data, args.name)) if config is not None else [])
    if not paths:
        raise ValueError("there is nothing to show. Give a PATH, or --config with data." + args.name + ".")
    from megatron_sr1.show import page_of, read_samples, text_of

    columns = getattr(config.data, f"{args.name}_columns") if config is not None else {}
    rename = {column: to or "" for column, to in columns.items()}
    how: dict[str, Any] = {"kind": args.format, "images": args.images, "num": args.num, "scan": args.scan}
    found = read_samples(paths, _look(config, args.model), rename=rename, **how)
    sys.stdout.write(text_of(found))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(page_of(" ".join(paths), found), encoding="utf-8")
        print(f"written: {args.out}")


def _look(config: Config | None, model_dir: str | None) -> Any:
    """A `Look` by the model of --model, else of --config, else without one."""
    from megatron_sr1.platform.torchvision_ops import define_missing_torchvision_ops
    from megatron_sr1.show import Look
    from megatron_sr1.streams import preset_of

    model = config.model if config is not None else ModelConfig(hf_dir="")
    model = ModelConfig(model_dir, min_pixels=model.min_pixels, max_pixels=model.max_pixels) if model_dir else model
    system = config.model.system_prompt if config is not None else None
    processor = None
    if model.hf_dir:
        define_missing_torchvision_ops()
        from megatron_sr1.processor import Processor

        check_pixels(model)
        processor = Processor.from_pretrained(model.hf_dir, pixels=pixel_limits(model), system_prompt=system)
    from megatron_sr1.prompts import OURS, OURS_THINKING, templates_of

    if config is None:
        thinks = processor is not None and processor.opened == OURS_THINKING.first.opens
        return Look(processor, asked=OURS_THINKING if thinks else OURS)
    return Look(processor, templates_of(config), preset_of(config).asked)


def run_model(args: argparse.Namespace) -> None:
    """Writes a tiny model. Raises ValueError where something is in the way."""
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} is not allowed: it must be 0 or more.")
    from megatron_sr1.platform.torchvision_ops import define_missing_torchvision_ops

    define_missing_torchvision_ops()
    from megatron_sr1.digits import make_demonstrations
    from megatron_sr1.digits.tiny_families import create_plain
    from megatron_sr1.prompts import SHIPPED

    texts = []
    for sample in make_demonstrations(_NUM_TEXTS, seed=0):
        template, problem = SHIPPED.by_name[sample.template], sample.prompt.problem
        read = (sample.description or "") if template.reads_description else None
        texts += [template.user_text(problem, 0, read), problem, sample.response]
    create_plain(args.out, args.family, texts, args.seed)
    print(f"written: {args.out}")
