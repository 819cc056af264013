"""Words: the same without case, accents, spaces, hyphens, articles and number (`mitochondria` is `mitochondrion`)."""

from __future__ import annotations

import re
import unicodedata

_MATHEMATICS = re.compile(
    r"[=^\\/<>+*|±≤≥≠∈∪∩⦃⦄∥⊥≅≌∽∝→←↔⇒⇔⇌♂♀☑☐]|(?<![^\W\d_])-(?=\d)|^\d.*-\d|^\s?-"
    r"|(?<![^\W\d_]{2})-(?![^\W\d_]{3})|(?<![^\W\d_]{3})-(?![^\W\d_]{2})|(?<![^\W\d_]{2})!"
)
_MARKS = "\u064b-\u065f\u0900-\u0e4e\u3099\u309a"  # of Arabic, of India's scripts, Thai, kana: parts of a letter
_TOKEN = re.compile(rf"\d+(?:[.,:]\d+)+|(?:[^\W_]|[{_MARKS}])+")
_APOSTROPHE = re.compile(r"(?<=\w)['’](?=\w)|(?<=\b[^\W\d_])\.(?=[^\W\d_]\b|$|\s)")
_SURNAME_FIRST = re.compile(r"[A-Z][\w'-]{2,}, [A-Z][\w'-]{2,}")
_NAME = re.compile(r"[A-Z][\w'-]{2,} [A-Z][\w'-]{2,}")  # a list of two has its comma or `and` on both sides
_ACCENT = re.compile("(?<=[a-z])[\u0300-\u036f]+")  # of Latin letters; elsewhere a mark makes another letter
_SYMBOL = re.compile("[A-Z][A-Za-z]")
_PREFIXED = re.compile("[a-z][A-Z]")
_AMERICAN = re.compile("(?<=[a-z]{3})(?:is(?=(?:e|ed|es|ing|ation)$)|ys(?=(?:e|ed|ing)$))")  # organise, analyse
_NOT_PLURALS = frozenset(["news", "goods", "customs", "shorts", "means"])
_ARTICLES = ("the", "a", "an")
# The kind of thing that a name is of: it may stand on either side. Of the second, which are in no compound that is
# another thing (`Mexico City`, `sea lion`), it may also be left out.
_SIDE_NAMES = "lake ocean sea city state street bird tree fruit cell force energy"
_CLASS_NAMES = (
    "triangle angle river color shape mount mountain country animal team company family bond reaction process"
)
_SIDES, _CLASSES = frozenset(_SIDE_NAMES.split()), frozenset(_CLASS_NAMES.split())
_SPELLINGS = {
    "grey": "gray", "colour": "color", "centre": "center", "metre": "meter", "litre": "liter", "aluminium": "aluminum",
    "sulphur": "sulfur", "theatre": "theater", "favourite": "favorite", "behaviour": "behavior", "tyre": "tire",
    "neighbour": "neighbor", "harbour": "harbor", "aeroplane": "airplane", "fibre": "fiber",
}  # fmt: skip
_IRREGULAR = {
    "man": "men", "woman": "women", "child": "children", "person": "people", "mouse": "mice", "goose": "geese",
    "foot": "feet", "tooth": "teeth", "ox": "oxen", "louse": "lice", "die": "dice",
}  # fmt: skip
_ENDINGS = (  # singular, plural
    ("y", "ies"), ("f", "ves"), ("fe", "ves"), ("on", "a"), ("um", "a"), ("us", "i"), ("a", "ae"), ("ix", "ices"),
    ("ex", "ices"), ("sis", "ses"), ("xis", "xes"), ("o", "oes"), ("man", "men"),
)  # fmt: skip
_HISSING = ("s", "x", "z", "ch", "sh")


def same_words(answer: str, gold: str) -> bool:
    """Whether two cleaned texts are the same words; texts with mathematics in them are not words."""
    if _MATHEMATICS.search(answer) or _MATHEMATICS.search(gold):
        return False
    if all(map(_SYMBOL.fullmatch, (answer, gold))) and answer != gold and answer.lower() != "no":
        return False  # CO and Co
    if any(map(_PREFIXED.fullmatch, (answer, gold))) and answer != gold:
        return False  # mW and MW
    first, second = _tokens(answer), _tokens(gold)
    longest = max(map(len, first + second), default=0)
    if longest < 2 or not any(character.isalpha() for character in answer + gold):
        return False
    if first == second or (longest > 2 and "".join(first) == "".join(second)):
        return True
    if len(first) == 2 and first == second[::-1]:  # Lake Victoria, Victoria Lake; Obama, Barack
        comma = [bool(_SURNAME_FIRST.fullmatch(text)) for text in (answer, gold)]
        return bool((_CLASSES | _SIDES) & set(first)) or (any(comma) and any(map(_NAME.fullmatch, (answer, gold))))
    if len(first) == len(second):
        return all(map(same_word, first, second))
    longer, shorter = sorted((first, second), key=len, reverse=True)
    without = [token for token in longer if token not in _CLASSES]
    return bool(without) and len(without) == len(shorter) and all(map(same_word, without, shorter))


def same_word(first: str, second: str) -> bool:
    """Equal, or one is the plural of the other."""
    if _NOT_PLURALS & {first, second}:
        return first == second
    return first == second or second in _plurals(first) or first in _plurals(second)


def _plurals(word: str) -> frozenset[str]:
    if len(word) < 3 or not word.isalpha() or not word.isascii():
        return frozenset()
    if word.endswith("i") and word not in ("taxi", "kiwi", "ski", "bikini"):
        return frozenset()  # Paris is no plural
    regular = word + ("es" if word.endswith(_HISSING) else "s")
    plurals = {regular, _IRREGULAR.get(word, regular)}
    for singular, plural in _ENDINGS:
        if word.endswith(singular) and len(word) - len(singular) >= 2 and (len(word) >= 5 or plural[-1] in "se"):
            plurals.add(word.removesuffix(singular) + plural)
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        plurals.discard(regular)
    return frozenset(plurals)


def _tokens(text: str) -> list[str]:
    decomposed = unicodedata.normalize("NFD", _APOSTROPHE.sub("", text.casefold()).replace("&", " and "))
    plain = unicodedata.normalize("NFC", _ACCENT.sub("", decomposed))
    tokens: list[str] = _TOKEN.findall(plain)
    while len(tokens) > 1 and tokens[0] in _ARTICLES:
        tokens = tokens[1:]
    return [_AMERICAN.sub(_with_z, _SPELLINGS.get(token, token)) for token in tokens]


def _with_z(match: re.Match[str]) -> str:
    return f"{match[0][0]}z"
