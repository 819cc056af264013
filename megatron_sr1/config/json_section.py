"""Typed reading of a JSON file that somebody else wrote; a complaint names file, key, what it got, what is allowed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sr1.config.rules import ConfigError, require

REMEDY = "Is the file as its publisher wrote it? Get it again, or correct it."
LARGEST = 10**8  # of what a model has of anything; more is a slip, or made to exhaust whoever reads it


@dataclass(frozen=True)
class JsonSection:
    """One object of a JSON file. A key that is absent takes the default; null is a value like any other."""

    path: Path
    values: Mapping[str, Any]
    prefix: str = ""  # of its keys in messages: those of the objects around it, each with a dot

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def is_null(self, key: str) -> bool:
        """Whether the key is absent or null."""
        return self.values.get(key) is None

    def check(self, condition: bool, key: str, allowed: str) -> None:
        """Raises ConfigError for the value of `key`, which must be `allowed`, unless `condition`."""
        name = f"{self.path}: {self.prefix}{key}"
        if not condition and key not in self.values:
            raise ConfigError(f"{name} is missing: it must be {allowed}. {REMEDY}")
        require(condition, name, self.values.get(key), allowed, REMEDY)

    def count(self, key: str, default: float | None = None, largest: int = LARGEST) -> int:
        """A positive whole number; needed where there is no default."""
        value = self.values.get(key, default)
        self.check(_is_whole(value) and 0 < value <= largest, key, f"a whole number from 1 to {largest}")
        return value

    def number(self, key: str, default: float) -> float:
        """A positive number, as it is written; JSON files hold Infinity, too, which is none."""
        value = self.values.get(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        self.check(is_number and 0 < value <= 1e30, key, "a number greater than 0 and at most 1e30")
        return value

    def flag(self, key: str, default: bool | None = False) -> bool | None:
        """true or false; the default where the key is absent."""
        if key not in self.values:
            return default
        self.check(isinstance(self.values[key], bool), key, "true or false")
        return self.values[key]

    def numbers(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """Whole numbers from 0 on."""
        value = self.values.get(key, default)
        is_list = isinstance(value, list | tuple)
        is_good = is_list and all(_is_whole(x) and 0 <= x <= LARGEST for x in value)
        self.check(is_good, key, f"a list of whole numbers from 0 to {LARGEST}")
        return tuple(value)

    def section(self, key: str) -> JsonSection:
        """The object under `key`, an empty one where the key is absent or null."""
        value = {} if self.is_null(key) else self.values[key]
        self.check(isinstance(value, dict), key, "a JSON object")
        return JsonSection(self.path, value, f"{self.prefix}{key}.")


def read_json(path: Path) -> JsonSection:
    """The object that a file is.

    Raises:
        ConfigError: it is no JSON object, or cannot be read.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, a number of 5000 digits
        raise ConfigError(f"{path}: {error}. The file must be a JSON object. {REMEDY}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {str(tree)[:80]!r}, but it must be a JSON object. {REMEDY}")
    return JsonSection(path, tree)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
