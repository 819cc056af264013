"""Names of shards: which file a path or URL means, without the signature that lets one read it.

A presigned URL is another text every time it is renewed, and its query is a secret. What a run compares, keeps and
prints of a URL is its path. Where the path names no file of data (`/get?file=train-0.tar`) a hash of the query,
without what is known to be a credential, stands in the name.
"""

from __future__ import annotations

import hashlib
import os
import re
from urllib.parse import SplitResult, urlencode, urlsplit

from megatron_sr1.config.credentials import telling
from megatron_sr1.config.data_suffixes import DATA_SUFFIXES

_IN_COMMAND = re.compile(r"\w+://[^\s'\"]+")  # of a `pipe:` to a command


def is_url(pattern: str) -> bool:
    """Whether a shard is read through an opener, not as a local file."""
    return "://" in pattern


def protocol_of(url: str) -> str:
    """`https://host/t.tar` -> "https"; of a command, "pipe"."""
    return url.partition(":")[0].lower()


def expand_url(pattern: str) -> list[str]:
    """`https://host/train-{00000..00007}.tar` -> eight URLs; others stay as they are."""
    from braceexpand import braceexpand

    return list(braceexpand(pattern))


def beside(url: str, suffix: str) -> str:
    """The URL of the file whose name is longer by `suffix`: of the path, not of the query."""
    path, mark, query = url.partition("?")
    return path + suffix + mark + query


def shown(shard: str) -> str:
    """A path as it is; of a URL what messages and files may say: no user, no password, no query."""
    if not is_url(shard):
        return shard
    parts = _split(shard)
    folder = os.path.dirname(parts.path).rstrip("/")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{folder}/{shard_name(shard)}"


def same_file(url: str) -> str:
    """A text that is equal for URLs of the same file: what only lets one read it is left out."""
    parts = _split(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}?{urlencode(telling(parts.query))}"


def shard_name(shard: str) -> str:
    """The name of a shard without its folder, in fingerprints, indices and messages; no secret is in it."""
    if not is_url(shard):
        return os.path.basename(shard)
    parts = _split(shard)
    name, kept = os.path.basename(parts.path), telling(parts.query)
    if name.endswith(DATA_SUFFIXES) or not kept:
        return name
    return f"{name}-{hashlib.sha256(urlencode(kept).encode()).hexdigest()[:8]}"


def _split(url: str) -> SplitResult:
    command = _IN_COMMAND.search(url) if url.startswith("pipe:") else None
    return urlsplit(url if command is None else command.group())
