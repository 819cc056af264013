"""Equality of expressions by their values: exact where they are rational, else with 50 and with 150 digits.

Two expressions with variables are equal where they agree at several points. A difference counts as rounding only if it
is tiny beside the values, or shrinks as the digits grow; no absolute tolerance, so 2^-98 is not 2^-99. Everything that
could take long (towers of powers, huge factorials, sines of huge numbers) is refused, so the time is bounded.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from mpmath import mp

from megatron_sr1.rewards.answers.tree import Apply, Node, Number, Symbol, symbols

Value = Any  # Fraction, or mpmath's mpf or mpc, which has no types
_LOCK = threading.Lock()  # mpmath's precision belongs to the process
_DIGITS = (50, 150)
_MAX_BITS = 4096  # of an exact numerator or denominator; beyond, digits
_MAX_EXPONENT = 10**9
_MAX_ANGLE = 10**15  # more needs ever more digits of pi
_MAX_FACTORIAL = 10**5
_NUM_POINTS = 6
_ANGULAR = frozenset(("sin", "cos", "tan", "cot", "sec", "csc"))


_FUNCTIONS = {
    "sin": mp.sin, "cos": mp.cos, "tan": mp.tan, "cot": mp.cot, "sec": mp.sec, "csc": mp.csc, "asin": mp.asin,
    "acos": mp.acos, "atan": mp.atan, "sinh": mp.sinh, "cosh": mp.cosh, "tanh": mp.tanh, "ln": mp.ln, "exp": mp.exp,
}  # fmt: skip


class _Undefined(Exception):
    """No value, or none that is found in bounded time."""


def same_value(first: Node, second: Node) -> bool:
    """Whether two expressions are equal for all values of their variables (to the best of six points)."""
    names = sorted(symbols(first) | symbols(second))
    if not names:
        return _same_at(first, second, {}) is True
    verdicts = [_same_at(first, second, _point(names, number)) for number in range(_NUM_POINTS)]
    return False not in verdicts and verdicts.count(True) >= 2


def ratio_sign(first: Node, second: Node) -> int:
    """1 or -1 where first = c * second with a constant c > 0 or c < 0; 0 otherwise. Tells equal equations apart."""
    product = Apply("/", (first, second))
    names = sorted(symbols(first) | symbols(second))
    with _LOCK, mp.workdps(_DIGITS[0]):
        try:
            here = _evaluate(product, _point(names, 0))
        except (_Undefined, ZeroDivisionError, ValueError, OverflowError):
            return 0
        if not isinstance(here, Fraction):
            return 0 if mp.im(here) else (1 if mp.re(here) > 0 else -1) * _is_constant(product, names, here)
    return (here > 0) - (here < 0) if _is_exactly_constant(product, names, here) else 0


def value_of(node: Node) -> Fraction | None:
    """The value of an expression without variables where it is exact."""
    if symbols(node):
        return None
    with _LOCK, mp.workdps(_DIGITS[0]):
        try:
            value = _evaluate(node, {})
        except (_Undefined, ZeroDivisionError, ValueError, OverflowError):
            return None
    return value if isinstance(value, Fraction) else None


def rounds_to(value: Node, decimal: Node) -> bool:
    """Whether a decimal of two or more significant digits is the value, rounded or cut to its own places."""
    if not isinstance(decimal, Number) or decimal.decimals is None or symbols(value):
        return False
    scaled = abs(decimal.value) * 10**decimal.decimals
    if scaled < 10:
        return False
    with _LOCK, mp.workdps(_DIGITS[0]):
        try:
            exact = _digits(_evaluate(value, {}))
        except (_Undefined, ZeroDivisionError, ValueError, OverflowError):
            return False
        if mp.im(exact) or (exact < 0) != (decimal.value < 0):
            return False
        shifted = abs(exact) * 10**decimal.decimals
        return int(scaled) in (int(mp.floor(shifted)), int(mp.floor(shifted + mp.mpf(1) / 2)))


def _is_exactly_constant(node: Node, names: list[str], value: Fraction) -> bool:
    return bool(value) and same_value(node, Number(value)) if names else bool(value)


def _is_constant(node: Node, names: list[str], value: Value) -> bool:
    values = [_evaluate(node, _point(names, number)) for number in (1, 2)]
    return all(abs(other - value) <= abs(value) * mp.mpf(10) ** -30 for other in values)


def _same_at(first: Node, second: Node, point: Mapping[str, Fraction]) -> bool | None:
    """None where a side has no value at the point, or is not real on the way there though a variable is negative."""
    differences, scale = [], mp.zero
    for digits in _DIGITS:
        with _LOCK, mp.workdps(digits):
            try:
                one, other = _evaluate(first, point), _evaluate(second, point)
            except (_Undefined, ZeroDivisionError, ValueError, OverflowError):
                return None
            if isinstance(one, Fraction) and isinstance(other, Fraction):
                return one == other
            one, other = _digits(one), _digits(other)
            differences.append(abs(one - other))
            scale = max(abs(one), abs(other))
    coarse, fine = differences
    return bool(fine <= scale * mp.mpf(10) ** -120 or fine <= coarse * mp.mpf(10) ** -60)


def _point(names: list[str], number: int) -> dict[str, Fraction]:
    """Values between 1/4 and 3 without a pattern; from the third point on some are negative."""
    point = {}
    for index, name in enumerate(names):
        mixed = (index * 7919 + number * 104729 + 12345) * 2654435761 % 2**32
        sign = -1 if number > 2 and mixed >> 20 & 1 else 1
        point[name] = sign * (Fraction(1, 4) + Fraction(mixed % 9973, 3631))
    if names and _NUM_POINTS - number == 1:
        point = {name: -abs(value) for name, value in point.items()}
    return point


def _digits(value: Value) -> Value:
    return mp.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _bounded(value: Value) -> Value:
    if isinstance(value, Fraction) and max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        return _digits(value)
    return value


def _evaluate(node: Node, point: Mapping[str, Fraction]) -> Value:
    if isinstance(node, Number):
        return node.value
    if isinstance(node, Symbol):
        return {"e": mp.e, "i": mp.j, "π": mp.pi}[node.name] * mp.one if node.name in "eiπ" else point[node.name]
    values = [_evaluate(argument, point) for argument in node.arguments]
    result = _bounded(_apply(node.operation, values))
    if isinstance(result, Fraction):
        return result
    if not mp.isfinite(result):
        raise _Undefined
    if mp.im(result) and any(value < 0 for value in point.values()):
        raise _Undefined  # the branches of roots and logarithms are nobody's answer
    return result


def _apply(operation: str, values: list[Value]) -> Value:
    exact = all(isinstance(value, Fraction) for value in values)
    if operation in ("+", "*", "neg", "abs"):
        values = values if exact else [_digits(value) for value in values]
        match operation:
            case "+":
                return sum(values[1:], values[0])
            case "*":
                return math.prod(values[1:], start=values[0])
            case "neg":
                return -values[0]
        return abs(values[0])
    if operation == "/":
        return values[0] / values[1] if exact else _digits(values[0]) / _digits(values[1])
    if operation == "^":
        return _raise(*values)
    if operation == "root":
        return _root(*values)
    if operation == "!":
        return _factorial(values[0])
    if operation == "°":
        return _digits(values[0]) * mp.pi / 180
    return _function(operation, [_digits(value) for value in values])


def _raise(base: Value, exponent: Value) -> Value:
    if abs(exponent) > _MAX_EXPONENT:
        raise _Undefined
    if isinstance(exponent, Fraction) and exponent.denominator == 1:
        power = int(exponent)
        if isinstance(base, Fraction):
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if bits * abs(power) <= _MAX_BITS:
                return base**power
        return _within_reach(_digits(base)) ** power
    if base == 0:
        return Fraction(0)
    return mp.power(_within_reach(_digits(base)), _digits(exponent))


def _root(value: Value, degree: Value) -> Value:
    if not isinstance(degree, Fraction) or degree.denominator != 1 or not 1 <= degree <= 1000:
        raise _Undefined
    number = int(degree)
    if isinstance(value, Fraction):
        parts = [_exact_root(part, number) for part in (abs(value.numerator), value.denominator)]
        if value >= 0 and None not in parts:
            return Fraction(*(part or 0 for part in parts))
    value = _digits(value)
    if number % 2 and not mp.im(value) and value < 0:
        return -mp.root(-value, number)
    return mp.root(value, number)


def _exact_root(value: int, degree: int) -> int | None:
    root = math.isqrt(value) if degree == 2 else round(value ** (1 / degree)) if value < 2**50 else 0
    return root if root**degree == value else None


def _factorial(value: Value) -> Value:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= _MAX_FACTORIAL:
        raise _Undefined
    return Fraction(math.factorial(int(value))) if value <= 300 else mp.factorial(int(value))


def _function(name: str, values: list[Value]) -> Value:
    value = values[0]
    if abs(value) > (_MAX_ANGLE if name in _ANGULAR else _MAX_EXPONENT) and name not in ("ln", "log", "atan"):
        raise _Undefined
    if name == "log":
        return mp.log(value) / mp.log(values[1])
    return _FUNCTIONS[name](value)


def _within_reach(value: Value) -> Value:
    """A base whose exponent, which grows with every power, is small itself."""
    if value and abs(mp.log(abs(value))) > _MAX_EXPONENT:
        raise _Undefined
    return value
