"""Trees of expressions."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Number:
    """A number as it is written; `decimals` counts the digits behind its point, None where it has no point."""

    value: Fraction
    decimals: int | None = None


@dataclass(frozen=True)
class Symbol:
    """A variable with its index (`x_1`), or one of the constants e, i and π."""

    name: str


@dataclass(frozen=True)
class Apply:
    """`operation` is + * / ^ neg root ! abs ° log (argument, base), or the name of a function."""

    operation: str
    arguments: tuple[Node, ...]


Node = Number | Symbol | Apply


def symbols(node: Node) -> frozenset[str]:
    """The variables of a tree."""
    match node:
        case Symbol(name):
            return frozenset([name]) - {"e", "i", "π"}
        case Apply(_, arguments):
            return frozenset[str]().union(*map(symbols, arguments))
    return frozenset()


def is_unfinished(node: Node) -> bool:
    """A sum or product of plain numbers somewhere: `2*5`, `(3 + 7)/2`. To do it is what was asked."""
    if not isinstance(node, Apply):
        return False
    plain = node.operation in "+*" and all(_is_rational(argument) for argument in node.arguments)
    return plain or any(map(is_unfinished, node.arguments))


def _is_rational(node: Node) -> bool:
    if isinstance(node, Apply):
        return node.operation in ("+", "*", "/", "neg", "^") and all(map(_is_rational, node.arguments))
    return isinstance(node, Number)
