"""`model.freeze`: what of it can be told without the names of the model's tensors (`weights/frozen.py` has these)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_sr1.config.families import HfConfig
from megatron_sr1.config.rules import ConfigError, require

KEY = "model.freeze"
# vision: the tower without its mergers; merger: those of visual tokens and of DeepStack features; language: decoder
# layers, final norm and output head; embeddings: of tokens, with the head where that is tied
FROZEN_PARTS = ("vision", "merger", "language", "embeddings")


def check_entries(freeze: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: an entry stands twice, or is neither a part of the model nor a regular expression.
    """
    for entry in freeze:
        remedy = "Leave one out."
        require(freeze.count(entry) == 1, KEY, freeze, f"entries that differ: {entry!r} stands there twice", remedy)
        try:
            re.compile(entry)
        except re.error as error:
            raise ConfigError(
                f"{KEY}={list(freeze)!r} is not allowed: {entry!r} is no regular expression ({error}). It must be one "
                f"of {', '.join(FROZEN_PARTS)}, or a regular expression for whole names of tensors."
            ) from error


def check_parts(freeze: Sequence[str], vision_lr: float | None, model: HfConfig) -> None:
    """
    Raises:
        ConfigError: nothing is left to train; the head would be frozen and, being the embedding, trained; a learning
            rate of what is frozen.
    """
    shown = list(freeze)
    if set(FROZEN_PARTS) <= set(freeze):
        raise everything_frozen(freeze)
    require(
        not model.tied or "language" not in freeze or "embeddings" in freeze,
        KEY,
        shown,
        f"language with embeddings: {model.path} has tie_word_embeddings, so the head, a part of language, is the "
        "embedding",
        "Add embeddings, which freezes both, or name the layers: '.*layers[.].*'.",
    )
    require(
        vision_lr is None or not {"vision", "merger"} <= set(freeze),
        "optimizer.vision_lr",
        vision_lr,
        f"null with {KEY}={shown!r}, which freezes all that it is for",
        "Leave one of them out.",
    )


def everything_frozen(freeze: Sequence[str]) -> ConfigError:
    """The error where no parameter is left to train."""
    return ConfigError(
        f"{KEY}={list(freeze)!r} is not allowed: it freezes every parameter, so nothing would be trained. Leave "
        "something out."
    )
