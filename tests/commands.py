"""Commands of the project in processes that have imported what they need: forked, as ranks.py does it.

A command that is started for itself spends five seconds of CPU time on imports. The tests that ask how a command
starts, hears a signal or ends with its parent start it so; for what it computes this does.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from tests.ranks import run_ranks

REPOSITORY = Path(__file__).parent.parent


class ForkedError(AssertionError):
    """A forked command failed; its message ends with what it had printed."""

    def __init__(self, printed: str, reason: object) -> None:
        super().__init__(f"{reason}\n{printed[-8000:]}")
        self.printed = printed


def run_forked(command: Sequence[str], num_ranks: int = 1, folder: Path = REPOSITORY) -> str:
    """Runs `python -m MODULE ...`, of a module that has a `main`, on so many ranks in a folder and returns what they
    printed on stdout and stderr.

    Several ranks find their numbers in the environment, and the group made, as under torchrun.

    Raises:
        ForkedError: it failed.
    """
    place = command.index("-m")
    return call_forked(_main, command[place + 1], list(command[place + 2 :]), num_ranks=num_ranks, folder=folder)


def call_forked(function: Callable[..., None], *arguments: Any, num_ranks: int = 1, folder: Path = REPOSITORY) -> str:
    """Calls `function(*arguments)`, which is importable, on so many ranks in a folder, and returns what they printed.

    Raises:
        ForkedError: it failed.
    """
    with tempfile.TemporaryDirectory() as logs:
        log = Path(logs) / "log"
        try:
            run_ranks(num_ranks, _printing_to, log, folder, function, *arguments)
        except (ProcessExitedException, ProcessRaisedException) as error:
            raise ForkedError(log.read_text(), error) from error
        return log.read_text()


def _printing_to(
    rank: int, num_ranks: int, log: Path, folder: Path, function: Callable[..., None], *arguments: Any
) -> None:
    with log.open("a") as file:  # all ranks append
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.chdir(folder)
    if num_ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")  # all five or none; nobody looks there
    try:
        function(*arguments)
    finally:
        sys.stdout.flush()


def _main(module: str, words: list[str]) -> None:
    import_module(module).main(words)
