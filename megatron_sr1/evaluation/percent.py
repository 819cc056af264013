"""Shares as the tables show them."""

from __future__ import annotations

from collections.abc import Mapping


def percent(value: float | None) -> str:
    """With one decimal; a dash where it was not measured."""
    return "–" if value is None else f"{100 * value:.1f}"


def with_interval(numbers: Mapping[str, float | None], name: str) -> str:
    """With the bounds of its interval; a dash where it was not measured."""
    if numbers.get(name) is None:
        return "–"
    return f"{percent(numbers[name])} [{percent(numbers[f'{name}_low'])}, {percent(numbers[f'{name}_high'])}]"
