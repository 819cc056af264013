"""Checkpoints of a run: saved every n steps, complete or absent, loadable in any layout."""

from megatron_sr1.checkpoint.checkpointer import Checkpointer, Progress

__all__ = ["Checkpointer", "Progress"]
