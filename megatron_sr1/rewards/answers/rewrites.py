"""Replacements that are made one after the other."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

Replacement = str | Callable[[re.Match[str]], str]


@dataclass(frozen=True)
class Rewrites:
    """Patterns, each with what takes its place, in the order in which they are applied."""

    rules: tuple[tuple[re.Pattern[str], Replacement], ...]

    @classmethod
    def of(cls, *rules: tuple[str, Replacement], flags: re.RegexFlag = re.NOFLAG) -> Rewrites:
        """`flags`: of every pattern."""
        return cls(tuple((re.compile(pattern, flags), replacement) for pattern, replacement in rules))

    def apply(self, text: str) -> str:
        """The text after all of them."""
        for pattern, replacement in self.rules:
            text = pattern.sub(replacement, text)
        return text
