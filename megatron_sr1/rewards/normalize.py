r"""One spelling for an answer: LaTeX dressing off, symbols unified. No mathematics here.

`clean` keeps case and the spaces that separate two digits; callers decide what else to ignore.
"""

from __future__ import annotations

import re

_NEXT_LETTER = r"(?![A-Za-z])"

# Applied in this order. Every pattern is linear in the text.
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<!\\)\$([^$]*[^$\s\\])\$(?!\d)", r"\1"),  # $5$ cm, but not the prices in $5 or $7
        (r"\\\$", "$"),
        (r"\\%", "%"),
        (r"\\!", ""),
        (r"\{,\}", ","),
        (r"(?<=\d)\\,(?=\d{3})", ""),  # 1\,000
        (r"\\[,;:> ]|~|\\q?quad" + _NEXT_LETTER, " "),
        (r"\\(?:left|right|displaystyle|textstyle)" + _NEXT_LETTER, ""),
        (r"\\[dtc]frac" + _NEXT_LETTER, r"\\frac"),
        (r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox)\s?\{([^{}]*)\}", r" \1"),
        (r"\^\s?\\circ" + _NEXT_LETTER + r"|\^\s?\{\s?\\circ\s?\}|\\degree" + _NEXT_LETTER, "°"),
        ("[−–]", "-"),
        ("²", "^2"),
        ("³", "^3"),
        ("½", "1/2"),
        ("×", r"\\times "),
        ("[·∙]", r"\\cdot "),
        ("π", r"\\pi "),
        ("∞", r"\\infty "),
        ("≤", r"\\le "),
        ("≥", r"\\ge "),
        (r"√(\w)", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z])sqrt\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
        (r"\*\*", "^"),
        (r"\^\s?\{(\w)\}", r"^\1"),
        (r"(?<=[\d)}]),?\s?\band\s(?=[\d(\\-])", ", "),
        (r"\s+", " "),
    )
)
_DIGIT_FREE_SPACE = re.compile(r"(?<!\d) | (?!\d)")


def clean(text: str) -> str:
    """The answer without dollar signs, \\boxed, \\text, spacing commands, sizes, quotes, final periods."""
    text = _unwrap(text.strip())
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip().rstrip(". ").strip('"“”')


def squeeze(text: str) -> str:
    """Cleaned text without spaces, except between two digits: `1 1/2` must not become `11/2`."""
    return _DIGIT_FREE_SPACE.sub("", text)


def _unwrap(text: str) -> str:
    pairs = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), (r"\boxed{", "}"))
    for opening, closing in pairs:
        inner = text[len(opening) : len(text) - len(closing)]
        wrapped = text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing)
        if wrapped and opening not in inner and closing[0] * 2 not in inner and not inner.endswith("\\"):
            text = inner.strip()
    return text
