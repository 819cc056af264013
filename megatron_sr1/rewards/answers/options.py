"""Option letters: `B`, `(b)`, `Option B`, `(B) Paris`, `A and C`, `A、C`, `AC`, `I and III only`.

A letter decides where one side is bare and the other names that one option; where both carry text, the texts must agree
as well. `A. True B. False` names two options. In a sample without choices `AB` beside `BA` is a name (a line, a vector)
and `A/B` a fraction; with choices they are sets of options.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from megatron_sr1.rewards.answers.quantity import read_quantity

Options = Mapping[str, str]  # letter or numeral in lower case -> its text, "" where bare

_CALLED = re.compile(r"(?:(?:both|only|options?|choices?|answers?|letters?|statements?) |选项?)+(?=[(\[A-Za-z])", re.I)
_ONLY = re.compile(r"(?: only| alone| are correct| is correct|选项)$", re.IGNORECASE)
_BARE = re.compile(r"[(\[{]?\s?([A-Za-z])\s?[)\]}]?\s?[.:)]?")
_NUMERAL = r"(?:I{1,3}|IV|VI{0,3}|IX|X)"
_MEMBER = rf"(?:[A-Z]|{_NUMERAL}|\([A-Za-z]\)|\({_NUMERAL}\))\.?"
_SEPARATOR = r"(?:\s?[,;/&+、|·]\s?(?:and\s)?|\s(?:and|plus)\s|\s?[和与及]\s?|\s|(?<=\))(?=\())"
_ASIDE = re.compile(r"[(\[]?([A-Za-z])[)\]]?[.:]? ?[(\[](.+)[)\]]")
_BEHIND = re.compile(r"(.+?) ?[(\[]([A-Z])[)\]]")
_SEVERAL = re.compile(rf"[⦃\[(]?\s?{_MEMBER}(?:{_SEPARATOR}{_MEMBER})+\s?[⦄\])]?")
_GLUED = re.compile(r"[A-H]{2,8}")
_FRACTION = re.compile(r"[A-Z]\s?/\s?[A-Z]")
_MARKER = re.compile(
    r"(?:^|(?<=[\s,;]))(?:\(([A-Ja-j])\)\s|\(([A-J])\)|([A-J])[.:)]\s?|([a-j])\)\s|([A-J])\s-\s)(?=[^\s=+*/^])"
)


def read_options(text: str) -> Options | None:
    """The options that a cleaned text names; None where it names none."""
    text = _ONLY.sub("", _CALLED.sub("", text))
    if match := _BARE.fullmatch(text):
        return {match[1].lower(): ""}
    if _SEVERAL.fullmatch(text):
        return {member.lower(): "" for member in re.findall(r"[A-Za-z]+", re.sub(r"\band\b|\bplus\b", " ", text))}
    if _GLUED.fullmatch(text) and len(set(text)) == len(text):
        return {letter.lower(): "" for letter in text}
    return _read_with_text(text)


def _read_with_text(text: str) -> Options | None:
    markers = list(_MARKER.finditer(text))
    if not markers or markers[0].start() != 0:
        return None
    ends = [marker.start() for marker in markers[1:]] + [len(text)]
    read = {
        next(group for group in marker.groups() if group).lower(): text[marker.end() : end].strip(" ,;")
        for marker, end in zip(markers, ends, strict=True)
    }
    joined = any(re.match(r"(?:or|and)\b", said) for said in read.values())
    return read if len(read) == len(markers) and not joined else None


def is_glued(text: str) -> bool:
    """`AC`: several options, or a word, or a line between two points; letters in order speak for options."""
    return _GLUED.fullmatch(text) is not None


def same_options(answer: str, gold: str, same: Callable[[str, str], bool], has_choices: bool) -> bool | None:
    """Whether both name the same options; None where letters do not decide. `same` compares their texts."""
    if not has_choices and any(map(_FRACTION.fullmatch, (answer, gold))):
        return None
    first, second = read_options(answer), read_options(gold)
    if first is None or second is None:
        read, other = (first, gold) if first is not None else (second, answer)
        text = "" if read is None or len(read) > 1 else next(iter(read.values()))
        return True if text and same(text, other) else None
    if first.keys() != second.keys():
        return False
    if is_glued(answer) and is_glued(gold) and not has_choices:
        return answer == gold
    bare = not any(first.values()), not any(second.values())
    return (
        all(bare)
        or (any(bare) and len(first) == 1)
        or all(same(text, second[letter]) for letter, text in first.items())
    )


def with_own_text(text: str, choices: Sequence[str]) -> str:
    """`A (dog)` and `dog (A)` as `(A) dog`, where `dog` is one of the choices: it says of itself what A is."""
    known = {choice.strip().casefold() for choice in choices}
    for match, letter, own in ((_ASIDE.fullmatch(text), 1, 2), (_BEHIND.fullmatch(text), 2, 1)):
        if match is not None and match[own].strip().casefold() in known:
            return f"({match[letter]}) {match[own]}"
    return text


def numbered(text: str, choices: tuple[str, ...], same: Callable[[str, str], bool]) -> int | None:
    """Which of the sample's choices is meant: by its letter (with its own text or none), or by its text alone.

    None where that is none of them, or not one alone; -1 where the letter is one's and the text another's, or another
    number.
    """
    read = read_options(text)
    exact = [index for index, choice in enumerate(choices) if choice == text]
    texts = exact or [index for index, choice in enumerate(choices) if same(text, choice)]
    if read is None or is_glued(text) or len(read) > 1:
        return texts[0] if len(texts) == 1 else None
    ((letter, said),) = read.items()
    index = ord(letter[0]) - ord("a") if len(letter) == 1 else len(choices)
    if index < len(choices) and (not said or same(said, choices[index])):
        return index
    if index < len(choices) and not exact and (texts or (read_quantity(said) and read_quantity(choices[index]))):
        return -1
    return texts[0] if len(texts) == 1 else None
