"""The command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point, see `command.main`. What it imports takes a moment, in which Ctrl-C is answered, too."""
    try:
        from megatron_sr1.cli.command import main as run
    except KeyboardInterrupt:
        print("megatron-sr1: interrupted before anything began", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)
    run(arguments)
