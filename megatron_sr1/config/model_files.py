"""Is a model directory whole: the files that a run reads beside config.json."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_sr1.config.hf_config import read_hf_config
from megatron_sr1.config.rules import ConfigError
from megatron_sr1.config.whole import Config

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_SIDE_FILES = (
    ("tokenizer.json", "vocab.json"),
    ("tokenizer_config.json",),
    ("preprocessor_config.json", "processor_config.json"),
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
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
        return []  # it is there, and corrupt: what reads the weights says so
    return sorted(name for name in files if not (folder / name).is_file())


def check_weights(config: Config, *, weights: bool) -> None:
    """Whether model.hf_dir, whose config.json `check_model` has found, holds all that a run reads.

    Args:
        weights: whether the run reads them from there.

    Raises:
        ConfigError: a file is missing. The message names the files, and the command that gets them where config.json
            says whose model it is.
    """
    folder = config.model.hf_dir
    missing = missing_files(folder, weights=weights)
    if missing:
        raise ConfigError(
            f"model.hf_dir={folder!r} is not allowed: it lacks {', '.join(missing[:5])}"
            f"{f' and {len(missing) - 5} more files' if len(missing) > 5 else ''}. {how_to_get(folder)}"
        )


def how_to_get(hf_dir: str) -> str:
    """The command that fills a model directory.

    Raises:
        ConfigError: see `read_hf_config`.
    """
    repository = read_hf_config(hf_dir).repository or "REPOSITORY"
    return f"Get the model with: hf download {repository} --local-dir {hf_dir}"
