r"""Equations, inequalities and intervals: `y = 2x + 1` is `2x - y + 1 = 0`, `x > 3` is `(3, ∞)`.

An equation with a name on its left (`x = 5`, `Area = 12`, `m∠ABC = 45°`) also equals its right-hand side alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from megatron_sr1.rewards.answers.expression import parse_expression
from megatron_sr1.rewards.answers.lists import Items, read_items, split_items
from megatron_sr1.rewards.answers.numeric import ratio_sign, same_value
from megatron_sr1.rewards.answers.spelling import squeeze, strip_ends
from megatron_sr1.rewards.answers.tree import Apply, Node, symbols

Same = Callable[[str, str], bool]
_NAME = re.compile(
    r"(?:[Tt]he )?(?:m?\s?[∠△]\s?[A-Za-z]{1,3}|[A-Za-zΑ-ω]'?(?:_\{?\w+\}?)?(?:\([^()=]{1,12}\))?|\|?[A-Z]{2}\|?"
    r"|[A-Za-z]{3,}(?: [A-Za-z]+){0,3}|\([a-z](?:, ?[a-z])+\)|m\([^()]+\))"
)
_COLON = re.compile(r"([A-Za-z]{3,}(?: [a-z]+){0,2}): ?(.+)")
_IN_INTERVAL = re.compile(r"∈\s?[(\[][^,]+,[^,]+[)\]]")  # whose brackets say whether the ends belong to it
_RELATION = re.compile(r"[<>≤≥≠]")
_STRICT = {"<": "<", ">": "<", "≤": "≤", "≥": "≤", "≠": "≠", "=": "="}


@dataclass(frozen=True)
class Interval:
    """`low` and `high` as written, "" where there is no bound; `name` "" where no variable is named."""

    name: str
    low: str
    low_closed: bool
    high: str
    high_closed: bool


def assignments(text: str) -> tuple[tuple[str, str], ...]:
    """((name, value), ...) of `x = 2, y = 3`; of `x = 2, 5` both belong to x. () where the first is no assignment."""
    found = list[tuple[str, str]]()
    for part in split_items(text)[0]:
        name, value = _assignment(part)
        if (not name and not found) or (not value):
            return ()
        found.append((name or found[-1][0], value))
    return tuple(found)


def _assignment(text: str) -> tuple[str, str]:
    """(name, value); ("", text) where it is none."""
    if _IN_INTERVAL.search(text):
        return "", text
    if match := _COLON.fullmatch(text):
        return match[1], match[2]
    sides = [side.strip() for side in re.split("[=∈]", text)]
    if len(sides) == 2 and not _NAME.fullmatch(sides[0]) and _NAME.fullmatch(sides[1]) and _is_constant(sides[0]):
        sides.reverse()  # 5 = x
    if len(sides) < 2 or not _NAME.fullmatch(sides[0]):
        return "", text
    return re.sub(r"\s|^[Tt]he ", "", sides[0]), strip_ends(sides[-1])


def same_assignments(answer: str, gold: str, same: Same) -> bool | None:
    """Whether named values agree, with those of the other side or with what stands there bare; None where neither
    side names one."""
    first, second = assignments(answer), assignments(gold)
    if not first and not second:
        return None
    if _joined_otherwise(answer, gold, first, second) or _is_other_formula(first, second, answer, gold):
        return False
    if first and second:
        if len(first) != len(second):
            return None
        wanted = {_key(name): value for name, value in second}
        if len(wanted) == len(second) and all(
            _key(name) in wanted and same(value, wanted[_key(name)]) for name, value in first
        ):
            return True
        if {name for name, _ in first} == {name for name, _ in second} and len(wanted) == 1 < len(first):
            return same(_values(first), _values(second))
        return None
    named, bare, swapped = (first, gold, False) if first else (second, answer, True)
    distinct = len({name for name, _ in named}) == len(named) > 1
    value = _values(named)
    in_order = distinct and read_items(bare) is not None
    if in_order:
        value = f"({value})"
    verdict = same(bare, value) if swapped else same(value, bare)
    return verdict or (False if in_order else None)


def _key(name: str) -> str:
    """Words are names without their case, and so are the unknowns x, y, z; of other letters, `r` and `R` are two."""
    return name.casefold() if len(name) > 2 or name in ("X", "Y", "Z") else name


def _joined_otherwise(answer: str, gold: str, *named: tuple[tuple[str, str], ...]) -> bool:
    """`x = 1 or y = 2` is not `x = 1, y = 2`; of one name `or` and `and` join the same solutions."""
    distinct = any(len(pairs) > 1 and len({_key(name) for name, _ in pairs}) == len(pairs) for pairs in named)
    return distinct and split_items(answer)[1] != split_items(gold)[1]


def _is_other_formula(
    first: tuple[tuple[str, str], ...], second: tuple[tuple[str, str], ...], answer: str, gold: str
) -> bool:
    """Whether what a letter is equal to differs in case alone, and is a formula: `F = ma` is not `F = Ma`."""
    if not all(len(name) <= 2 for name, _ in first + second):
        return False
    one, other = _values(first) or answer, _values(second) or gold
    differs = squeeze(one) != squeeze(other) and squeeze(one).casefold() == squeeze(other).casefold()
    node = parse_expression(one) if differs else None
    return node is not None and bool(symbols(node))


def _values(named: tuple[tuple[str, str], ...]) -> str:
    return ", ".join(value for _, value in named)


def result_of(text: str) -> str | None:
    """What a computation in plain numbers ends with: 10 of `3 + 7 = 10`; None where it is none, or wrong."""
    sides = [side.strip() for side in text.split("=")]
    nodes = [parse_expression(side) for side in sides]
    if len(sides) < 2 or any(
        node is None or symbols(node) or not same_value(node, nodes[-1] or node) for node in nodes
    ):
        return None
    return sides[-1]


def _is_constant(text: str) -> bool:
    node = parse_expression(text)
    return node is not None and not symbols(node)


def same_relation(answer: str, gold: str) -> bool | None:
    """Whether two equations or inequalities say the same: sides moved, multiplied by a constant; None where one of
    them is none."""
    first, second = _difference(answer), _difference(gold)
    if first is None or second is None:
        return None
    (sign, node), (wanted, other) = first, second
    factor = ratio_sign(node, other)
    return sign == wanted and (factor > 0 if sign in "<≤" else factor != 0)


def _difference(text: str) -> tuple[str, Node] | None:
    """(=, <, ≤ or ≠; left minus right, turned so that it is less than zero)."""
    parts = re.split(r"([=<>≤≥≠])", text)
    if len(parts) != 3:
        return None
    left, right = parse_expression(parts[0]), parse_expression(parts[2])
    if left is None or right is None or not symbols(left) | symbols(right):
        return None
    if parts[1] in ">≥":
        left, right = right, left
    return _STRICT[parts[1]], Apply("+", (left, Apply("neg", (right,))))


def same_intervals(answer: str, gold: str, same: Same) -> bool | None:
    """Whether two unions of intervals are equal, written as inequalities or in brackets; None where a side is none,
    or both are mere pairs in brackets."""
    first, second = _union(answer), _union(gold)
    if first is None or second is None or not (_speaks_of_intervals(answer) or _speaks_of_intervals(gold)):
        return None
    if len(first) != len(second):
        return False
    left = list(second)
    for interval in first:
        match = next((i for i, other in enumerate(left) if _same_interval(interval, other, same)), None)
        if match is None:
            return False
        del left[match]
    return True


def _speaks_of_intervals(text: str) -> bool:
    return _RELATION.search(text) is not None or "∪" in text or "∞" in text or _IN_INTERVAL.search(text) is not None


def _union(text: str) -> list[Interval] | None:
    intervals = [_interval(part.strip()) for part in re.split(r"∪|\bor\b", text)]
    return None if None in intervals else [interval for interval in intervals if interval is not None]


def _interval(text: str) -> Interval | None:
    name, inner = (part.strip() for part in text.split("∈", 1)) if "∈" in text else ("", text)
    if inner[:1] in ("(", "[") and inner[-1:] in (")", "]"):
        items: Items | None = read_items(inner)
        if items is None or len(items.items) != 2 or len(items.brackets) != 2:
            return None
        low, high = (_finite(item) for item in items.items)
        return Interval(name, low, items.brackets[0] == "[", high, items.brackets[1] == "]")
    parts = [part.strip() for part in re.split(r"([<>≤≥])", text)]
    if len(parts) == 5 and {parts[1], parts[3]} <= {"<", "≤"}:
        return Interval(parts[2], parts[0], parts[1] == "≤", parts[4], parts[3] == "≤")
    if len(parts) == 5 and {parts[1], parts[3]} <= {">", "≥"}:
        return Interval(parts[2], parts[4], parts[3] == "≥", parts[0], parts[1] == "≥")
    if len(parts) != 3 or "≠" in text:
        return None
    left, sign, right = parts
    if not right or (_is_constant(left) and _is_constant(right)):
        return None
    if left and _is_constant(left) and not _is_constant(right):
        left, sign, right = right, sign.translate(str.maketrans("<>≤≥", "><≥≤")), left
    if left and not _NAME.fullmatch(left):
        return None
    closed = sign in "≤≥"
    return Interval(left, right, closed, "", False) if sign in ">≥" else Interval(left, "", False, right, closed)


def _finite(bound: str) -> str:
    return "" if bound.replace(" ", "") in ("∞", "-∞") else bound


def _same_interval(first: Interval, second: Interval, same: Same) -> bool:
    def bound(one: str, other: str) -> bool:
        return one == other or (bool(one and other) and same(one, other))

    names = not first.name or not second.name or first.name == second.name
    closed = (first.low_closed, first.high_closed) == (second.low_closed, second.high_closed)
    return names and closed and bound(first.low, second.low) and bound(first.high, second.high)
