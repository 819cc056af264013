r"""Equality of expressions by math-verify, in a child process, so that it can be stopped.

math-verify limits its time with SIGALRM, which works only in the main thread and cannot interrupt a big-integer
power. A child that is killed works from any thread and stops anything. It is started by the first answer that needs
it and answers one question at a time; most answers never come here.

`is_tame` first refuses what no final answer needs and sympy may not survive (towers of powers, huge exponents,
integrals), so that the time limit, the one thing here that depends on the machine, is a last resort.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import selectors
import subprocess
import sys
import threading
from pathlib import Path

logger = logging.getLogger(__name__)

START_SECONDS = 120.0  # importing sympy on a busy machine
ANSWER_SECONDS = 10.0
MAX_CHARACTERS = 200
MAX_DEPTH = 12  # nested brackets

_WILD = re.compile(
    r"\^\s?\{[^{}]*\^|\^\s?\w\s?\^"  # a power in an exponent
    r"|\^\s?\{?\s?[+-]?\s?\d{4}"
    r"|[)}\]]\s?\^\s?\{?\s?[+-]?\s?\d{2}"  # (x + y + z)^{99} expands
    r"|\d{4,}\s?!|!\s?!"
    r"|\\(?:int|oint|iint|sum|prod|lim|binom|gamma|Gamma|zeta)(?![A-Za-z])"
)
_LONG_NUMBER = re.compile(r"\d{40}")


def is_tame(text: str) -> bool:
    """Whether sympy may be asked about this text."""
    depth = deepest = 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        deepest = max(deepest, depth)
    return (
        len(text) <= MAX_CHARACTERS
        and deepest <= MAX_DEPTH
        and _WILD.search(text) is None
        and _LONG_NUMBER.search(text) is None
    )


@functools.lru_cache(maxsize=1 << 16)
def same_expression(answer: str, gold: str) -> bool:
    """Whether two cleaned LaTeX texts are the same mathematics. Not symmetric: math-verify reads gold as the form
    wanted. False where the child needs more than ANSWER_SECONDS or dies of the input.

    Raises:
        RuntimeError: the child does not start (math-verify missing or broken).
    """
    return is_tame(answer) and is_tame(gold) and _WORKER.ask(answer, gold)


class _Worker:
    """One child, shared by all threads of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # process id: after a fork the parent's child must not be used

    def ask(self, answer: str, gold: str) -> bool:
        with self._lock:
            process = self._running()
            self._process = None  # an interrupt below must not leave a late verdict for the next question
            assert process.stdin is not None
            process.stdin.write(json.dumps([answer, gold]).encode() + b"\n")
            process.stdin.flush()
            line = _read_line(process, ANSWER_SECONDS)
            if line is None:
                logger.warning("no verdict on answer %r against %r: graded as different", answer, gold)
                _stop(process)
                return False
            self._process = process
            return json.loads(line) is True

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        script = Path(__file__).with_name("symbolic_worker.py")
        # -P: the folder of the script stays off the import path
        process = subprocess.Popen([sys.executable, "-P", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if _read_line(process, START_SECONDS) != b'"ready"\n':
            _stop(process)
            raise RuntimeError(
                f"The answer checker {script.name} did not start. Its own error is above; "
                "check that math-verify and its LaTeX parser are installed."
            )
        self._owner = os.getpid()
        return process


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def _read_line(process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """One line of the child's output; None where it takes too long or the child is gone."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(seconds):
            return None
    return process.stdout.readline() or None


_WORKER = _Worker()
