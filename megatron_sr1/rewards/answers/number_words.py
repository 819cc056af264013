"""Numbers in English and Chinese words, as digits: `twenty-one chairs` is `21 chairs`, `三分之二` is `2/3`."""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_sr1.rewards.answers.rewrites import Rewrites

_ONES = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen
"""
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SMALL = {word: value for value, word in enumerate(_ONES.split())} | {word: 20 + 10 * i for i, word in enumerate(_TENS)}
_LARGE = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {
    "half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8,
    "ninth": 9, "tenth": 10,
}  # fmt: skip
SCALES = _LARGE | {"dozen": 12}
NUMBER_WORDS = {word: str(value) for word, value in _SMALL.items()}

_ANY = "|".join((*_SMALL, *_LARGE))
_RUN = re.compile(
    rf"\b(?:{'|'.join(_SMALL)}|an?(?=[ -](?:{'|'.join(_LARGE)})))\b(?:[\s-]+(?:and[\s-]+)?(?:{_ANY})\b)*", re.IGNORECASE
)
_SIMPLE = Rewrites.of(
    (r"\ba dozen\b", "12"),
    (r"\b(?:negative|minus) (?=\d)", "-"),
    (r"(?<=\d) point (\d+)\b", r".\1"),
    (r"(?<=\d) and (?:a|1)[ -]half\b", " 1/2"),
    (r"(?<=\d) and (?:a|1)[ -]quarter\b", " 1/4"),
    (r"^(?:a )?half$|^一半$", "1/2"),
    (r"(?-i:^(\S+) \(\1\)$)", r"\1"),  # six (6)
    flags=re.IGNORECASE,
)
_PART = re.compile(rf"\b(\d+|an?)[ -]({'|'.join(_PARTS)})s?\b(?! past| to)", re.IGNORECASE)

_DIGITS = {character: value for value, character in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_PLACES = {"十": 10, "百": 100, "千": 1000}
_MYRIADS = {"万": 10**4, "亿": 10**8}
_CHINESE = r"[零〇一二两三四五六七八九十百千万亿]{1,24}"
_CHINESE_AT_START = re.compile(
    rf"(负?)({_CHINESE}(?:点{_CHINESE})?)(?=$|[^\w]|[个只人本支条张辆棵次块岁名位件页头朵元米克秒分时天年月度升倍种座匹双层斤吨小厘公千平立])"
)
_CHINESE_PART = re.compile(rf"({_CHINESE}|\d+)分之({_CHINESE}|\d+)")
_MYRIAD_SCALE = re.compile(r"(\d+(?:\.\d+)?)\s?([万亿])")


def spell_digits(text: str) -> str:
    """The text with number words as digits; other words stay."""
    text = _RUN.sub(_english, text)
    text = _SIMPLE.apply(text)
    text = _PART.sub(_english_part, text)
    text = _CHINESE_PART.sub(_chinese_part, text)
    if match := _CHINESE_AT_START.match(text):
        text = ("-" if match[1] else "") + _chinese(match[2]) + text[match.end() :]
    return _MYRIAD_SCALE.sub(lambda m: str(_whole(Fraction(m[1]) * _MYRIADS[m[2]])), text)


def _english(match: re.Match[str]) -> str:
    total, group = 0, 0
    previous = ""
    for word in re.split(r"[\s-]+", match[0].lower()):
        if word == "and":
            continue
        if word in _LARGE and word != "hundred":
            total, group = total + max(group, 1) * _LARGE[word], 0
        elif word == "hundred":
            group = max(group, 1) * 100
        elif word in _SMALL:
            follows_tens = previous in _TENS and 0 < _SMALL[word] < 10
            if previous in _SMALL and not follows_tens:
                return match[0]  # a row of numbers, such as a telephone number
            group += _SMALL[word]
        previous = word
    return str(total + group)


def _english_part(match: re.Match[str]) -> str:
    number = "1" if match[1].lower() in ("a", "an") else match[1]
    return f"{number}/{_PARTS[match[2].lower()]}"


def _chinese_part(match: re.Match[str]) -> str:
    bottom, top = (part if part.isdigit() else _chinese(part) for part in match.groups())
    return f"{top}%" if bottom == "100" else f"{top}/{bottom}"


def _chinese(text: str) -> str:
    whole, _, decimals = text.partition("点")
    if decimals:
        return f"{_chinese(whole)}.{''.join(str(_DIGITS[character]) for character in decimals if character in _DIGITS)}"
    if len(whole) > 1 and all(character in _DIGITS for character in whole):
        return "".join(str(_DIGITS[character]) for character in whole)
    total = group = digit = 0
    for character in whole:
        if character in _DIGITS:
            digit = _DIGITS[character]
        elif character in _PLACES:
            group, digit = group + (digit or 1) * _PLACES[character], 0
        else:
            total, group, digit = (total + (group + digit or 1)) * _MYRIADS[character], 0, 0
    return str(total + group + digit)


def _whole(value: Fraction) -> int | str:
    return value.numerator if value.denominator == 1 else str(float(value))
