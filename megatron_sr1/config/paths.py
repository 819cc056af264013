"""Paths as the person at the keyboard means them."""

from __future__ import annotations

import os

from megatron_sr1.config.rules import ConfigError


def home_path(key: str, text: str) -> str:
    """The path with the user's folder in place of a leading `~`: no shell has put it there in a YAML file, nor after
    the = of a dotted key.

    Raises:
        ConfigError: `~NAME` of no user.
    """
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ConfigError(
            f"{key}={text!r} is not allowed: no user is named {text[1:].split(os.sep)[0]!r}. Write the folder out, or "
            f"./{text} if it is really named so."
        )
    return path
