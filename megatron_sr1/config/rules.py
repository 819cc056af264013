"""The error of a configuration, and the checks that its sections are made of."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any


class ConfigError(ValueError):
    """A configuration value is wrong; the message names the key, the value, what is allowed and what to do."""


def require(condition: bool, key: str, got: Any, allowed: str, remedy: str) -> None:
    """Raises ConfigError unless `condition`; `key` got `got`, which must be `allowed`, and `remedy` says what to do."""
    if not condition:
        raise ConfigError(f"{key}={got!r} is not allowed: it must be {allowed}. {remedy}")


def known_key(place: str, key: str, keys: Sequence[str], of: str) -> None:
    """Raises ConfigError for a key, at `place`, that is none of the `keys` of a stream, pass or whatever `of` says."""
    if key not in keys:
        near = difflib.get_close_matches(key, keys, 1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{place} is no key of a {of}.{meant} Known keys: {', '.join(keys)}.")


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both allowed unless `above` or `below` leaves them out. Neither may be infinite:
    every number of a configuration is finite, and of a size that something can be made of."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def __contains__(self, number: float) -> bool:
        """Never of a NaN."""
        is_above = self.low < number if self.above else self.low <= number
        return is_above and (number < self.high if self.below else number <= self.high)

    def __str__(self) -> str:
        low = f"greater than {self.low:.10g}" if self.above else f"at least {self.low:.10g}"
        return f"{low} and {'less than' if self.below else 'at most'} {self.high:.10g}"


COUNT = Range(1, 10**9)
COUNT_OR_NONE = Range(0, 10**9)


def check_numbers(section: str, config: Any, ranges: Mapping[str, Range]) -> None:
    """Raises ConfigError for a number outside its range, of `config`, the section of that name; null is none.

    Args:
        ranges: by key, for every key that takes numbers.
    """
    for name in (f.name for f in fields(config)):
        value = getattr(config, name)
        for number in value if isinstance(value, tuple | list) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                key = f"{section}.{name}" if section else name
                require(number in ranges[name], key, number, str(ranges[name]), f"Set {key} to such a number.")


def require_number(
    key: str, value: Any, allowed: Range, *, whole: bool = False, remedy: str = "Set it to such a number."
) -> None:
    """Raises ConfigError for what is no number, or one outside its range, where any value may be written."""
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    fits = is_number and math.isfinite(value) and value in allowed
    require(fits, key, value, f"a {'whole ' if whole else ''}number, {allowed}", remedy)


def one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    """Raises ConfigError for a value outside a closed set: `get_args` of the Literal that names it."""
    require(value in allowed, key, value, "one of " + ", ".join(allowed), f"Set {key} to one of them.")
