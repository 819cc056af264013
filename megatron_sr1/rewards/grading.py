r"""Answer equivalence: `grade(answer, gold, choices)`.

Both texts get one spelling (`answers/spelling.py`), lose what is said around an answer (`phrasing.py`), and are read as
every kind of answer that there is. The first kind that can tell decides:

1. yes and no, true and false; option letters; clock times and dates;
2. the same words, without case, accents, hyphens and number;
3. intervals, named values (`x = 5` is `5`), lists, ratios and ranges, equations;
4. quantities: numbers and expressions with their units, converted within a dimension, and percent.

An unfinished sum or product of plain numbers (`3 + 7` for `10`) is wrong: doing it is what was asked. Decimals are
exact (0.33 is not 1/3) unless `rounded`. No rule asks a process or a clock: every step is bounded by the length of the
text, the depth of its brackets and the size of its numbers, so a hostile answer costs milliseconds.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from megatron_sr1.rewards.answers import phrasing
from megatron_sr1.rewards.answers.chemistry import same_chemistry
from megatron_sr1.rewards.answers.lists import Items, read_items, same_items
from megatron_sr1.rewards.answers.moments import same_moment
from megatron_sr1.rewards.answers.number_words import spell_digits
from megatron_sr1.rewards.answers.options import numbered, same_options, with_own_text
from megatron_sr1.rewards.answers.quantity import read_quantity, same_quantity
from megatron_sr1.rewards.answers.ratios import same_range, same_ratio
from megatron_sr1.rewards.answers.relations import result_of, same_assignments, same_intervals, same_relation
from megatron_sr1.rewards.answers.sayings import customary, in_the_form_of, ordinals_as_words
from megatron_sr1.rewards.answers.spelling import clean, squeeze
from megatron_sr1.rewards.answers.words import same_words
from megatron_sr1.types import MAX_ANSWER_CHARACTERS

MAX_NESTING = 4  # lists of lists, texts of options
_NUMERIC = frozenset("0123456789.$€£¥₹")
_NO_QUANTITY = re.compile(r"\b(?:to|vs|versus)\b|^\d+(?: ?- ?\d+)+$")  # a way, a match; a score, years, a telephone
_NUMERALS = re.compile("[A-Z]{2,8}")


def grade(answer: str, gold: str, choices: Sequence[str] = (), *, rounded: bool = False) -> bool:
    """Whether the answer means the same as the gold answer.

    Args:
        choices: the texts of the options (A), (B) ... of the sample, where it has any: the letter of an option and its
            text are then the same answer.
        rounded: a decimal of two or more significant digits also equals any number that rounds, or is cut, to it.

    Raises:
        ValueError: the gold answer is blank, which is an error of the data set.
    """
    if not answer.strip() or len(answer) > MAX_ANSWER_CHARACTERS:
        return False
    if not gold.strip():
        raise ValueError("a gold answer is blank: no response can be graded against it. Remove it from the data set.")
    if answer.strip() == gold.strip():
        return True
    return len(gold) <= MAX_ANSWER_CHARACTERS and _grade(answer, gold, tuple(choices), rounded)


@functools.lru_cache(maxsize=1 << 14)
def _grade(answer: str, gold: str, choices: tuple[str, ...], rounded: bool) -> bool:
    same = _Comparison(rounded, has_choices=bool(choices))
    first, second = clean(answer), clean(gold)
    if choices:
        first, second = with_own_text(first, choices), with_own_text(second, choices)
    if not phrasing.asides_differ(first, second):
        first, second = _without_asides(first), _without_asides(second)
    if not first or not second:
        return False
    first, second = in_the_form_of(second, first), in_the_form_of(first, second)
    if choices:
        texts = tuple(_without_asides(clean(choice)) for choice in choices)
        chosen, wanted = numbered(first, texts, same), numbered(second, texts, same)
        if chosen is not None and wanted is not None:
            return chosen == wanted and chosen >= 0
    return same(first, second)


def _without_asides(text: str) -> str:
    return customary(spell_digits(ordinals_as_words(phrasing.bare(text))))


class _Comparison:
    """Compares two plain texts; the parts of lists, named values and options are compared by it again."""

    def __init__(self, rounded: bool, has_choices: bool, depth: int = 0) -> None:
        self._rounded = rounded
        self._has_choices = has_choices
        self._depth = depth

    def __call__(self, answer: str, gold: str) -> bool:
        if squeeze(answer) == squeeze(gold):
            return True
        if not answer or not gold or self._depth > MAX_NESTING:
            return False
        inner = _Comparison(self._rounded, self._has_choices, self._depth + 1)
        said, wanted = phrasing.polarity(answer), phrasing.polarity(gold)
        if said and wanted:
            (word, more), (other, beside) = said, wanted
            return word == other and (not more or not beside or inner(more, beside))
        for verdict in (
            same_options(answer, gold, inner, self._has_choices),
            same_moment(answer, gold),
            self._same_measured(answer, gold),
            same_words(answer, gold) or same_chemistry(answer, gold) or None,
            same_intervals(answer, gold, inner),
            same_assignments(answer, gold, inner),
            _same_lists(answer, gold, inner),
            same_ratio(answer, gold),
            same_range(answer, gold),
            same_relation(answer, gold),
        ):
            if verdict is not None:
                return verdict
        return self._same_quantities(answer, gold)

    def _same_measured(self, answer: str, gold: str) -> bool | None:
        """Two numbers with units, before words are compared without case: `5 mW` is not `5 MW`."""
        if answer[0] not in _NUMERIC or gold[0] not in _NUMERIC:
            return None
        first, second = read_quantity(answer), read_quantity(gold)
        if first is None or second is None or not (first.units or second.units):
            return None
        return same_quantity(first, second, self._rounded)

    def _same_quantities(self, answer: str, gold: str) -> bool:
        if any(_NO_QUANTITY.search(text) for text in (answer, gold)):
            return False
        if self._depth == 0 and _NUMERALS.fullmatch(answer) and _NUMERALS.fullmatch(gold):
            return False  # IV and VI, PC and CP: a product of its own is none
        first = read_quantity(result_of(answer) or answer)
        second = read_quantity(result_of(gold) or gold)
        return first is not None and second is not None and same_quantity(first, second, self._rounded)


def _same_lists(answer: str, gold: str, same: _Comparison) -> bool | None:
    r"""None where neither is a list; a list never equals a single answer, but a set of one, `\{3\}`, is its element."""
    first, second = read_items(answer), read_items(gold)
    if first is None and second is None:
        return None
    for found, other, text in ((first, second, gold), (second, first, answer)):
        if found is not None and found.brackets == "{}" and len(found.items) == 1 and other is None:
            return same(found.items[0], text) if text == gold else same(text, found.items[0])
    first, second = first or _split_again(answer, second), second or _split_again(gold, first)
    return first is not None and second is not None and same_items(first, second, same)


def _split_again(text: str, other: Items | None) -> Items | None:
    """`1,234` beside a list is two numbers."""
    return read_items(text, split_thousands=True) if other is not None and not other.brackets else None
