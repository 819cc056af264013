"""Commands of the project in processes that have imported what they need: forked, as ranks.py does it.

A command that is started for itself spends five seconds of CPU time on imports. The tests that ask how a command
starts, hears a signal or ends with its parent start it so; for what it computes this does.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from tests.ranks import run_ranks

REPOSITORY = Path(__file__).parent.parent
MODULE = ["-m", "megatron_sr1.cli"]


class ForkedError(AssertionError):
    """A forked command failed; its message ends with what it had printed."""

    def __init__(self, printed: str, reason: object) -> None:
        super().__init__(f"{reason}\n{printed[-8000:]}")
        self.printed = printed


def run_forked(command: Sequence[str], num_ranks: int = 1) -> str:
    """Runs `python -m megatron_sr1.cli ...` on so many ranks and returns what they printed on stdout and stderr.

    Several ranks find their numbers in the environment, and the group made, as under torchrun.

    Raises:
        ForkedError: it failed.
    """
    assert list(command[1:3]) == MODULE, command
    return call_forked(_main, list(command[3:]), num_ranks=num_ranks)


def call_forked(function: Callable[..., None], *arguments: Any, num_ranks: int = 1) -> str:
    """Calls `function(*arguments)`, which is importable, on so many ranks at the repository's root, and returns what
    they printed.

    Raises:
        ForkedError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        try:
            run_ranks(num_ranks, _printing_to, str(log), function, *arguments)
        except (ProcessExitedException, ProcessRaisedException) as error:
            raise ForkedError(log.read_text(), error) from error
        return log.read_text()


def _printing_to(rank: int, num_ranks: int, log: str, function: Callable[..., None], *arguments: Any) -> None:
    with open(log, "a") as file:  # all ranks append
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.chdir(REPOSITORY)
    if num_ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")  # all five or none; nobody looks there
    try:
        function(*arguments)
    finally:
        sys.stdout.flush()


def _main(words: list[str]) -> None:
    from megatron_sr1.cli import main

    main(words)
