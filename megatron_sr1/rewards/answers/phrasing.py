"""What is said around an answer: `The answer is`, `about`, `(approximately)`; bounds as signs; yes and no.

A word that changes the meaning (`not`, `more than`, `or`) is never taken away.
"""

from __future__ import annotations

import re

from megatron_sr1.rewards.answers.rewrites import Rewrites
from megatron_sr1.rewards.answers.spelling import strip_ends

_SO = r"(?:(?:so|therefore|thus|hence|then|finally|in total)\b,? )?"
_INTRODUCTIONS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        _SO + r"(?:the|my|our|this) (?:[a-z'-]+ ){1,6}?(?:is|are|was|were|equals)\b:? ?",
        _SO + r"(?:(?:the|my) )?(?:(?:final|correct|right) )?answers?(?: is| are)?(?: ?[:=] ?| )",
        _SO + r"(?:there (?:is|are|was|were)|it (?:is|was|equals)|it's|they are|i (?:count|see|choose|pick)"
        r"|we (?:get|have|find))\b ?",
        r"(?:about|approximately|approx\.?|around|roughly|nearly|almost|circa|exactly|equal to|(?:a )?total of)"
        r"(?![a-z]) ?",
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
        r",? (?:approximately|in total|altogether|of (?:them|these|those)|左右)$",
        r"(?<=[\w)]) \((?!or\b|and\b)(?:not\b[^()]*|[^\W\d_][^()\d=<>]+)\)$",  # B (not A); Paris (France)
    )
)
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
_OPPOSITES = {
    "yes": {"no", "false"}, "true": {"no", "false"}, "no": {"yes", "true"}, "false": {"yes", "true"},
}  # fmt: skip
_VERDICT = re.compile(
    r"(yes|no|true|false)(?: ?[,.;:!-]+ ?|,? (?=(?:it|there|they|he|she|this|that|the|we|i|you)\b))(\S.*)",
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


def polarity(text: str) -> str | None:
    """yes, no, true or false, also at the head of a sentence that does not take it back; None otherwise."""
    if (word := text.lower()) in _POLARITY:
        return _POLARITY[word]
    match = _VERDICT.fullmatch(text)
    if match is None:
        return None
    said = _POLARITY[match[1].lower()]
    contradicted = _OPPOSITES[said] & set(re.findall(r"[a-z]+", match[2].lower()))
    return None if contradicted or re.search(r"\b(?:or|maybe)\b", match[2], re.IGNORECASE) else said
