"""Shard URLs without what only lets one read them: what a run folder, a message and a comparison may hold of them.

A presigned URL is another text every time it is renewed, and its query is a secret.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from megatron_sr1.config.data_suffixes import DATA_SUFFIXES

URL_KEYS = ("data.train", "data.cold_start", "data.heldout")
# of Amazon, Google, Tencent, Aliyun, CloudFront, Hugging Face; no part of a name, since `key=train.tar` may tell files
_CREDENTIAL = re.compile(
    r"x-(?:amz|goog|oss|cos|obs|tos)-.*|q-.*|(?:x-)?signature|sig|(?:aws|oss|goog(?:le)?)?access_?(?:key_?)?id|expir(?:e|es|y)"
    r"|policy|key-pair-id|(?:\w+[_-])?token|auth(?:orization)?|api[_-]?key|(?:\w+[_-])?secret|password|credentials?|hmac",
    re.IGNORECASE,
)
_AZURE_NAMES = "sv ss srt sr sp st se sip spr sdd ses saoid suoid scid skoid sktid skt ske sks skv"  # beside sig
_OF_AZURE = frozenset(_AZURE_NAMES.split())
_VERSION = re.compile(r"version_?id|generation", re.IGNORECASE)  # of an object, behind a path that names it
_URL = re.compile(r"\w+://[^\s'\"]+")
_HEADER = re.compile(r"((?<!\S)(?:-H|--header|-u|--user)[ =]?)('[^']*'|\"[^\"]*\"|\S+)")  # of curl in a `pipe:`


def telling(query: str) -> list[tuple[str, str]]:
    """The parts of a query that may tell files apart."""
    parts = parse_qsl(query, True)
    signed = _OF_AZURE if any(name == "sig" for name, _ in parts) else frozenset()
    return sorted((name, value) for name, value in parts if not _CREDENTIAL.fullmatch(name) and name not in signed)


def without_credentials(pattern: str) -> str:
    """A path as it is; of a URL no user, no password, and of its query what tells files apart: behind a path that names
    a tar, or another file of data, that is a version alone."""
    if "://" not in pattern:
        return pattern
    if pattern.startswith("pipe:"):
        return _HEADER.sub(r"\1...", _URL.sub(lambda found: _stripped(found[0]), pattern))
    return _stripped(pattern)


def without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by key with all its sections; those of the keys that hold URLs `without_credentials`."""
    return {key: _each(without_credentials, value) if key in URL_KEYS else value for key, value in values.items()}


def without_queries(line: str) -> str:
    """A line for people: of no URL in it user, password or query are left."""
    return _URL.sub(lambda found: re.sub(r"(?<=://)[^/@]*@", "", re.sub(r"\?.*", "?...", found[0])), line)


def _stripped(url: str) -> str:
    parts = urlsplit(url)
    kept = telling(parts.query)
    if parts.path.endswith(DATA_SUFFIXES):
        kept = [(name, value) for name, value in kept if _VERSION.fullmatch(name)]
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}" + (
        f"?{urlencode(kept, safe='{}.,/')}" if kept else ""  # braces stay braces
    )


def _each(change: Callable[[str], str], value: object) -> object:
    """Of what YAML may hold there: a list of texts, or one."""
    if isinstance(value, list | tuple):
        return [change(item) if isinstance(item, str) else item for item in value]
    return change(value) if isinstance(value, str) else value
