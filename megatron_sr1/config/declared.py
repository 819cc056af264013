"""What was written, in the shape that the sections declare."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from megatron_sr1.config.rules import ConfigError, require

_REFERENCE = "${"  # to another key, whose own value has been looked at

_ELEMENTS: dict[type, tuple[str, tuple[type, ...]]] = {  # of lists: what they are called, and what YAML makes of them
    str: ("texts", (str, int, float)),
    int: ("whole numbers", (int,)),
    float: ("numbers", (float, int)),
}


def as_declared(kind: Any, value: Any, key: str) -> Any:
    """`value`, which was written under `key`, as its type asks: a text or a number becomes a list of one where a list
    belongs. Unknown keys and wrong types of single values are left to omegaconf.

    Args:
        kind: a section's dataclass, or the type of one of its fields.

    Raises:
        ConfigError: a list or keys where something else belongs, or the mark `???` of a value that is yet to be given.
    """
    require(value != "???", key, value, "a value", "Write it, or leave the key out for the default.")
    is_reference = isinstance(value, str) and value.startswith(_REFERENCE)
    if value is None or is_reference:
        return value
    if isinstance(kind, type) and is_dataclass(kind):
        remedy = f"Write {key}: {{KEY: VALUE}}, or {key}.KEY=VALUE."
        require(isinstance(value, dict), key, value, "keys with values", remedy)
        assert isinstance(value, dict)
        kinds = get_type_hints(kind)
        return {name: _inner(kinds, name, inner, key) for name, inner in value.items()}
    if get_origin(kind) is list:
        require(isinstance(value, list), key, value, "a list", f"Write {key}: [{{name: ...}}, {{name: ...}}].")
        return value
    if get_origin(kind) is tuple:
        entries = value if isinstance(value, list) else [value]
        name, types = _ELEMENTS[get_args(kind)[0]]
        for entry in entries:
            is_one = isinstance(entry, types) and not isinstance(entry, bool) and entry != ""
            is_one |= isinstance(entry, str) and entry.startswith(_REFERENCE)
            require(is_one, key, value, f"a list of {name}", f"Write {key}: [A, B], or {key}=[A,B].")
        return entries
    if kind in (str, str | None) and isinstance(value, bool | float):
        raise ConfigError(f"{key}={value!r} is not allowed: YAML reads no text there. Write it in quotes.")
    if isinstance(value, list):
        raise ConfigError(f"{key}={value!r} is not allowed: it must not be a list. Write the value without brackets.")
    return value


def _inner(kinds: dict[str, Any], name: Any, value: Any, key: str) -> Any:
    whole = f"{key}.{name}" if key else str(name)
    return as_declared(kinds[name], value, whole) if name in kinds else value
