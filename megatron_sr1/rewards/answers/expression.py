r"""Expressions in LaTeX or plain writing as trees: `\frac{1}{2}x^2`, `2√3`, `x(x+1)/2`, `\sin^2 2x`, `1 1/2`.

Read by descent, with a bound on the depth; what it does not know (words, integrals, dots) is no expression.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_sr1.rewards.answers.tree import Apply, Node, Number, Symbol

MAX_DEPTH = 40
_FUNCTIONS = (
    "asin",
    "acos",
    "atan",
    "sinh",
    "cosh",
    "tanh",
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "ln",
    "log",
    "lg",
    "exp",
)
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d{1,3}(?: \d{3})+(?!\d)(?:\.\d+)?"
    r"|\d+\.\d+|\d+(?:\.(?!\d))?|\.\d+)"
    r"(?P<e>[eE][+-]?\d{1,6}(?![\d.A-Za-z]))?"
    rf"|\\?(?P<function>{'|'.join(_FUNCTIONS)})(?![A-Za-z])"
    r"|\\(?P<command>frac|sqrt|binom)(?![A-Za-z])"
    r"|(?P<letters>[A-Za-zΑ-ω]+)|(?P<sign>[-+*/^_!|°(){}\[\]×·÷]))"
)
_INVERSES = {"sin": "asin", "cos": "acos", "tan": "atan"}
_TRIPLE = re.compile("[xyz]{3}|abc")  # other words of three letters are words


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    spaced: bool  # a space before it


class _NotAnExpression(Exception):
    pass


def parse_expression(text: str) -> Node | None:
    """The tree of a cleaned text; None where it is no expression, or nested deeper than MAX_DEPTH."""
    try:
        parser = _Parser(_tokens(text))
        node = parser.sum(0)
        parser.expect("end")
    except _NotAnExpression:
        return None
    return node


def _tokens(text: str) -> list[_Token]:
    tokens, position = list[_Token](), 0
    while position < len(text.rstrip()):
        match = _TOKEN.match(text, position)
        if match is None:
            raise _NotAnExpression
        kind = match.lastgroup or ""
        kind = "number" if kind == "e" else kind
        spaced = text[position] == " "
        if kind == "letters":
            tokens += _letters(match["letters"], spaced)
        else:
            tokens.append(_Token(kind, match[0].strip().removeprefix("\\"), spaced))
        position = match.end()
    return [*tokens, _Token("end", "", spaced=False)]


def _letters(run: str, spaced: bool) -> list[_Token]:
    if len(run) > 2 and not _TRIPLE.fullmatch(run):
        raise _NotAnExpression
    return [_Token("letters", letter, spaced and index == 0) for index, letter in enumerate(run)]


_CALLED = ("f", "g", "F")


class _Parser:
    """`depth` is handed down by every rule that can contain itself."""

    def __init__(self, tokens: list[_Token]) -> None:
        self._tokens = tokens
        self._at = 0

    def expect(self, text: str) -> None:
        if not self._take(text):
            raise _NotAnExpression

    def sum(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise _NotAnExpression
        terms = [self._signed(depth)]
        while self._peek().text in ("+", "-"):
            negative = self._next().text == "-"
            term = self._signed(depth)
            terms.append(Apply("neg", (term,)) if negative else term)
        return terms[0] if len(terms) == 1 else Apply("+", tuple(terms))

    def _signed(self, depth: int) -> Node:
        negative = False
        signs = 0
        while self._peek().text in ("+", "-"):
            negative ^= self._next().text == "-"
            signs += 1
        if signs > 2:
            raise _NotAnExpression
        node = self._product(depth)
        if negative and isinstance(node, Number):
            return Number(-node.value, node.decimals)
        return Apply("neg", (node,)) if negative else node

    def _product(self, depth: int) -> Node:
        node = self._power(depth)
        while True:
            operator = self._peek().text
            if operator in ("*", "×", "·"):
                self._next()
                right = self._operand(depth)
                node = _scientific(node, right) or Apply("*", (node, right))
            elif operator in ("/", "÷"):
                self._next()
                node = _ratio(node, self._operand(depth))
            elif self._starts_factor() and self._peek().kind != "number":
                node = Apply("*", (node, self._power(depth)))
            else:
                return node

    def _operand(self, depth: int) -> Node:
        if self._take("-"):
            return Apply("neg", (self._power(depth),))
        self._take("+")
        return self._power(depth)

    def _starts_factor(self) -> bool:
        token = self._peek()
        return token.kind in ("number", "letters", "function", "command") or token.text in ("(", "{", "[")

    def _power(self, depth: int) -> Node:
        node = self._atom(depth)
        while self._peek().text in ("!", "°"):
            node = Apply(self._next().text, (node,))
        if self._take("^"):
            node = Apply("^", (node, self._exponent(depth + 1)))
        while self._peek().text in ("!", "°"):
            node = Apply(self._next().text, (node,))
        return node

    def _exponent(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise _NotAnExpression
        negative = self._take("-")
        if not negative:
            self._take("+")
        node = self._power(depth) if self._peek().text != "{" else self._group(depth)
        return Apply("neg", (node,)) if negative else node

    def _atom(self, depth: int) -> Node:
        token = self._peek()
        if token.kind == "number":
            return self._number(depth)
        if token.kind == "letters":
            return self._symbol(depth)
        if token.kind == "function":
            return self._function(depth)
        if token.text == "frac":
            self._next()
            return _ratio(self._short_group(depth), self._short_group(depth))
        if token.text == "binom":
            self._next()
            return _binomial(self._short_group(depth), self._short_group(depth))
        if token.text == "sqrt":
            return self._root(depth)
        if token.text == "|":
            self._next()
            node = self.sum(depth + 1)
            self.expect("|")
            return Apply("abs", (node,))
        return self._group(depth)

    def _group(self, depth: int) -> Node:
        opening = self._next().text
        if opening not in ("(", "{", "["):
            raise _NotAnExpression
        node = self.sum(depth + 1)
        self.expect({"(": ")", "{": "}", "[": "]"}[opening])
        return node

    def _short_group(self, depth: int) -> Node:
        r"""What `\frac` and `\sqrt` take: a group, or one digit of a longer number."""
        token = self._peek()
        if token.kind != "number":
            return self._group(depth) if token.text in ("{", "(") else self._atom(depth + 1)
        if not token.text.isdecimal():
            raise _NotAnExpression
        self._next()
        if len(token.text) > 1:
            self._at -= 1
            self._tokens[self._at] = _Token("number", token.text[1:], spaced=False)
        return Number(Fraction(token.text[0]))

    def _number(self, depth: int) -> Node:
        token = self._next()
        mantissa, _, power = token.text.replace(",", "").replace(" ", "").lower().partition("e")
        value = Fraction(mantissa.rstrip(".")) * _power_of_ten(int(power or 0))
        if not mantissa.isdecimal() or power:
            return Number(value, len(mantissa.partition(".")[2]) if "." in mantissa and not power else None)
        part = self._fraction_after(depth)
        return Number(value) if part is None else Number(value + part)

    def _fraction_after(self, depth: int) -> Fraction | None:
        r"""The fraction of a mixed number, `1 1/2` or `1\frac{1}{2}`; None and nothing read where there is none."""
        start, tokens = self._at, list(self._tokens[self._at : self._at + 3])
        first = tokens[0]
        if first.text == "frac":
            node = self._atom(depth + 1)
            if isinstance(node, Number):
                return node.value
        elif first.kind == "number" and first.spaced and [t.kind for t in tokens] == ["number", "sign", "number"]:
            plain = tokens[1].text == "/" and first.text.isdecimal() and tokens[2].text.isdecimal()
            if plain and 0 < int(first.text) < int(tokens[2].text):
                self._at += 3
                return Fraction(int(first.text), int(tokens[2].text))
        self._at = start
        return None

    def _symbol(self, depth: int) -> Node:
        """A variable; `f(x + y)` is one too, which nothing but itself equals: f is no factor."""
        alone = self._at == 0 or self._tokens[self._at - 1].kind != "letters"
        name = self._next().text
        if alone and name in _CALLED and self._peek().text == "(" and not self._peek().spaced:
            return Symbol(f"{name}({self._group(depth)})")
        if self._take("_"):
            if self._take("{"):
                while self._peek().kind in ("number", "letters"):
                    name += "_" + self._next().text
                self.expect("}")
            elif self._peek().kind in ("number", "letters"):
                name += "_" + self._next().text
            else:
                raise _NotAnExpression
        return Symbol(name)

    def _function(self, depth: int) -> Node:
        name = self._next().text
        base: Node | None = None
        power: Node | None = None
        if self._take("_"):
            base = self._short_group(depth + 1) if self._peek().text == "{" else self._atom(depth + 1)
        if self._take("^"):
            power = self._exponent(depth + 1)
        if name in _INVERSES and power in (Number(Fraction(-1)), Apply("neg", (Number(Fraction(1)),))):
            name, power = _INVERSES[name], None
        node = self._argument(depth + 1)
        if name in ("log", "lg"):
            node = Apply("log", (node, base or Number(Fraction(10))))
        elif base is None:
            node = Apply(name, (node,))
        else:
            raise _NotAnExpression
        return node if power is None else Apply("^", (node, power))

    def _argument(self, depth: int) -> Node:
        r"""A group, or the product that follows: `\sin 2x` up to the next sign or function."""
        if depth > MAX_DEPTH:
            raise _NotAnExpression
        if self._peek().text in ("(", "{", "["):
            return self._power(depth)
        node = Apply("neg", (self._power(depth),)) if self._take("-") else self._power(depth)
        while self._starts_factor() and self._peek().kind not in ("function", "number"):
            node = Apply("*", (node, self._power(depth)))
        return node

    def _root(self, depth: int) -> Node:
        self._next()
        degree: Node = Number(Fraction(2))
        if self._take("["):
            degree = self.sum(depth + 1)
            self.expect("]")
        return Apply("root", (self._short_group(depth + 1), degree))

    def _peek(self) -> _Token:
        return self._tokens[self._at]

    def _next(self) -> _Token:
        token = self._tokens[self._at]
        if token.kind == "end":
            raise _NotAnExpression
        self._at += 1
        return token

    def _take(self, text: str) -> bool:
        token = self._peek()
        taken = token.text == text or (text == "end" and token.kind == "end")
        self._at += taken
        return taken


def _ratio(top: Node, bottom: Node) -> Node:
    if isinstance(top, Number) and isinstance(bottom, Number) and bottom.value:
        return Number(top.value / bottom.value)
    return Apply("/", (top, bottom))


def _binomial(top: Node, bottom: Node) -> Node:
    if isinstance(top, Number) and isinstance(bottom, Number):
        whole = top.value.denominator == bottom.value.denominator == 1
        if whole and 0 <= bottom.value <= top.value <= 300:
            return Number(Fraction(math.comb(int(top.value), int(bottom.value))))
    rest = Apply("+", (top, Apply("neg", (bottom,))))
    return Apply("/", (Apply("!", (top,)), Apply("*", (Apply("!", (bottom,)), Apply("!", (rest,))))))


def _scientific(mantissa: Node, power: Node) -> Node | None:
    """`1.2 * 10^3` is one number, no product that waits to be done."""
    if not isinstance(mantissa, Number) or not isinstance(power, Apply) or power.operation != "^":
        return None
    base, exponent = power.arguments
    negative = isinstance(exponent, Apply) and exponent.operation == "neg"
    exponent = exponent.arguments[0] if isinstance(exponent, Apply) and negative else exponent
    if base != Number(Fraction(10)) or not isinstance(exponent, Number) or exponent.value.denominator != 1:
        return None
    return Number(mantissa.value * _power_of_ten(int(exponent.value) * (-1 if negative else 1)))


def _power_of_ten(exponent: int) -> Fraction:
    if abs(exponent) > 1000:
        raise _NotAnExpression
    return Fraction(10) ** exponent
