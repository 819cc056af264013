"""Do the tokenizer's files and config.json of a model directory mean the same tokens by the same ids?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_sr1.config.hf_config import HfConfig
from megatron_sr1.config.json_section import read_json
from megatron_sr1.config.rules import ConfigError

_OF_CONFIG = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def check_token_ids(model: HfConfig) -> None:
    """The policy takes an image's place from the tokenizer, the engine and transformers from config.json.

    Raises:
        ConfigError: an id differs between two files, or has no row in the embedding.
    """
    folder = Path(model.path).parent
    found: dict[str, tuple[int, str]] = {}  # by token: its id, and the file that says so
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            for token, number in _added(folder / name).items():
                other, file = found.setdefault(token, (number, name))
                if other != number:
                    raise ConfigError(
                        f"{folder / name}: the token {token} has the id {number}, and {other} in {file}. One of them "
                        "is of another model: copy both again."
                    )
    config = read_json(Path(model.path)).values
    for key, token in _OF_CONFIG.items():
        if token in found and type(config.get(key)) is int and config[key] != found[token][0]:
            raise ConfigError(
                f"{model.path}: {key}={config[key]} is not allowed: {found[token][1]} beside it has {token} as "
                f"{found[token][0]}. Take both files from the same model."
            )
    last, (number, file) = max(found.items(), key=lambda item: item[1][0], default=("", (-1, "")))
    if number >= model.vocab_size:
        raise ConfigError(
            f"{model.path}: vocab_size={model.vocab_size} is not allowed: {file} beside it has {last} as {number}, "
            "which has no row in the embedding. Take both files from the same model."
        )


def _added(path: Path) -> dict[str, int]:
    """{token: id} of the tokens that a file adds to the vocabulary."""
    values = read_json(path).values
    entries: list[tuple[Any, Any]] = []
    if isinstance(listed := values.get("added_tokens"), list):
        entries = [(entry.get("content"), entry.get("id")) for entry in listed if isinstance(entry, dict)]
    elif isinstance(decoder := values.get("added_tokens_decoder"), dict):
        entries = [(entry.get("content"), number) for number, entry in decoder.items() if isinstance(entry, dict)]
    return {token: int(number) for token, number in entries if isinstance(token, str) and str(number).isdecimal()}
