"""A client for HTTP whose answers end: in time, in size, and at the host that was asked."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

MAX_BYTES = 1 << 24  # of an answer: a hundred times what a model writes
_DEADLINE = "megatron_sr1_deadline"


def bounded_client(seconds: float) -> Any:
    """openai's client for `seconds` from the question to the last byte of the answer, where it would count those
    between two bytes alone; it follows no redirection."""
    from openai import DefaultHttpxClient

    library = _library(DefaultHttpxClient)
    bounded = type("Bounded", (_Bounded, library.SyncByteStream), {})

    def begin(request: Any) -> None:
        request.headers["accept-encoding"] = "identity"  # a few bytes could be gigabytes
        request.extensions[_DEADLINE] = time.monotonic() + seconds

    def bound(response: Any) -> None:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise library.ReadError("the answer is compressed, which was not asked for")
        deadline = response.request.extensions[_DEADLINE]
        response.stream = bounded(library, response.stream, deadline, seconds)

    hooks: dict[str, Any] = {"request": [begin], "response": [bound]}
    return DefaultHttpxClient(timeout=seconds, follow_redirects=False, event_hooks=hooks)


def _library(client: type) -> ModuleType:
    """httpx, or httpx2 since openai's release 3."""
    base = next(kind for kind in client.__mro__ if kind.__name__ == "Client")
    return sys.modules[base.__module__.partition(".")[0]]


class _Bounded:
    """A body, up to its bounds."""

    def __init__(self, library: ModuleType, stream: Any, deadline: float, seconds: float) -> None:
        """`deadline`: of the monotonic clock."""
        self._library, self._stream, self._deadline, self._seconds = library, stream, deadline, seconds

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for piece in self._stream:
            size += len(piece)
            if size > MAX_BYTES:
                raise self._library.ReadError(f"the answer has more than {MAX_BYTES >> 20} MiB")
            if time.monotonic() > self._deadline:
                raise self._library.ReadTimeout(f"the answer was not whole after {self._seconds:g} s")
            yield piece

    def close(self) -> None:
        self._stream.close()
