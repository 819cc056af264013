"""The same bits from the same input, where libraries would rather be fast."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.utils.deterministic as allocations

# Transformer Engine looks at the first when it chooses an attention kernel, and Megatron-Core asks for it; cuBLAS sums
# in a fixed order only with a workspace of a fixed size
_VARIABLES = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def make_deterministic() -> None:
    """Asks every library of this process for it. Call it before any of them is used.

    torch warns of an operation that it has no such form of, by name; NCCL's reductions keep their order as long as
    ranks, nodes and message sizes do.

    Raises:
        ValueError: the environment asks for the contrary.
    """
    for name, value in _VARIABLES.items():
        if os.environ.setdefault(name, value) != value:
            raise ValueError(
                f"precision.deterministic=true and {name}={os.environ[name]} contradict each other: it must be "
                f"{value!r}. Unset the variable, or set precision.deterministic to false."
            )
    torch.use_deterministic_algorithms(True, warn_only=True)
    filling: Any = allocations
    filling.fill_uninitialized_memory = False  # engines read caches of which they use a part
