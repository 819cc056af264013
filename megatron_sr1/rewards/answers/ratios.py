"""Ratios and ranges: `6:4` is `3:2` and `3 to 2`; `1-10` is `1 to 10`."""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_sr1.rewards.answers.expression import parse_expression
from megatron_sr1.rewards.answers.numeric import value_of
from megatron_sr1.rewards.answers.tree import Node

_RANGE = re.compile(r"(\d+(?:\.\d+)?)\s?(?:-|~|\bto\b|到|至)\s?(\d+(?:\.\d+)?)")


def same_ratio(answer: str, gold: str) -> bool | None:
    """Whether two ratios are equal, a fraction counting as one of two terms; None where neither is a ratio."""
    first, second = _terms(answer), _terms(gold)
    if first is None and second is None:
        return None
    first, second = first or _fraction(answer, gold), second or _fraction(gold, answer)
    if first is None or second is None or len(first) != len(second):
        return None
    return all(one * second[0] == other * first[0] for one, other in zip(first, second, strict=True))


def same_range(answer: str, gold: str) -> bool | None:
    """Whether two ranges have the same ends; None where a side is none."""
    first, second = _RANGE.fullmatch(answer), _RANGE.fullmatch(gold)
    if first is None or second is None:
        return None
    ends = [tuple(map(Fraction, match.groups())) for match in (first, second)]
    return ends[0] == ends[1] if ends[0][0] < ends[0][1] else None


def _terms(text: str) -> tuple[Fraction, ...] | None:
    parts = re.split(r"\s?:\s?|\sto\s", text)
    values = [None if node is None else value_of(node) for node in map(_number, parts)]
    if len(values) < 2 or None in values or not any(values):
        return None
    return tuple(value for value in values if value is not None)


def _fraction(text: str, ratio: str) -> tuple[Fraction, ...] | None:
    """3/2 as 3:2, but 1/2 not as the clock time 15:30."""
    node = parse_expression(text)
    is_fraction = re.search(r"/|\\frac", text) and not re.fullmatch(r"\d\d?:\d\d", ratio)
    value = None if node is None or not is_fraction else value_of(node)
    return None if value is None else (Fraction(value.numerator), Fraction(value.denominator))


def _number(text: str) -> Node | None:
    return parse_expression(text)
