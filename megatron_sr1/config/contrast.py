"""`objective.contrast`: what is written of each contrast, checked key by key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from megatron_sr1.config.rules import Range, known_key, require, require_number
from megatron_sr1.types import ContrastContext, ContrastWeights

KEYS = ("name", "context", "share", "field", "weights")
_EXAMPLE = "Write {name: blind, context: no_image}."
_SHARE = Range(0, 1, above=True)


def check_contrasts(contrasts: Sequence[Any]) -> None:
    """
    Raises:
        ConfigError: an entry is no mapping, has no name or the name of another, an unknown key, a value that is not
            allowed, a share without patches that are masked, or a field without metadata that are the context.
    """
    names: list[str] = []
    for index, entry in enumerate(contrasts):
        where = f"objective.contrast[{index}]"
        require(isinstance(entry, Mapping), where, entry, "keys with values", _EXAMPLE)
        name = entry.get("name")
        is_name = isinstance(name, str) and name.isidentifier() and name.isascii() and name[0] != "_"
        require(is_name, f"{where}.name", name, "a word of letters, digits and _ that begins with a letter", _EXAMPLE)
        require(name not in names, f"{where}.name", name, "a name that no other contrast has", "Streams name theirs.")
        names.append(str(name))
        for key, value in entry.items():
            _check(f"{where} ({name}).{key}", str(key), value)
        require(
            "share" not in entry or entry.get("context") == "masked",
            f"{where} ({name}).share",
            entry.get("share"),
            "left out where context is not masked, for it is the share of patches that are",
            "Write {name: masked, context: masked, share: 0.6}.",
        )
        require(
            ("field" in entry) == (entry.get("context") == "metadata"),
            f"{where} ({name}).field",
            entry.get("field"),
            "the metadata's field that is the context, given where context is metadata and nowhere else",
            "Write {name: gold, context: metadata, field: facts}.",
        )


def _check(where: str, key: str, value: Any) -> None:
    known_key(where, key, KEYS, "contrast")
    if key in ("context", "weights"):
        allowed = get_args(ContrastContext if key == "context" else ContrastWeights)
        require(value in allowed, where, value, "one of " + ", ".join(allowed), "Set it to one of them.")
    elif key == "share":
        require_number(where, value, _SHARE, remedy="PAPO has 0.6.")
    elif key == "field":
        require(
            isinstance(value, str) and value != "", where, value, "a field's name", "Write it in quotes if need be."
        )
