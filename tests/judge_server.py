"""An OpenAI-like endpoint on loopback that does, for each question, what its script says."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Script = Callable[[str, int], str]  # (question, number of earlier attempts) -> one of the steps below, or an answer


class JudgeServer(ThreadingHTTPServer):
    """Steps: "429 SECONDS" and "503 DATE" (a status with Retry-After), "500" or another status, "307 URL", "hang",
    "drip" (a byte at a time, for ever), "flood" (more than is taken), "packed" (gzip), "reset", "JSON ..." (that body
    with status 200), "cut" (finish_reason length), "empty"; anything else is the answer."""

    daemon_threads = True

    def __init__(self, script: Script) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = script
        self.requests: list[dict[str, Any]] = []  # bodies, with the headers as "headers"
        self.attempts: Counter[str] = Counter()
        self.running = self.most_running = 0
        self.lock = threading.Lock()
        self.stopped = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        question = body["messages"][-1]["content"]
        with self.server.lock:
            step = self.server.script(question, self.server.attempts[question])
            self.server.attempts[question] += 1
            self.server.requests.append(
                {**body, "path": self.path, "headers": {name.lower(): value for name, value in self.headers.items()}}
            )
            self.server.running += 1
            self.server.most_running = max(self.server.most_running, self.server.running)
        try:
            self._do(step)
        finally:
            with self.server.lock:
                self.server.running -= 1

    def _do(self, step: str) -> None:
        word, _, rest = step.partition(" ")
        if word.isdecimal():
            self._send(int(word), json.dumps({"error": {"message": "sk-secret is busy"}}), rest)
        elif word == "hang":
            self.server.stopped.wait(10)
            self.close_connection = True
        elif word in ("drip", "flood"):
            self._send(200, "", length=1 << 30)
            with suppress(ConnectionError):
                while not self.server.stopped.wait(0.02 if word == "drip" else 0):
                    self.wfile.write(b" " * (1 if word == "drip" else 1 << 20))
            self.close_connection = True
        elif word == "packed":
            self._send(200, "{}", encoding="gzip")
        elif word == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif word == "JSON":
            self._send(200, rest)
        else:
            text, reason = {"cut": ("<think> so", "length"), "empty": ("", "stop")}.get(step, (step, "stop"))
            choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}}
            self._send(200, json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}))

    def _send(self, status: int, body: str, rest: str = "", length: int = 0, encoding: str = "") -> None:
        data = body.encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(length or len(data)))
        if rest:
            self.send_header("location" if status == 307 else "retry-after", rest)
        if encoding:
            self.send_header("content-encoding", encoding)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def serve(script: Script) -> Iterator[JudgeServer]:
    with JudgeServer(script) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.stopped.set()
        server.shutdown()
        thread.join()
