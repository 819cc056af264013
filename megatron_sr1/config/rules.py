"""The error of a configuration, and the checks that its sections are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class ConfigError(ValueError):
    """A configuration value is wrong; the message names the key, the value, what is allowed and what to do."""


def require(condition: bool, key: str, got: Any, allowed: str, remedy: str) -> None:
    """Raises ConfigError unless `condition`; `key` got `got`, which must be `allowed`, and `remedy` says what to do."""
    if not condition:
        raise ConfigError(f"{key}={got!r} is not allowed: it must be {allowed}. {remedy}")


def positive(section: str, config: Any, *names: str) -> None:
    """Raises ConfigError for a value of `config`, the section of that name, that is not greater than 0."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{section}.{name}", value, "greater than 0", f"Set {section}.{name} to a positive number.")


def one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    """Raises ConfigError for a value outside a closed set: `get_args` of the Literal that names it."""
    require(value in allowed, key, value, "one of " + ", ".join(allowed), f"Set {key} to one of them.")
