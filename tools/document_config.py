#!/usr/bin/env python3
"""Writes docs/configuration.md from the dataclasses of the configuration: every key with its values, default, meaning.

    python tools/document_config.py [--check]

The meaning of a key is the comment behind it, or the comments above it. --check only compares, and exits with 1 where
the file is another.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_sr1.config import Config

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
HEAD = """# Every key of the configuration

Made by `tools/document_config.py` from the dataclasses in `megatron_sr1/config/`; a test keeps it so. A key is written
in YAML under its section, or as `section.key=value` behind a command. `null` is none.
"""


def keys_of(kind: type, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(key, values, default, meaning) of a section's own keys, in order."""
    hints, defaults, meanings = get_type_hints(kind), kind(), _comments(kind)
    for field in fields(kind):
        default = getattr(defaults, field.name)
        if not is_dataclass(default):
            yield f"{prefix}{field.name}", _values(hints[field.name]), _written(default), meanings.get(field.name, "")


def page() -> str:
    """The whole file."""
    parts = [HEAD, "## The top level\n", _table(Config, "")]
    for prefix, section in _sections(Config(), ""):
        kind = type(section)
        doc = inspect.getdoc(kind) or ""
        parts += [f"## {prefix.removesuffix('.')}\n", f"{doc}\n", _table(kind, prefix)]
    return "\n".join(parts)


def _sections(section: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield f"{prefix}{field.name}.", value
            yield from _sections(value, f"{prefix}{field.name}.")


def _table(kind: type, prefix: str) -> str:
    rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
    rows += [f"| `{key}` | {' | '.join(_cell(text) for text in row)} |" for key, *row in keys_of(kind, prefix)]
    return "\n".join(rows) + "\n" if len(rows) > 2 else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _values(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return ", ".join("`null`" if part is NoneType else _values(part) for part in get_args(hint))
    names = {str: "text", bool: "`true`, `false`", int: "whole number", float: "number", dict: "keys with values"}
    origin = get_origin(hint) or hint
    if origin in (tuple, list):
        element = get_args(hint)[0]
        return "list" if element is Any else f"list: {_values(element)}"
    return names[origin]


def _written(value: Any) -> str:
    text = json.dumps(list(value) if isinstance(value, tuple) else value)
    return f"`{text}`"


def _comments(kind: type) -> dict[str, str]:
    """Of each field: the comment behind it, else those on the lines above it."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in inspect.getsource(kind).splitlines():
        if match := re.fullmatch(r"    # (.*)", line):
            above.append(match[1])
            continue
        if match := re.match(r"    (\w+): [^#]*?(?:  # (.*))?$", line):
            found[match[1]] = match[2] or " ".join(above)
        above = []
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    check = parser.parse_args().check
    text = page()
    if check:
        same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
        print(f"{PAGE}: {'as it should be' if same else 'another than the dataclasses; run this without --check'}")
        return 0 if same else 1
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
