"""Settings that NeMo-Run writes into shell commands and batch scripts as they are: there a space would cut a path in
two, `$(...)` would run, and what follows a line break would be a line of the script."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

_PATH = re.compile(r"[\w@+=./][\w@+=./:,-]*")
_MOUNTED = re.compile(r"[\w@+=./][\w@+=./-]*")  # a mount ends at ":", and at "," the next one begins
_MOUNT = re.compile(r"[\w@+=./][\w@+=./:-]*")
_IMAGE = re.compile(r"[\w@+=./][\w@+=./:#-]*")  # docker://nvcr.io#nvidia/pytorch:25.01-py3
_NAME = re.compile(r"[\w@+=.][\w@+=.:-]*")  # a part of a file's name
_PARAMETER = re.compile(r"[A-Za-z][\w-]*")
_WORDS = {
    _PATH: "without spaces and other characters that a shell reads",
    _MOUNTED: "without spaces, ':', ',' and other characters that a shell or a mount reads",
    _MOUNT: "without spaces, ',' and other characters that a shell or a list of mounts reads",
    _IMAGE: "without spaces and other characters that a shell reads",
    _NAME: "of letters, digits and any of @+=.:-_",
    _PARAMETER: "the name of an option of sbatch, without its dashes",
}


def unquoted_problems(
    executor: str, paths: Mapping[str, str], account: str, image: str | None, mounts: tuple[str, ...]
) -> Iterator[str]:
    """Of what an executor has in a shell's words: what is wrong, one line each.

    Args:
        paths: by key, the working directory and the log folder, absolute; mounted where there is an image.
    """
    given: list[tuple[str, str, re.Pattern[str]]] = []
    if executor != "local":
        given += [(key, path, _PATH if image is None else _MOUNTED) for key, path in paths.items()]
    if executor == "slurm":
        given += [("slurm.account", account, _NAME)] if account else []
        given += [("container.image", image, _IMAGE)] if image is not None else []
        given += [("container.mounts", mount, _MOUNT) for mount in mounts]
    yield from _wrong(given, f"with executor={executor}: NeMo-Run writes it without quotes")


def sbatch_problems(words: Mapping[str, str | None], extra: Mapping[str, str]) -> Iterator[str]:
    """Of the parameters of sbatch, each of which is a line of the batch script; `words` by key, `extra` its further
    ones."""
    yield from _wrong([("slurm.extra", name, _PARAMETER) for name in extra], "as it begins a line of the batch script")
    for key, value in [*words.items(), *((f"slurm.extra.{name}", value) for name, value in extra.items())]:
        if value is not None and not value.isprintable():
            yield f"{key}={value!r} is not allowed: it must be one line of printable characters."


def _wrong(given: list[tuple[str, str, re.Pattern[str]]], why: str) -> Iterator[str]:
    for key, value, pattern in given:
        if not pattern.fullmatch(value):
            yield f"{key}={value!r} is not allowed: it must be {_WORDS[pattern]}, {why}."
