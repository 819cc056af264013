"""What is said around an answer: `The answer is`, `about`, `(approximately)`; bounds as signs; yes and no.

A word that changes the meaning (`not`, `more than`, `or`) is never taken away.
"""

from __future__ import annotations

import re

from megatron_sr1.rewards.answers.rewrites import Rewrites
from megatron_sr1.rewards.answers.spelling import strip_ends

_SO = r"(?:(?:so|therefore|thus|hence|then|finally|in total)\b,? )?"
_PICTURE = "(?:image|picture|photo|figure|diagram|chart|graph)"
_INTRODUCTIONS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        _SO + r"(?:the|my|our|this) (?:(?!(?:wrong|incorrect|false|not|never|least|except)\b)[a-z'-]+ ){1,6}?"
        r"(?:is|are|was|were|equals)\b:? ?",
        _SO + r"(?:(?:the|my) )?(?:(?:final|correct|right) )?answers?(?: is| are)?(?: ?[:=] ?| )",
        _SO + r"(?:there (?:is|are|was|were)|it (?:is|was|equals)|it's|they are|i (?:can )?(?:count|see|choose|pick)"
        r"|we (?:get|have|find))\b ?",
        r"(?:about|approximately|approx\.?|around|roughly|circa|exactly|equal to|(?:a )?total of)(?![a-z]) ?",
        rf"(?:the|this) {_PICTURE} (?:shows|contains|depicts|displays) (?!only\b)",
        r"(?:nearly|almost) (?=[\d$€£\\-])",
        r"[=≈~:] ?",
        r"(?:所以|因此|故|则)?,? ?(?:正确|最终)?的?(?:答案|结果|选项|答|解)(?:应该|应)?(?:是|为|选|[:=]| )+(?=.)",
        r"(?:所以|因此|故)?,? ?应?选择?项?:? ?(?=[(A-Z])",
        r"(?:等于|一共有?|共有?|大?约为?|有)(?=[\d(零一二两三四五六七八九十百千])",
    )
)
_ENDINGS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r" ?\((?:approximately|approx\.?|about|exactly|rounded[^()]*)\)$",
        rf" (?:is|are) (?:visible|shown|seen|pictured|depicted|displayed)(?: in the {_PICTURE})?$",
        r",? (?:approximately|in total|altogether|of (?:them|these|those)|左右)$",
        r"(?<=[\w)]) \((?!(?:or|and|wrong|incorrect|false|no|maybe)\b)"
        r"(?:not\b[^()]*|[^\W\d_][^()\d=<>]+)\)$",  # B (not A); Paris (France)
    )
)
_SUBJECT = re.compile("^" + _INTRODUCTIONS[0].pattern, re.IGNORECASE)
_GENERIC_WORDS = """
the my our this a an of is are was were equals so therefore thus hence then final correct right answer option choice
solution result value
"""
_GENERIC = frozenset(_GENERIC_WORDS.split())
_EQUALS = re.compile(r" (?:equals|is equal to) |(?<=^[A-Za-zΑ-ω]) is (?=[-\d])")
_BOUNDS = Rewrites.of(
    (r"^(?:at least|no less than|no fewer than|not less than|至少) ?(?=[\d$€£\\-])", "≥ "),
    (r"^(?:at most|no more than|not more than|up to|至多|不超过) ?(?=[\d$€£\\-])", "≤ "),
    (r"^(?:more than|greater than|larger than|over|above|大于|超过) ?(?=[\d$€£\\-])", "> "),
    (r"^(?:less than|fewer than|smaller than|under|below|小于|少于) ?(?=[\d$€£\\-])", "< "),
    (r"^(.*\d) or (?:more|greater|above)$", r"≥ \1"),
    (r"^(.*\d) or (?:less|fewer|below)$", r"≤ \1"),
    flags=re.IGNORECASE,
)
_POLARITY = {
    word: meaning
    for meaning, words in (
        ("yes", "yes yeah yep 是 是的"),
        ("no", "no nope 否 不是 不是的 不"),
        ("true", "true correct 对 对的 正确"),
        ("false", "false incorrect 错 错的 错误 不对 不正确"),
    )
    for word in words.split()
}
_DENIALS, _ASSENTS = {"no", "not", "false", "wrong", "incorrect", "never"}, {"yes", "true", "correct", "right"}
_OPPOSITES = {"yes": _DENIALS, "true": _DENIALS, "no": _ASSENTS, "false": _ASSENTS}
_VERDICT = re.compile(
    r"(?!no\. ?\d)(yes|no|true|false)(?: ?[,.;:!-]+ ?|,? (?=(?:it|there|they|he|she|this|that|the|we|i|you)\b))(\S.*)",
    re.IGNORECASE,
)


_REPEATED = re.compile(  # `Yes, it is`
    r"(?:it|they|he|she|there|this|that|these|those|we|i|you) "
    r"(?:is|are|was|were|does|do|did|has|have|can|will)(?: not)?",
    re.IGNORECASE,
)


def bare(text: str) -> str:
    """The answer without what is said around it; never empty unless the text is."""
    previous = None
    while text != previous:
        previous = text
        for pattern in _INTRODUCTIONS:
            match = pattern.match(text)
            if match is not None and match.end() < len(text):
                text = strip_ends(text[match.end() :])
        for pattern in _ENDINGS:
            text = pattern.sub("", text)
    text = _EQUALS.sub(" = ", text)
    text = _BOUNDS.apply(text)
    return text


def asides_differ(answer: str, gold: str) -> bool:
    """Whether what `bare` takes from both is what they differ in: `The left one is larger`, `Iron (III)`. The name of a
    number, `The area is 5`, is none of that."""
    for pattern, of_numbers in ((_SUBJECT, False), (_ENDINGS[-1], True)):
        found = [pattern.search(text) for text in (answer, gold)]
        if all(found) and (of_numbers or not any(any(map(str.isdigit, text)) for text in (answer, gold))):
            first, second = (set(re.findall(r"\w+", match[0].lower())) - _GENERIC for match in found if match)
            if first and second and first != second:
                return True
    return False


def polarity(text: str) -> tuple[str, str] | None:
    """(yes, no, true or false; what is said beside it); also at the head of a sentence that does not take it back. None
    otherwise."""
    if (word := text.lower()) in _POLARITY:
        return _POLARITY[word], ""
    match = _VERDICT.fullmatch(text)
    if match is None:
        return None
    said = _POLARITY[match[1].lower()]
    contradicted = _OPPOSITES[said] & set(re.findall(r"[a-z]+", match[2].lower()))
    if contradicted or re.search(r"\b(?:or|maybe)\b", match[2], re.IGNORECASE):
        return None
    return said, "" if _REPEATED.fullmatch(match[2]) else match[2]
