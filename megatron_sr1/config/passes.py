"""`objective.passes`: what is written of each later pass, checked key by key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from megatron_sr1.config.rules import known_key, require
from megatron_sr1.types import SECOND, Context, Reader

KEYS = ("name", "context", "field", "question", "samples", "reader", "enabled")
_EXAMPLE = "Write {name: blind, context: nothing}."
_MOST_SAMPLES = 64  # of a pass, for each response of the first


def check_passes(passes: Sequence[Any]) -> None:
    """
    Raises:
        ConfigError: an entry is no mapping, has no name or the name of another, an unknown key, a value that is not
            allowed, or keys that contradict each other.
    """
    names: list[str] = []
    for index, entry in enumerate(passes):
        where = f"objective.passes[{index}]"
        require(isinstance(entry, Mapping), where, entry, "keys with values", _EXAMPLE)
        name = entry.get("name")
        is_name = isinstance(name, str) and name != "first" and name.isidentifier() and name.isascii()
        allowed = "a word of letters, digits and _ that begins with a letter, and not first"
        require(is_name, f"{where}.name", name, allowed, _EXAMPLE)
        require(name not in names, f"{where}.name", name, "a name that no other pass has", "Streams name their pass.")
        names.append(str(name))
        for key, value in entry.items():
            _check(f"{where} ({name})", str(key), value)
        _agree(f"{where} ({name})", entry)


def _check(where: str, key: str, value: Any) -> None:
    place = f"{where}.{key}"
    known_key(place, key, KEYS, "pass")
    if key in ("context", "reader"):
        allowed = get_args(Context if key == "context" else Reader)
        require(value in allowed, place, value, "one of " + ", ".join(allowed), "Set it to one of them.")
    elif key == "samples":
        is_count = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST_SAMPLES
        require(is_count, place, value, f"a whole number from 1 to {_MOST_SAMPLES}", "1 is the paper's.")
    elif key == "enabled":
        require(isinstance(value, bool), place, value, "true or false", "False takes the pass away.")
    else:
        require(isinstance(value, str) and value != "", place, value, "a word", "Write it in quotes if need be.")


def _agree(where: str, entry: Mapping[str, Any]) -> None:
    context = entry.get("context", SECOND.context)
    has_field = "field" in entry
    require(
        has_field == (context == "metadata"),
        f"{where}.field",
        entry.get("field"),
        "the metadata's field that is the context, given where context is metadata and nowhere else",
        "Write {name: gold, context: metadata, field: facts}.",
    )
    if entry["name"] == SECOND.name:
        other = [key for key in ("context", "field", "question", "reader") if key in entry]
        require(
            not other,
            f"{where}.{''.join(other[:1])}",
            entry.get("".join(other[:1])),
            "left out: the second pass is the policy's own, from the description",
            "Give such a pass another name.",
        )
