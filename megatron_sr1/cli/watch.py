"""A run seen from another shell."""

from __future__ import annotations

from pathlib import Path


def run_watch(run: Path, *, once: bool) -> None:
    """Shows it until it has finished, or Ctrl-C, which is no error here: nothing of the run hangs on it.

    Raises:
        ValueError: the path is a file.
    """
    from rich.console import Console

    from megatron_sr1.metrics.watching import watch

    try:
        watch(run, Console(), once=once)
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:  # `watch RUN | head`
        import os
        import sys

        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the end of Python would say so
