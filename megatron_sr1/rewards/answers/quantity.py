r"""Numbers and expressions with a unit, a currency or a percent sign, and when two of them are the same.

A bare number equals one with any unit: data sets leave the unit out on either side. With units on both sides they are
converted within a dimension. `50%` equals `0.5`, `1/2` and `50`. A unit of one letter needs its space to stand beside a
bare number: `5m` may be algebra.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from operator import gt

from megatron_sr1.rewards.answers import numeric
from megatron_sr1.rewards.answers.expression import parse_expression
from megatron_sr1.rewards.answers.number_words import SCALES
from megatron_sr1.rewards.answers.tree import Apply, Node, Number, Symbol, is_unfinished, symbols
from megatron_sr1.rewards.answers.units import Unit, product, read_noun, read_unit
from megatron_sr1.rewards.answers.words import same_word

_CURRENCY = re.compile(r"([+-]?)\s?(US\$|[AC]\$|[$€£¥₹₩]|USD|EUR|GBP|CNY|RMB|JPY|INR|Rs\.?)\s?(?=[\d.+-])")
_NUMBER = r"[+-]?\s?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))"
_POWER_OF_TEN = r"\s?[×·*]\s?10\s?\^\s?(?:\{\s?[+-]?\d+\s?\}|[+-]?\d+)"
_PLAIN = re.compile(
    rf"(?P<number>{_NUMBER}(?:\s\d+\s?/\s?\d+|\s?/\s?\d+|[eE][+-]?\d+(?![\dA-Za-z])|{_POWER_OF_TEN})?)"
    r"(?P<space>\s?)(?P<rest>[^\d\s].*)"
)
_PERCENT = re.compile(r"(.*?)\s?(?:%|\bper\s?cent\b|\bpercentage points?\b)", re.IGNORECASE)
_SCALED = re.compile(rf"(.*\d)\s?({'|'.join(SCALES)})\b\s?(.*)", re.IGNORECASE)
_PART = re.compile(r"(\d+(?:\.\d+)?)\s?([A-Za-z一-鿿]+|['\"])\s?(?:,|and\s)?\s?")
_ANGULAR = re.compile(r"(?:sin|cos|tan|cot|sec|csc)(?![a-z])")  # the angle is theirs
_THOUSANDS = re.compile(r"^(\d+(?:\.\d+)?)[kK]$")
_OF_TIME, _MINUTES = frozenset(("h", "hr", "hrs", "s", "sec", "secs")), {"m": "min"}  # 1h30m
_ZERO = frozenset(("none", "无", "没有"))


@dataclass(frozen=True)
class Quantity:
    """`value` is what is written: 50 for `50%`. `units` are the readings of its unit, () where it has none."""

    value: Node
    units: tuple[Unit, ...] = ()
    percent: bool = False
    needs_space: bool = False  # `5m`: a unit, or a variable


def read_quantity(text: str) -> Quantity | None:
    """The quantity that is the whole of a cleaned text; None where there is none."""
    if text.lower() in _ZERO:
        return Quantity(Number(Fraction(0)))
    money: tuple[Unit, ...] = ()
    if match := _CURRENCY.match(text):
        money, text = read_unit(match[2]), match[1] + _THOUSANDS.sub(r"\1 thousand", text[match.end() :])
    quantity = next(_readings(text), None)
    if quantity is None or not money:
        return quantity
    if quantity.percent or any(unit.noun for unit in quantity.units):
        return None
    return Quantity(
        quantity.value, tuple(product(one, other) for one in money for other in quantity.units or (Unit(()),))
    )


def _readings(text: str) -> Iterator[Quantity]:
    if match := _PERCENT.fullmatch(text):
        value = parse_expression(match[1])
        if value is not None:
            yield Quantity(value, percent=True)
        return
    if match := _SCALED.fullmatch(text):
        for inner in _readings(f"{match[1]} {match[3]}".strip()):
            scale = Number(Fraction(SCALES[match[2].lower()]))
            yield Quantity(_times(inner.value, scale), inner.units, needs_space=inner.needs_space)
        return
    if (value := _compound(text)) is not None:
        yield value
    yield from _with_unit(text)
    if (node := parse_expression(text)) is not None:
        yield Quantity(node)
    yield from _counted(text)


def _with_unit(text: str) -> Iterator[Quantity]:
    if match := _PLAIN.fullmatch(text):
        value, units = parse_expression(match["number"]), read_unit(match["rest"])
        if value is not None and units:
            one_letter = len(match["rest"]) == 1 and match["rest"].isalpha() and match["rest"].isascii()
            yield Quantity(value, units, needs_space=one_letter and not match["space"])
            return
    if _ANGULAR.search(text):
        return
    for split in _splits(text):
        units = read_unit(text[split:])
        value = parse_expression(text[:split]) if units else None
        if value is not None and symbols(value):
            return  # so has every longer part
        if value is not None:
            yield Quantity(value, units)
            return


def _splits(text: str) -> Iterator[int]:
    r"""Where a unit may begin behind an expression: at spaces, and where `}`, `)` or π ends."""
    for index in range(1, len(text)):
        ends = text[index] == " " or text[index - 1] in "})π°"
        if text[index] == "°" or (ends and any(c.isdigit() or c in "π\\" for c in text[:index])):
            yield index


def _counted(text: str) -> Iterator[Quantity]:
    if match := _PLAIN.fullmatch(text):
        value, noun = parse_expression(match["number"]), read_noun(match["rest"])
        spaced = match["space"] or ord(match["rest"][0]) > 0x2E80
        if value is not None and noun is not None and spaced:
            yield Quantity(value, (noun,))
    elif "\\" in text and (space := text.find("} ")) > 0:
        value, noun = parse_expression(text[: space + 1]), read_noun(text[space + 2 :])
        if value is not None and noun is not None:
            yield Quantity(value, (noun,))


def _compound(text: str) -> Quantity | None:
    """`1 hour 30 minutes`, `5'6"`, `2 kg 500 g`: units of one dimension, each smaller than the one before."""
    parts, position = list[tuple[Fraction, str]](), 0
    while match := _PART.match(text, position):
        parts.append((Fraction(match[1]), match[2]))
        position = match.end()
    if len(parts) == 1 and parts[0][1] == "'" and text[position:].isdecimal():
        parts.append((Fraction(text[position:]), '"'))  # 5'6
        position = len(text)
    if len(parts) < 2 or position != len(text):
        return None
    is_time = not _OF_TIME.isdisjoint(name for _, name in parts)
    for first in read_unit(_MINUTES.get(parts[0][1], parts[0][1]) if is_time else parts[0][1]):
        units = [_of_dimension(_MINUTES.get(name, name) if is_time else name, first) for _, name in parts]
        scales = [unit.scale for unit in units if unit is not None]
        if len(scales) == len(parts) and all(map(gt, scales, scales[1:])):
            total = sum((value * scale for (value, _), scale in zip(parts, scales, strict=True)), Fraction(0))
            return Quantity(Number(total / first.scale), (first,))
    return None


def _of_dimension(name: str, first: Unit) -> Unit | None:
    units = read_unit(name)
    return next(
        (unit for unit in units if (unit.dimensions, unit.pi_power) == (first.dimensions, first.pi_power)), None
    )


def same_quantity(answer: Quantity, gold: Quantity, rounded: bool) -> bool:
    """Equality of value and unit, both ways. `rounded`: a decimal also equals what it is rounded from."""
    if _is_number(gold) and is_unfinished(answer.value):
        return False
    if answer.percent or gold.percent:
        return _same_percent(answer, gold, rounded)
    if not answer.units or not gold.units:
        if answer.needs_space or gold.needs_space:
            return False
        return _same(answer.value, gold.value, rounded) or _same_bare_angle(answer, gold, rounded)
    return any(
        _same_with_units((answer.value, first), (gold.value, second), rounded)
        for first in answer.units
        for second in gold.units
    )


def _same_with_units(answer: tuple[Node, Unit], gold: tuple[Node, Unit], rounded: bool) -> bool:
    (value, first), (wanted, second) = answer, gold
    if first.noun or second.noun:
        return bool(first.noun and second.noun) and same_noun(first.noun, second.noun) and _same(value, wanted, rounded)
    if first.dimensions != second.dimensions:
        return False
    if first == second:
        return _same(value, wanted, rounded)
    # in units of the other side, so that a decimal there is compared as it is written
    return any(
        _same(_convert(one, there, here), other, rounded)
        for one, there, other, here in ((value, first, wanted, second), (wanted, second, value, first))
    )


def _convert(value: Node, unit: Unit, target: Unit) -> Node:
    """(value * scale + offset - the target's offset) / the target's scale, with the powers of π."""
    factor: Node = Number(unit.scale / target.scale)
    if unit.pi_power != target.pi_power:
        factor = _times(factor, Apply("^", (Symbol("π"), Number(Fraction(unit.pi_power - target.pi_power)))))
    return Apply("+", (_times(value, factor), Number((unit.offset - target.offset) / target.scale)))


def _same_bare_angle(answer: Quantity, gold: Quantity, rounded: bool) -> bool:
    """`π/6` is 30°: a bare multiple of π beside an angle is in radians."""
    with_unit, bare = (answer, gold) if answer.units else (gold, answer)
    angles = [unit for unit in with_unit.units if unit.dimensions == (("angle", 1),)]
    if not angles or not _has_pi(bare.value):
        return False
    return _same(_convert(with_unit.value, angles[0], Unit(angles[0].dimensions)), bare.value, rounded)


def _same_percent(answer: Quantity, gold: Quantity, rounded: bool) -> bool:
    """`50%` is the part 0.5, or 50 where the sign was left out; 1/2 is a part, not the number of `0.50%`."""
    if answer.units or gold.units:
        return False
    if answer.percent and gold.percent:
        return _same(answer.value, gold.value, rounded)
    percent, bare = (answer, gold) if answer.percent else (gold, answer)
    sign_left_out = not _is_fraction(bare.value) or _is_fraction(percent.value)
    return (sign_left_out and _same(percent.value, bare.value, rounded)) or _same(
        percent.value, _times(bare.value, Number(Fraction(100))), rounded
    )


def _is_fraction(node: Node) -> bool:
    """Written as one, `1/2`, not as a decimal."""
    return isinstance(node, Number) and node.decimals is None and node.value.denominator != 1


def _same(first: Node, second: Node, rounded: bool) -> bool:
    if numeric.same_value(first, second):
        return True
    return rounded and (numeric.rounds_to(first, second) or numeric.rounds_to(second, first))


def same_noun(first: str, second: str) -> bool:
    """One phrase holds all words of the other: `red balls` and `balls`."""
    left, right = sorted((first.split(), second.split()), key=len)
    return all(any(same_word(word, other) for other in right) for word in left)


def _is_number(quantity: Quantity) -> bool:
    value = quantity.value
    return isinstance(value, Number) or (
        isinstance(value, Apply) and value.operation == "neg" and isinstance(value.arguments[0], Number)
    )


def _has_pi(node: Node) -> bool:
    return node == Symbol("π") or (isinstance(node, Apply) and any(map(_has_pi, node.arguments)))


def _times(first: Node, second: Node) -> Node:
    if isinstance(first, Number) and isinstance(second, Number):
        return Number(first.value * second.value)
    return Apply("*", (first, second))
