"""Takes out of texts what says where they were made: paths, names of machine and user, addresses, secrets."""

from __future__ import annotations

import os
import re
import socket
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
_URL = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s'\"<>)\]]+", re.IGNORECASE)
_ADDRESS = re.compile(r"\b\d{1,3}(\.\d{1,3}){3}(:\d+)?\b")
_SECRET_NAME = re.compile(r"token|secret|passw|credential|api_?key", re.IGNORECASE)
_SECRET = re.compile(r"(?i)\b([\w-]*(?:token|secret|passw(?:or)?d|api[_-]?key)[\w-]*['\"]?\s*[=:]\s*)['\"]?[^\s'\"]+")
# folders of an absolute path; what stands before it is no part of a word, so that "tokens/s" and "a/b" stay
_FOLDERS = re.compile(r"(?<![\w.~/<>…-])/(?:[^\s/:'\"`,;()\[\]{}=<>|]+/)+")
_TOP = re.compile(r"(?<![\w.~/<>…-])/(?:tmp|home|root|work|var|usr|opt|mnt|etc|data|scratch|proc|dev)\b")
_MIN_NAME = 4  # letters of a name that is looked for: shorter ones are parts of words
_EVERYWHERE = ("root", "localhost")  # they name nobody
_MIN_SECRET = 8


def scrubbed(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """`text` without them: paths of the repository become relative, of others the last part stays."""
    for name, value in environment.items():
        if _SECRET_NAME.search(name) and len(value) >= _MIN_SECRET:
            text = text.replace(value, "<secret>")
    text = _SECRET.sub(r"\1<secret>", text)
    text = _URL.sub("<address>", text)
    text = _ADDRESS.sub(lambda found: found[0] if found[0] in _versions() else "<address>", text)
    for folder, stands_for in (
        (sys.prefix, "<environment>"),  # it may be in the repository
        (str(REPOSITORY), "."),
        (sys.base_prefix, "<python>"),
        (tempfile.gettempdir(), "<temporary>"),
        (str(Path.home()), "~"),
    ):
        if len(folder) > 1:
            text = re.sub(rf"(?<![\w.~-]){re.escape(folder)}(?=[/\s:'\"`,;)\]]|$)", stands_for, text)
    text = _FOLDERS.sub("…/", text)
    text = _TOP.sub("…", text)
    for name in (socket.gethostname(), environment.get("USER", "")):
        if len(name) >= _MIN_NAME and name not in _EVERYWHERE:
            text = re.sub(rf"\b{re.escape(name)}\b", "<name>", text)
    return text


@cache
def _versions() -> frozenset[str]:
    """Of the installed packages: one of four parts (cuDNN's) looks like an address."""
    return frozenset(package.version for package in distributions())


def scrubbed_tree(tree: Any) -> Any:
    """Every text in a JSON-like tree; keys too."""
    if isinstance(tree, Mapping):
        return {scrubbed(str(key)): scrubbed_tree(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [scrubbed_tree(value) for value in tree]
    return scrubbed(tree) if isinstance(tree, str) else tree
