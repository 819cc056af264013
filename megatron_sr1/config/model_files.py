"""Is a model directory whole: the files that a run reads beside config.json."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from megatron_sr1.config.hf_config import SPATIAL_MERGE, read_hf_config
from megatron_sr1.config.json_section import read_json
from megatron_sr1.config.pixels import PREPROCESSOR, PROCESSOR, check_stated_pixels, image_processor
from megatron_sr1.config.rules import ConfigError
from megatron_sr1.config.token_ids import check_token_ids
from megatron_sr1.config.whole import Config

_PIECES, _PIECE_BYTES = 64, 1 << 16  # of a weight file, in its fingerprint
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_PROMPT_FILES = (  # that say how a sample becomes tokens and pixels
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json"),
    *(PREPROCESSOR, PROCESSOR),
)
_SIDE_FILES = (
    ("tokenizer.json", "vocab.json"),
    ("tokenizer_config.json",),
    (PREPROCESSOR, PROCESSOR),
)


def missing_files(hf_dir: str, *, weights: bool = True) -> list[str]:
    """Names of the files that `hf_dir` lacks: weights in safetensors format, tokenizer, image processor.

    Args:
        weights: whether weights are needed.
    """
    folder = Path(hf_dir)
    missing = [names[0] for names in _SIDE_FILES if not any((folder / name).is_file() for name in names)]
    return ([*_missing_weights(folder), *missing]) if weights else missing


def _missing_weights(folder: Path) -> list[str]:
    index = folder / _INDEX
    if not index.is_file():
        return [] if (folder / _SINGLE).is_file() else [f"{_SINGLE} (or {_INDEX} and its files)"]
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []  # it is there, and corrupt: what reads the weights says so
    if not all(isinstance(name, str) for name in files):
        return []
    return sorted(name for name in files if not (folder / name).is_file())


def check_weights(config: Config, *, weights: bool) -> None:
    """Whether model.hf_dir, whose config.json `check_model` has found, holds all that a run reads.

    Args:
        weights: whether the run reads them from there.

    Raises:
        ConfigError: a file is missing: the message names the files, and the command that gets them where config.json
            says whose model it is; an adapter lies there, which nobody would apply; the image processor or the
            tokenizer is of another model.
    """
    folder = config.model.hf_dir
    missing = missing_files(folder, weights=weights)
    if missing:
        raise ConfigError(
            f"model.hf_dir={folder!r} is not allowed: it lacks {', '.join(missing[:5])}"
            f"{f' and {len(missing) - 5} more files' if len(missing) > 5 else ''}. {how_to_get(folder)}"
        )

    adapter = next((name for name in _ADAPTERS if (Path(folder) / name).is_file()), None)
    if weights and adapter:
        raise ConfigError(
            f"model.hf_dir={folder!r} is not allowed: it holds {adapter}, and adapters are not applied. Merge the "
            "adapter into its model and give the merged one, or remove the adapter's files."
        )
    _check_preprocessor(Path(folder))
    check_token_ids(read_hf_config(folder))


def check_folders(config: Config) -> None:
    """Whether the run may write where it does.

    Raises:
        ConfigError: a file stands where it wants a folder; its export, <run_dir>/hf, would replace the model that it
            starts from.
    """
    folder = Path(config.run_dir).absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise ConfigError(
            f"run_dir={config.run_dir!r} is not allowed: {there} is a file. Choose another run_dir, or move it away."
        )
    export = (Path(config.run_dir) / "hf").resolve()
    for key in ("hf_dir", "megatron_dir"):
        value = getattr(config.model, key)
        if value and (folder := Path(value).resolve()).is_relative_to(export):
            raise ConfigError(
                f"model.{key}={value!r} is not allowed with run_dir={config.run_dir!r}: the run exports to {export}, "
                f"and would replace {folder}. Choose another run_dir."
            )


def _check_preprocessor(folder: Path) -> None:
    """Its patches must be those of config.json's vision tower; a sister model's have another size."""
    found = image_processor(folder)
    std, rescale = found.values.get("image_std"), found.values.get("rescale_factor", 1 / 255)
    are_positive = isinstance(std, list) and len(std) == 3 and all(type(value) in (int, float) for value in std)
    found.check(std is None or (are_positive and min(std or [0]) > 0), "image_std", "three numbers greater than 0")
    found.check(type(rescale) is float and abs(rescale * 255 - 1) < 1e-3, "rescale_factor", "1/255")
    for name in ("do_rescale", "do_normalize", "do_resize"):
        found.check(found.flag(name, default=True) is not False, name, "true: the vision tower has seen no others")
    check_stated_pixels(found)
    model = read_hf_config(str(folder))
    vision = read_json(model.path).section("vision_config")
    # defaults: of transformers' classes
    for ours, theirs, default in (
        ("patch_size", "patch_size", model.family.defaults["patch_size"]),
        ("merge_size", "spatial_merge_size", SPATIAL_MERGE),
        ("temporal_patch_size", "temporal_patch_size", 2),
    ):
        cut, wanted = found.count(ours, 14 if ours == "patch_size" else 2), vision.count(theirs, default)
        if cut != wanted:
            raise ConfigError(
                f"{found.path}: {found.prefix}{ours}={cut} is not allowed: {model.path} has vision_config.{theirs}="
                f"{wanted}. It is the file of another model: take the one that belongs to this model."
            )


def model_fingerprint(config: Config) -> str:
    """Whether two folders hold the model that a run starts from, wherever they lie: 32 hex digits for its weights, and
    32 for the files that make prompts and pixels.

    The first are over config.json, and of each weight file its name, its size, its first bytes, where safetensors has
    all names and shapes, and pieces from all over it. So a copy is the same and another training stage is not, in less
    than a second for any size.
    """
    digest = hashlib.sha256((Path(config.model.hf_dir) / "config.json").read_bytes())
    folder = Path(config.model.megatron_dir or config.model.hf_dir)
    pattern = "*.distcp" if config.model.megatron_dir else "*.safetensors"
    for path in sorted(folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for piece in range(_PIECES):
                file.seek(piece * max(0, size - _PIECE_BYTES) // max(1, _PIECES - 1))
                digest.update(file.read(_PIECE_BYTES))
    others = hashlib.sha256()
    for path in (Path(config.model.hf_dir) / name for name in _PROMPT_FILES):
        others.update(path.name.encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()[:32] + others.hexdigest()[:32]


def how_to_get(hf_dir: str) -> str:
    """The command that fills a model directory.

    Raises:
        ConfigError: see `read_hf_config`.
    """
    repository = read_hf_config(hf_dir).repository or "REPOSITORY"
    return f"Get the model with: hf download {repository} --local-dir {hf_dir}"
