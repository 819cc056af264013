"""Serves a written report on this machine alone, for browsers that do not load a folder beside a page of file://."""

from __future__ import annotations

import ipaddress
import mimetypes
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOOPBACK = "127.0.0.1"
_KINDS = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8"}


def report_server(page: Path, host: str = LOOPBACK, port: int = 0) -> ThreadingHTTPServer:
    """A server of the page, at /, and of the folder beside it; of nothing else.

    Raises:
        ValueError: see `check_address`; the port cannot be had.
    """
    check_address(host, port)

    class Handler(_Handler):
        root, names = page.resolve(), (host, "localhost")

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise ValueError(f"{host}:{port} cannot be had ({error.strerror or error}). Choose another --port.") from error


def check_address(host: str, port: int) -> None:
    """
    Args:
        port: 0: a free one.

    Raises:
        ValueError: the host is not this machine's own, or there is no such port.
    """
    if not _is_loopback(host):
        raise ValueError(
            f"--host {host} is not allowed: a report holds data and what a model wrote, so it is served on this "
            "machine alone. Use 127.0.0.1, and an SSH tunnel from elsewhere."
        )
    if not 0 <= port < 2**16:
        raise ValueError(f"--port {port} is not allowed: it must be 0 ... 65535, 0 for a free one.")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback and ":" not in host
    except ValueError:
        return False


class _Handler(BaseHTTPRequestHandler):
    root: Path  # the page
    names: tuple[str, ...]  # that the server is called by, without its port

    def do_GET(self) -> None:
        """Sends a file of the report."""
        self._send(body=True)

    def do_HEAD(self) -> None:
        """The same without the file."""
        self._send(body=False)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

    def _send(self, *, body: bool) -> None:
        # another site whose name was made to lead here would read the report as its own
        if self.headers.get("Host", "").partition(":")[0] not in self.names:
            self.send_error(HTTPStatus.FORBIDDEN, "another host is asked for")
            return
        file = self._file()
        if file is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        data = file.read_bytes()
        kind = _KINDS.get(file.suffix) or mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Cache-Control", "no-cache")
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _file(self) -> Path | None:
        """None: it is none of the report's, whatever the path spells."""
        name = unquote(urlsplit(self.path).path).removeprefix("/")
        if name in ("", self.root.name):
            return self.root
        if "\0" in name:
            return None
        folder = self.root.with_name(f"{self.root.stem}_files")
        file = (self.root.parent / name).resolve()
        inside = file.is_relative_to(folder.resolve()) and file.suffix in (".js", ".png", ".webp", ".jpg", ".jpeg")
        return file if inside and file.is_file() else None
