r"""What a description is worth: does it state the facts (`faithful`), does it state the answer (`leaks`)?

`metadata["facts"]` of a prompt, where the data set has it, is the list of what the image shows, in reading order:
numbers or words, for example ["3", "7"].
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_sr1.rewards.answers.number_words import NUMBER_WORDS
from megatron_sr1.rewards.answers.spelling import clean
from megatron_sr1.types import Prompt

_TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+")
_STATES_AN_ANSWER = re.compile(r"\\boxed|\banswer\s*(?:is\b|[:=])", re.IGNORECASE)
_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:]?")
_TOO_COMMON = frozenset(("yes", "no", "true", "false"))


def faithful(description: str | None, prompt: Prompt) -> bool | None:
    """Whether the description names exactly the facts, in order; None for a prompt without facts.

    Compared is the sequence of numbers (digits or words up to twenty) and of words that occur in the facts: a number
    too many, one missing or two exchanged make it unfaithful, other words do not matter.

    Raises:
        ValueError: the facts are not a list.
    """
    facts = _facts(prompt)
    if facts is None:
        return None
    if description is None:
        return False
    return [token for token in _tokens(description) if token[0].isdigit() or token in facts] == facts


def leaks(description: str | None, prompt: Prompt) -> bool:
    r"""Whether the description states the answer instead of the image (method, defect 3).

    True where it contains `\boxed`, "answer is", "answer:" or "answer="; or the gold answer as whole words, once the
    tokens that are facts of the image are taken out (so "3 and 7" does not leak the larger number, 7). A gold option
    letter must be written `(B)`, `option B` or `choice B`, and for a gold yes, no, true, false only the phrases count:
    alone they are ordinary words. Without facts in the metadata a described number that happens to be the answer
    counts as well: then the rate is an upper bound.
    """
    if description is None:
        return False
    if _STATES_AN_ANSWER.search(description):
        return True
    gold = clean(prompt.answer)
    if letter := _LETTER.fullmatch(gold):
        stated = rf"\({letter[1]}\)|\b(?:option|choice)\s+\(?{letter[1]}\b"
        return re.search(stated, description, re.IGNORECASE) is not None
    if gold.lower() in _TOO_COMMON:
        return False
    facts = _facts(prompt) or []
    wanted = _tokens(gold)
    tokens = _tokens(description)
    if len(wanted) == 1:
        return wanted[0] not in facts and wanted[0] in tokens
    kept = [token for token in tokens if token not in facts]
    return bool(wanted) and any(kept[i : i + len(wanted)] == wanted for i in range(len(kept)))


def _facts(prompt: Prompt) -> list[str] | None:
    facts = prompt.metadata.get("facts")
    if facts is None:
        return None
    if isinstance(facts, str) or not isinstance(facts, Sequence):
        raise ValueError(
            f"metadata['facts'] of prompt {prompt.key!r} is {facts!r}: it must be a list such as ['3', '7']. "
            "Correct the data set."
        )
    return [token for fact in facts for token in _tokens(str(fact))]


def _tokens(text: str) -> list[str]:
    """Numbers and words in lower case, number words as digits."""
    words: list[str] = _TOKEN.findall(text.lower())
    return [NUMBER_WORDS.get(word, word) for word in words]
