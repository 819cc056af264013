"""Stopping on request: a cluster takes the machine back, or the time limit is near.

SIGTERM (Slurm's preemption, `docker stop`), SIGUSR1 (Slurm's `--signal` before the time limit) or SIGINT (Ctrl-C) to
any rank asks the run to stop. Nothing happens at once: the ranks agree at the end of the step, save, and leave with
STOPPED_STATUS; the same command goes on from there to the same bits. A second SIGTERM or SIGINT to a rank ends it where
it stands.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from megatron_sr1.platform import STOP_SIGNALS, STOPPED_STATUS, Platform
from megatron_sr1.signals import handled


class StopRequest:
    """Whether this run is asked to stop."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._received: set[int] = set()

    def agreed(self) -> bool:
        """Whether any rank was asked. Collective: one number per step, so that all ranks leave after the same one."""
        return self._platform.ranks.any(bool(self._received))

    def leave(self, step: int) -> NoReturn:
        """Ends this rank, when all have come here. What is due must be written before. Collective.

        Raises:
            SystemExit: always, with STOPPED_STATUS.
        """
        if self._platform.is_main:
            print(f"asked to stop: saved after step {step}; the same command continues from here", flush=True)
        self._platform.ranks.meet()
        raise SystemExit(STOPPED_STATUS)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. Slurm signals every process of a step and a launcher forwards SIGUSR1, so that alone does
        not count twice."""
        if number != signal.SIGUSR1 and number in self._received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._received.add(number)


@contextmanager
def watch_for_stop(platform: Platform) -> Iterator[StopRequest]:
    """Takes the stop signals of this process while it lasts. Before and after it they end the process: there is nothing
    to save. Call it in the main thread."""
    request = StopRequest(platform)
    with handled(STOP_SIGNALS, request.receive):
        yield request
