"""The command line."""

from megatron_sr1.cli.command import main

__all__ = ["main"]
