"""transformer_engine/common/recipe/__init__.py: number formats, and recipes that only remember their arguments."""

from enum import Enum
from typing import Any


class Format(Enum):
    E4M3 = "e4m3"
    HYBRID = "hybrid"


class Recipe:
    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments


class DelayedScaling(Recipe):
    pass


class Float8CurrentScaling(Recipe):
    pass


class Float8BlockScaling(Recipe):
    pass


class MXFP8BlockScaling(Recipe):
    pass
