"""Paths and patterns as a shell user writes them: `~`, `*`, `{00..07}`; what is there literally is meant literally."""

from __future__ import annotations

import glob
import os
import re


class MissingFiles(ValueError):
    """A pattern matches no file."""


_BRACES = re.compile(r"\{[^{}]*(?:,|\.\.)[^{}]*\}")


def matching(pattern: str) -> list[str]:
    """The files and folders that a path or glob pattern means, sorted; [] where nothing is there.

    The longest beginning that exists as it is written is no pattern: `in/set[v2]/*.tar` looks into `in/set[v2]`, if
    that is a folder.
    """
    if not os.path.exists(pattern):
        pattern = os.path.expanduser(pattern)
    ends = [len(pattern), *(place for place in range(len(pattern) - 1, 0, -1) if pattern[place] == "/")]
    end = next((end for end in ends if os.path.exists(pattern[:end])), 0)
    return sorted(glob.glob(glob.escape(pattern[:end]) + pattern[end:], recursive=True))


def has_braces(pattern: str) -> bool:
    """Whether it has alternatives: a{0..3}, {a,b}."""
    return bool(_BRACES.search(pattern))


def missing(key: str, path: str) -> MissingFiles:
    """The error to raise where the pattern of a configuration key matches nothing."""
    return MissingFiles(
        f"{key}: {path!r} matches no file (looked from {os.getcwd()}). Correct the path or write the shards."
    )
