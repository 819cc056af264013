"""What went wrong with a URL: whether it may pass, and how it is told without a credential."""

from __future__ import annotations

import importlib
import importlib.util
import re
from dataclasses import dataclass
from operator import attrgetter
from urllib.parse import unquote, urlsplit

from megatron_sr1.config.credentials import telling, without_queries
from megatron_sr1.data.urls import protocol_of, shown

_PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses of a server that is busy or restarts
_SIGNED_OUT = (401, 403)
_MAX_SAID = 200  # characters


class RemoteError(OSError):
    """A URL cannot be read. The message has no credential."""

    def __init__(self, message: str, *, refused: bool) -> None:
        """`refused`: the next try would end the same way."""
        super().__init__(message)
        self.refused = refused


@dataclass(frozen=True)
class _Foreign:
    """A class of errors of a package that reads URLs."""

    module: str
    name: str
    status: str = ""  # the attribute that has the HTTP status
    refused: bool = False  # where there is no status
    optional: bool = False  # some releases of the package that reads do without the module

    def load(self) -> tuple[type[Exception], ...]:
        """The class; nothing where an optional module is not installed, which then raised nothing."""
        if self.optional and importlib.util.find_spec(self.module) is None:
            return ()
        return (attrgetter(self.name)(importlib.import_module(self.module)),)


_HTTP = (
    _Foreign("aiohttp", "ClientResponseError", "status"),
    _Foreign("aiohttp", "InvalidURL", refused=True),
    _Foreign("aiohttp", "NonHttpUrlClientError", refused=True),  # a redirection leads elsewhere
    _Foreign("aiohttp", "ClientConnectorCertificateError", refused=True),
    _Foreign("aiohttp", "ClientError"),
)
_HUB = (
    _Foreign("huggingface_hub.errors", "OfflineModeIsEnabled", refused=True),
    _Foreign("huggingface_hub.errors", "HfHubHTTPError", "response.status_code"),
    _Foreign("httpx2", "HTTPError", optional=True),  # what it asks with, since its release 2
    _Foreign("httpx", "HTTPError", optional=True),
)
_AMAZON = (
    _Foreign("botocore.exceptions", "NoCredentialsError", refused=True),
    _Foreign("botocore.exceptions", "BotoCoreError"),
)
_GOOGLE = (
    _Foreign("gcsfs.retry", "HttpError", "code"),
    _Foreign("google.auth.exceptions", "DefaultCredentialsError", refused=True),
    _Foreign("google.auth.exceptions", "GoogleAuthError"),
    *_HTTP,
)
_OF_PROTOCOL = {"http": _HTTP, "https": _HTTP, "hf": _HUB, "s3": _AMAZON, "s3a": _AMAZON, "gs": _GOOGLE, "gcs": _GOOGLE}


def foreign_errors(protocol: str) -> tuple[type[Exception], ...]:
    """The classes of errors of the packages that read such URLs, beside OSError; the packages are installed."""
    return tuple(error for kind in _OF_PROTOCOL.get(protocol, ()) for error in kind.load())


def remote_error(error: Exception, url: str) -> RemoteError:
    """The error to raise, of one that fsspec or a package below it raised."""
    if isinstance(error, RemoteError):
        return error
    cause = error.__cause__  # fsspec says of every failure to ask over HTTP that the file is not there
    if isinstance(error, FileNotFoundError) and isinstance(cause, foreign_errors(protocol_of(url))):
        error = cause
    status, refused = _judged(error, protocol_of(url))
    if status is not None:
        renew = ": renew its signature, or its token" if status in _SIGNED_OUT else ""
        return RemoteError(f"HTTP {status} for {shown(url)}{renew}", refused=status not in _PASSING)
    return RemoteError(f"{shown(url)}: {_said(error, url)}", refused=refused)


def _judged(error: Exception, protocol: str) -> tuple[int | None, bool]:
    """The HTTP status, where there is one, and else whether the next try would end the same way."""
    for kind in _OF_PROTOCOL.get(protocol, ()):
        if isinstance(error, kind.load()):
            return (attrgetter(kind.status)(error), False) if kind.status else (None, kind.refused)
    if isinstance(error, FileNotFoundError) and protocol in ("http", "https"):
        return 404, True
    return None, isinstance(error, FileNotFoundError | PermissionError)


def _said(error: Exception, url: str) -> str:
    """The error's own words, or its name where it has none, without what signs the URL."""
    if isinstance(error, FileNotFoundError):
        return "nothing is there"
    text = without_queries(" ".join(str(error).replace(url, shown(url)).split()))
    parts = urlsplit(url)
    kept = {value for _, value in telling(parts.query)}
    written = {part.partition("=")[2] for part in parts.query.split("&")}
    secrets = (written | {unquote(value) for value in written}) - kept
    secrets |= set(re.split("[:@]", parts.netloc.rpartition("@")[0]))
    for secret in sorted(secrets - {""}, key=len, reverse=True):
        text = text.replace(secret, "...")
    return f"{type(error).__name__}: {text[:_MAX_SAID]}" if text else type(error).__name__
