"""Stands in for Transformer Engine where it cannot run: its modules with the same parameters, names and shapes, its
recipes with the same arguments, and no arithmetic. Megatron-Core's own wrappers around it are the real ones.

It holds what Megatron-Core 0.16 imports without a guard. Put the folder above this one on sys.path before Megatron-Core
is imported.
"""

__version__ = "2.3.0"

from transformer_engine import common, pytorch  # noqa: F401
