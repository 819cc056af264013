"""Texts of a sample's metadata that stand for its images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_sr1.types import Prompt


def metadata_text(prompt: Prompt, field: str, reader: str, remedy: str) -> str:
    """`metadata[field]`: a string, or several, which are joined by commas.

    Args:
        reader: who reads it, and `remedy`: how not to have it read; for the message.

    Raises:
        ValueError: the sample has no such text.
    """
    value = prompt.metadata.get(field)
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, Sequence) or not parts or not all(map(is_text, parts)):
        raise ValueError(
            f"sample {prompt.key!r}: {reader} reads the metadata's {field!r}, which is {value!r}: it must be a text or "
            f"a list of texts. Correct the sample, or {remedy}."
        )
    return ", ".join(parts)


def is_text(value: Any) -> bool:
    """Whether it says something."""
    return isinstance(value, str) and value.strip() != ""
