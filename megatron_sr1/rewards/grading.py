r"""Answer equivalence: `grade(answer, gold)`.

The first rule that applies decides; most answers are decided before any symbolic mathematics.

1. An empty answer, or one longer than MAX_ANSWER_CHARACTERS, is wrong. Equal after cleaning is right.
2. Option letters: a gold `B`, `(B)`, `B.` or `(B) Paris` equals any of these spellings, in either case. With a
   lettered text on both sides only the letter counts.
3. Equations: `x = 5` equals `5` both ways; `x = 5` does not equal `y = 5`.
4. Quantities, see `quantity.py`: thousands separators, fractions, decimals, percent, units.
5. Where only the gold is a number, an unfinished sum or product of plain numbers (`3 + 7` for `10`) is wrong: doing it
   is what was asked. So is a list, a term with a variable, and anything that has no mathematics in it.
6. Words: equal without case, spaces, quotes and final punctuation (also yes, no, true, false; `yes` is not `true`).
7. Anything else goes to math-verify, see `symbolic.py`; a known unit at the end is compared apart, as in rule 4.
   A bare list is a set of solutions, in any order; the order of a tuple counts.
"""

from __future__ import annotations

import re

from megatron_sr1.rewards import symbolic
from megatron_sr1.rewards.normalize import clean, squeeze
from megatron_sr1.rewards.quantity import parse_quantity, same_quantity, split_unit

MAX_ANSWER_CHARACTERS = 512

_OPTION = re.compile(r"(?:option|choice)?\s?(?:\(\s?([a-z])\s?\)|([a-z]))\s?[.:)]?", re.IGNORECASE)
_OPTION_WITH_TEXT = re.compile(r"(?:option |choice )?(?:\(\s?([A-Ja-j])\s?\)|([A-J])[.:)])\s?[^\s=+*/^-].*")
_EQUALS = re.compile(r"(?<![<>!=])=(?!=)")
_ASSIGNMENT = re.compile(r"\s?\\?[A-Za-z]+(?:_\{?\w+\}?)?\s?")
_WORDS = re.compile(r"[^\W\d_][\w\s.,;:!?'\"&-]*")
_LONG_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_MATHEMATICS = re.compile(r"[A-Za-z\\^+*/=(){}\[\]<>!_|°-]")
_VARIABLE = re.compile(r"(?<![\\A-Za-z])[A-DF-HJ-Za-df-hj-z](?![A-Za-z])")  # e and i are numbers
_PLAIN_ARITHMETIC = re.compile(r"[\d\s.()+*-]+")


def grade(answer: str, gold: str) -> bool:
    """Whether the answer means the same as the gold answer. Not symmetric: the gold sets the form that is asked.

    Raises:
        ValueError: the gold answer is blank, which is an error of the data set.
        RuntimeError: math-verify is needed and does not start.
    """
    if not answer.strip() or len(answer) > MAX_ANSWER_CHARACTERS:
        return False
    if not gold.strip():
        raise ValueError("a gold answer is blank: no response can be graded against it. Remove it from the data set.")
    if answer.strip() == gold.strip():
        return True
    if len(gold) > MAX_ANSWER_CHARACTERS:
        return False
    if answer.isdecimal() and gold.isdecimal():
        return int(answer) == int(gold)
    return _same(clean(answer), clean(gold))


def _same(answer: str, gold: str) -> bool:
    """`grade` for two cleaned texts; rules 1 to 4."""
    if not answer or not gold:
        return False
    if squeeze(answer) == squeeze(gold):
        return True
    gold_letter = _option_letter(gold)
    if gold_letter is not None:
        answer_letter = _option_letter(answer)
        if answer_letter is not None:
            return answer_letter == gold_letter
        if gold_letter in "abcdefghj":  # i may be the imaginary unit
            return False
    answer, gold = _strip_assignment(answer, gold)
    answer_quantity, gold_quantity = parse_quantity(answer), parse_quantity(gold)
    if answer_quantity is not None and gold_quantity is not None:
        return same_quantity(answer_quantity, gold_quantity)
    if gold_quantity is not None and not _may_equal_a_number(answer):
        return False
    return _same_words_or_expression(answer, gold)


def _same_words_or_expression(answer: str, gold: str) -> bool:
    """Rules 6 and 7."""
    if _WORDS.fullmatch(answer) and _WORDS.fullmatch(gold) and _word_key(answer) == _word_key(gold):
        return True
    if _LONG_WORD.search(answer) or _LONG_WORD.search(gold):
        return False
    both_lists = "," in answer and "," in gold
    if not both_lists and _MATHEMATICS.search(answer) is None and _MATHEMATICS.search(gold) is None:
        return False
    (answer, answer_unit), (gold, gold_unit) = split_unit(answer), split_unit(gold)
    if answer_unit and gold_unit and answer_unit != gold_unit:
        return False
    return symbolic.same_expression(answer, gold)


def _may_equal_a_number(answer: str) -> bool:
    """Rule 5."""
    if "," in answer or _VARIABLE.search(answer) or _is_arithmetic(answer):
        return False
    return _MATHEMATICS.search(answer) is not None


def _is_arithmetic(answer: str) -> bool:
    plain = answer.replace("\\times", "*").replace("\\cdot", "*")
    return _PLAIN_ARITHMETIC.fullmatch(plain) is not None and re.search(r"\d[\s)]*[+*(-]", plain) is not None


def _option_letter(text: str) -> str | None:
    match = _OPTION.fullmatch(text) or _OPTION_WITH_TEXT.fullmatch(text)
    return None if match is None else (match[1] or match[2]).lower()


def _strip_assignment(answer: str, gold: str) -> tuple[str, str]:
    """Rule 3: the right-hand side where only one of the two is an equation."""
    answer_sides, gold_sides = _EQUALS.split(answer), _EQUALS.split(gold)
    if len(gold_sides) == 1 and len(answer_sides) > 1 and "," not in answer:
        return answer_sides[-1].strip(), gold
    if len(answer_sides) == 1 and len(gold_sides) == 2 and _ASSIGNMENT.fullmatch(gold_sides[0]):
        return answer, gold_sides[1].strip()
    return answer, gold


def _word_key(text: str) -> str:
    return re.sub(r"[\s.,;:!?'\"-]", "", text).casefold()
