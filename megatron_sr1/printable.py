"""Text of others, of models, files and libraries, as a terminal may have it: nothing in it moves the cursor."""

from __future__ import annotations

import unicodedata

_KEPT = "\n\t"
_ESCAPED = ("Cc", "Cs", "Zl", "Zp")  # controls, halves of characters, line and paragraph separators
_REORDERS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    """The same with what a terminal would obey (escape sequences, carriage returns, changes of direction) spelled out,
    `\\x1b`; so is what no encoding has, of file names that are not UTF-8."""
    if text.isprintable():
        return text
    return "".join(_escaped(letter) for letter in text)


def one_printable_line(text: str) -> str:
    """The same without its line breaks."""
    return printable(" ".join(text.split()))


def _escaped(letter: str) -> str:
    if letter in _KEPT or (unicodedata.category(letter) not in _ESCAPED and letter not in _REORDERS):
        return letter
    return letter.encode("unicode_escape").decode("ascii")
