r"""Chemical writing: `H_2O` is `H2O`, `2H_2 + O_2 \rightarrow 2H_2O` is `O2 + 2H2 -> 2H2O`, `^{14}C` is `14C`.

Case counts, and so do coefficients, charges and the side of the arrow. States of matter count where both name them.
"""

from __future__ import annotations

import re

_COUNT = r"(?:_?(?:\d+|\{\d+\}))?"
_FORMULA = re.compile(rf"(?:\(?[A-Z][a-z]?{_COUNT}(?:\){_COUNT})? ?)+(?:\^?\{{?\d*[+-]\}}?)?")
_SCRIPT = re.compile(r"[\^_{} ]")
_ARROW = re.compile(r"\s?([→⇌])\s?")
_TERM = re.compile(rf"(?P<number>\d{{0,3}}) ?(?P<formula>{_FORMULA.pattern}) ?(?P<state>\((?:s|l|g|aq)\))?")
_RAISED = re.compile(r"(?:\{\})?\^\{?(?P<mass>\d{1,3})\}?(?:_\{?\d{1,3}\}?)? ?(?P<symbol>[A-Z][a-z]?)")
_WRITTEN_BESIDE = re.compile(r"(?P<mass>\d{1,3})(?P<symbol>[A-Z][a-z]?)|(?P<name>[A-Z][a-z]?)-(?P<number>\d{1,3})")

Side = list[tuple[str, str]]  # of a reaction: each term with its coefficient, and its state of matter


def same_chemistry(answer: str, gold: str) -> bool:
    """Whether two cleaned texts are one formula, one reaction or one isotope."""
    return _same_formula(answer, gold) or _same_reaction(answer, gold) or _same_isotope(answer, gold)


def _same_formula(answer: str, gold: str) -> bool:
    r"""`H_2O` and `H2O`, `Fe^{3+}` and `Fe3+`."""
    both = _FORMULA.fullmatch(answer) and _FORMULA.fullmatch(gold)
    return bool(both) and _SCRIPT.sub("", answer) == _SCRIPT.sub("", gold)


def _same_reaction(answer: str, gold: str) -> bool:
    """The terms of a side stand in any order, the sides in theirs."""
    first, second = _reaction(answer), _reaction(gold)
    if first is None or second is None or len(first[1]) != len(second[1]):
        return False
    return first[0] == second[0] and all(map(_same_side, first[1], second[1]))


def _same_side(answer: Side, gold: Side) -> bool:
    with_states = all(state for _, state in answer) and all(state for _, state in gold)
    first, second = (sorted(side if with_states else [(term, "") for term, _ in side]) for side in (answer, gold))
    return first == second


def _reaction(text: str) -> tuple[list[str], list[Side]] | None:
    """(arrows, sides); None where a term is no formula."""
    arrows = _ARROW.findall(text)
    if not arrows:
        return None
    sides = list[Side]()
    for side in re.split(_ARROW.pattern, text)[::2]:
        terms = [_TERM.fullmatch(term.strip()) for term in re.split(r"\+(?=\s?[\dA-Z(])", side)]
        if None in terms:
            return None
        sides.append([(_SCRIPT.sub("", f"{t['number']}{t['formula']}"), t["state"] or "") for t in terms if t])
    return arrows, sides


def _same_isotope(answer: str, gold: str) -> bool:
    """One side must raise the mass: of `14C` alone nobody knows that it is not a charge or a temperature."""
    raised = [_RAISED.fullmatch(text) for text in (answer, gold)]
    if not any(raised):
        return False
    read = [match or _WRITTEN_BESIDE.fullmatch(text) for match, text in zip(raised, (answer, gold), strict=True)]
    found = [match.groupdict() for match in read if match is not None]
    named = [(one["mass"] or one.get("number"), one["symbol"] or one.get("name")) for one in found]
    return len(named) == 2 and named[0] == named[1]
