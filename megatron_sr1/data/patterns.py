"""Paths and patterns as a shell user writes them: `~`, `*`, `{00..07}`; what is there literally is meant literally."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence

from megatron_sr1.data.urls import expand_url, is_url

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


def expand_shards(patterns: Sequence[str], key: str) -> list[str]:
    """Expands paths, glob patterns, folders (all shards in and below them), braces and URLs, in the given order, each
    glob's matches sorted, each file once, however it is spelled.

    Args:
        key: the configuration key the patterns come from, for messages ("data.train").

    Raises:
        ValueError: no pattern, or one that matches no file; of braces each alternative must match one.
    """
    if not patterns:
        raise ValueError(f"{key} is empty. Set {key} to a list of shards, for example [data/train-*.tar].")
    found: dict[str, str] = {}  # by what the path or URL leads to
    for pattern in patterns:
        if is_url(pattern):
            found.update({url: url for url in expand_url(pattern)})
            continue
        is_literal = bool(matching(pattern)) or not _BRACES.search(pattern)
        for path in [pattern] if is_literal else expand_url(pattern):
            matches = _shards(path)
            if not matches:
                raise ValueError(
                    f"{key}: {path!r} matches no file (looked from {os.getcwd()}). Correct the path or write the "
                    "shards."
                )
            for match in matches:
                found.setdefault(os.path.realpath(match), match)
    return list(found.values())


def _shards(pattern: str) -> list[str]:
    paths = matching(pattern)
    folder = paths[0] if len(paths) == 1 and os.path.isdir(paths[0]) else None
    if folder is not None and (os.path.exists(pattern) or os.path.exists(os.path.expanduser(pattern))):
        paths = sorted(glob.glob(os.path.join(glob.escape(folder), "**", "*.tar"), recursive=True))
    return [path for path in paths if os.path.isfile(path)]
