"""What the policy needs to know about a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_sr1.config import HfConfig


@dataclass(frozen=True, kw_only=True)
class Architecture(HfConfig):
    """A model as its config.json describes it. `read_architecture` makes one."""

    hf: Any  # the configuration of transformers, of the family's class
