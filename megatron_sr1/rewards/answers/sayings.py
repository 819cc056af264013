"""Short answers that have several customary forms: `ℝ` and `all real numbers`, `Mon` and `Monday`, `1st` and `first`.

Only the whole answer is taken for such a form; inside a longer one the same letters may mean something else.
"""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_sr1.rewards.answers.rewrites import Rewrites

REALS = "all real numbers"
_GREEK = "alpha beta gamma delta epsilon zeta eta theta lambda mu rho sigma tau phi chi psi omega"
_FORMS = {
    form: meaning
    for meaning, forms in {
        REALS: "all reals|all real numbers|real numbers|set of all real numbers|set of real numbers|(-∞,∞)",
        "no solution": "no solution|no solutions|∅|⦃⦄|empty set|empty|null set",
        "does not exist": "dne|doesn't exist|does not exist|limit does not exist",
        "infinitely many": "infinite|infinitely many|infinitely many solutions|infinite solutions"
        "|infinite number of solutions",
        "United States": "usa|us|u.s.a|u.s|united states|united states of america",
        "United Kingdom": "uk|u.k|united kingdom",
        "television": "tv|television",
        **{
            side: f"{side}|on the {side}|to the {side}|at the {side}|{side} side|on the {side} side"
            for side in ("left", "right", "top", "bottom")
        },
        **{name: f"{letter}|{name}" for letter, name in zip("αβγδεζηθλμρστφχψω", _GREEK.split(), strict=True)},
        "ok": "okay|ok",
        "1 time": "once|1 time",
        "2 times": "twice|2 times",
        "3 times": "thrice|3 times",
        "12": "dozen",
        **{day: f"{day[:3]}|{day}" for day in ("monday", "wednesday", "friday", "saturday", "sunday")},
        "tuesday": "tue|tues|tuesday",
        "thursday": "thu|thur|thurs|thursday",
        **{
            month: f"{month[:3]}|{month}"
            for month in ("january", "february", "march", "april", "june", "july", "august", "october", "november")
        },
        "september": "sep|sept|september",
        "december": "dec|december",
    }.items()
    for form in forms.split("|")
}
_ORDINALS = (
    *("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh"),
    *("twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth"),
)
_TENS = {20: "twentieth", 30: "thirtieth"}
_ORDINAL = re.compile(
    r"(?:the )?([1-9]|[12]\d|3[01])(?:st|nd|rd|th)\b(?! of | (?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec))",
    re.IGNORECASE,
)
_WHOLE = Rewrites.of(
    (r"^(\d+),? ?(?:R|(?:with )?(?:a )?(?:remainder(?: of)?|rem\.?|(?<=\d )r)) ?(\d+)$", r"\1 R \2"),
    (r"^(\d+) (?:in|out of) (\d+)$", r"\1/\2"),
    (r"(?<=\d) ?N[ -]?m$", " N·m"),
    (r"^(?:#|No\. ?|Number |number )(?=\d+$)", ""),
    (r"^(?:[Ii]n )?(?:(?:[Tt]he )?[Yy]ear )?(?=[12]\d{3}$)", ""),
    (r"^Mt\.? (?=[A-Z])", "Mount "),
    (r"(?<=\d )BCE$", "BC"),
    (r"^AD (\d+)$", r"\1 AD"),
    (r"(?<=[a-z] )(?<!and )(?<!or )(?<!only )(II|III|IV|V|VI|VII|VIII|IX)$", lambda match: str(_ROMAN.index(match[1]))),
)
_ROMAN = ("", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX")
_SCALES = {"k": 10**3, "M": 10**6, "B": 10**9}
# 2.5k, $1.2M; 1.5M alone is a concentration
_SCALED = re.compile(r"([$€£¥]?)(\d{1,6}(?:\.\d{1,3})?)k|([$€£¥])(\d{1,6}(?:\.\d{1,3})?)([kMB])")


_MILLIONS = re.compile(r"(\d{1,6}(?:\.\d{1,6})?) ?([MB])")
_LARGE = re.compile(r"\d\s?(?:million|billion)\b|(?<![\d.])\d{1,3}(?:,\d{3}){2,}|(?<![\d.])\d{7,}")
_DEGREES = re.compile(r"([-+]?\d+(?:\.\d+)?) ?([CF])")
_OF_HEAT = re.compile(r"° ?[CF]\b|\bdegrees? (?:[CF]\b|centigrade)|celsius|fahrenheit", re.IGNORECASE)


def in_the_form_of(other: str, text: str) -> str:
    """What may mean several things, as what the other side speaks of; any other text as it is.

    `1.5M` is millions beside `1.5 million` or 1500000, else a concentration; `25 C` is a temperature beside one, else
    a charge; `T` is true beside `True`, else a name.
    """
    if (match := _MILLIONS.fullmatch(text)) and _LARGE.search(other):
        return str(Fraction(match[1]) * _SCALES[match[2]])
    if (match := _DEGREES.fullmatch(text)) and _OF_HEAT.search(other):
        return f"{match[1]} °{match[2]}"
    if text in ("T", "F") and other.lower() in ("true", "false"):
        return "True" if text == "T" else "False"
    return text


def ordinals_as_words(text: str) -> str:
    """`21st century` as `twenty-first century`, at the beginning."""
    match = _ORDINAL.match(text)
    if match is None:
        return text
    tens, ones = divmod(int(match[1]), 10)
    if tens < 2:
        word = _ORDINALS[10 * tens + ones - 1]
    else:
        word = f"{('twenty', 'thirty')[tens - 2]}-{_ORDINALS[ones - 1]}" if ones else _TENS[10 * tens]
    return word + text[match.end() :]


def customary(text: str) -> str:
    """An answer in one of several customary forms, in one of them; any other as it is."""
    form = text.lower().removeprefix("the ").replace(", ", ",")
    if form in _FORMS:
        return _FORMS[form]
    if match := _SCALED.fullmatch(text):
        number = Fraction(match[2] or match[4]) * _SCALES[match[5] or "k"]
        return f"{match[1] or match[3] or ''}{number}"
    return _WHOLE.apply(text)
