"""Files behind URLs, read by fsspec: http(s), s3, gs, hf, and whatever else it knows.

A failure that may pass (no connection, a cut answer, a server that is busy) is tried again, `RETRY_SECONDS` apart; one
that will not (404, 403, no credentials) is told at once. Credentials are those that each package finds for itself: of
the environment, of its own files, or in the URL. No message repeats them.
"""

from __future__ import annotations

import errno
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_sr1.data.remote_errors import RemoteError, foreign_errors, remote_error
from megatron_sr1.data.urls import protocol_of, shown

RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # between tries
_CONNECT_SECONDS, _SILENT_SECONDS = 30, 60  # until a server answers, and between two pieces of its answer
_HTTP = ("http", "https")
_PACKAGES = {
    **dict.fromkeys(_HTTP, "aiohttp"),
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    "hf": "huggingface_hub",
}
# what stores call the version of a file: a checksum, a generation or a time
_VERSION_FIELDS = ("ETag", "etag", "sha256", "blob_id", "generation", "md5Hash", "content_md5", "Content-MD5", "Digest")
_TIME_FIELDS = ("LastModified", "Last-Modified", "last_modified", "updated", "mtime", "modified", "created")
# of the disk that a download is written to, not of whoever is asked
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
_T = TypeVar("_T")


@dataclass(frozen=True)
class RemoteFile:
    """What is known of a file without reading it."""

    size: int | None  # bytes
    version: str  # another one where the file was changed; "": the server tells none


def check_openable(url: str) -> None:
    """Asks nobody. Raises ValueError where no package that is installed opens such a URL, or it cannot name a file."""
    import fsspec  # here and below: local shards need neither it nor what it imports

    protocol = protocol_of(url)
    if protocol == "pipe":
        return
    if protocol in ("file", "local") and ("#" in url or "?" in url):
        raise ValueError(f"{url}: in a URL # and ? end the name of the file. Give its path, without {protocol}://.")
    if protocol == "hf" and len(url.partition("://")[2].rstrip("/").split("/")) < (4 if "://datasets/" in url else 3):
        raise ValueError(
            f"{shown(url)} is no file. Name the files of the data set ({shown(url)}/train.parquet), or download it and "
            "give the folder."
        )
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        needs = f"it needs the package {package}: pip install 'megatron_sr1[remote]'" if package else str(error)
        raise ValueError(f"{shown(url)}: {protocol}:// cannot be read here: {needs}.") from None
    except ValueError:
        known = "https://, s3://, gs:// or hf://"
        raise ValueError(f"{shown(url)}: nothing here opens such a URL. Give {known}.") from None


def file_of(url: str) -> RemoteFile:
    """Raises RemoteError where it is not there, or cannot be asked for."""
    info = _tried(url, lambda files: dict(files.info(url)))
    if info.get("type") == "directory":
        raise RemoteError(f"{shown(url)}: it is a folder, not a file", refused=True)
    names = (*_VERSION_FIELDS, *_TIME_FIELDS)
    found = next((f"{name} {info[name]}" for name in names if info.get(name)), "")
    return RemoteFile(info.get("size"), found)


def read_all(url: str) -> bytes:
    """The bytes of a small file. Raises RemoteError."""
    return _tried(url, lambda files: files.cat_file(url))


def read_beginning(url: str, count: int) -> bytes:
    """The first `count` bytes, fewer where the file ends. Raises RemoteError."""

    def read(files: Any) -> bytes:
        if protocol_of(url) in _HTTP:  # not a range, which some servers answer with the whole file
            with files.open(url, "rb", block_size=0, size=count) as stream:
                return stream.read(count)
        size = files.info(url)["size"]
        return files.cat_file(url, start=0, end=min(count, size)) if size else b""

    return _tried(url, read)


def download(url: str, path: Path) -> None:
    """Writes the file to `path`, which is whole only where nothing is raised.

    Raises:
        RemoteError: it cannot be read, or not to its end.
        OSError: `path` cannot be written to.
    """

    def get(files: Any) -> None:
        size = None if protocol_of(url) in _HTTP else files.info(url)["size"]  # HTTP itself tells a cut answer
        files.get_file(url, str(path))
        found = path.stat().st_size
        if size is not None and found != size:
            raise ConnectionError(f"{found} bytes came, of {size}")

    _tried(url, get)


def _tried(url: str, read: Callable[[Any], _T]) -> _T:
    """What `read` makes of the file system; tried again after a failure that may pass."""
    check_openable(url)
    foreign = foreign_errors(protocol_of(url))
    for seconds in (*RETRY_SECONDS, None):
        try:
            return read(_file_system(protocol_of(url), "%" in url))
        except (OSError, *foreign) as error:
            if isinstance(error, OSError) and error.errno in _LOCAL:
                raise
            failure = remote_error(error, url)
        if failure.refused or seconds is None:
            raise failure
        warnings.warn(f"{failure}; trying again in {seconds:g} s", stacklevel=2)
        time.sleep(seconds)
    raise AssertionError("the last try returns or raises")


def _file_system(protocol: str, encoded: bool) -> Any:
    """fsspec's, of a protocol: one for each thread, which fsspec keeps.

    Args:
        encoded: the URL has % already; it is asked for as it is written, which is what a signature is of.
    """
    import fsspec

    if protocol not in _HTTP:
        return fsspec.filesystem(protocol)
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENT_SECONDS)
    client = {"timeout": timeout, "trust_env": True}  # proxies are those of the environment
    return fsspec.filesystem(protocol, encoded=encoded, client_kwargs=client, headers={"Accept-Encoding": "identity"})
