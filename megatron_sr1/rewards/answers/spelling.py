r"""One spelling for an answer: dressing off, symbols unified. No meaning is read here.

LaTeX commands of symbols become the symbols (`\le` is `≤`, `\pi` is `π`, `^\circ` is `°`); `\frac`, `\sqrt` and the
functions stay. Full-width characters become plain, accents are composed (NFKC). Case stays. Set braces `\{ \}` become
`⦃ ⦄`, so that they differ from those that only group.
"""

from __future__ import annotations

import re
import unicodedata

from megatron_sr1.rewards.answers.rewrites import Rewrites
from megatron_sr1.rewards.answers.sayings import REALS

_WORD_END = r"(?![A-Za-z])"
_GREEK_NAMES = """
alpha α beta β gamma γ delta δ epsilon ε varepsilon ε zeta ζ eta η theta θ vartheta θ kappa κ lambda λ mu μ nu ν xi ξ
pi π rho ρ sigma σ tau τ phi φ varphi φ chi χ psi ψ omega ω Gamma Γ Delta Δ Theta Θ Lambda Λ Sigma Σ Phi Φ Psi Ψ Omega Ω
"""
_GREEK = dict(zip(_GREEK_NAMES.split()[::2], _GREEK_NAMES.split()[1::2], strict=True))
_SYMBOLS = _GREEK | {
    "times": "×", "cdot": "·", "div": "÷", "pm": "±", "mp": "±", "le": "≤", "leq": "≤", "leqslant": "≤", "ge": "≥",
    "geq": "≥", "geqslant": "≥", "ne": "≠", "neq": "≠", "lt": "<", "gt": ">", "infty": "∞", "cup": "∪", "in": "∈",
    "emptyset": "∅", "varnothing": "∅", "angle": "∠", "triangle": "△", "approx": "≈", "sim": "~", "degree": "°",
    "celsius": "°C", "lvert": "|", "rvert": "|", "vert": "|", "langle": "⟨", "rangle": "⟩", "euro": "€",
    "pounds": "£", "quad": " ", "qquad": " ", "newline": " ", "left": "", "right": "", "big": "", "Big": "", "bigl": "",
    "bigr": "", "displaystyle": "", "textstyle": "", "limits": "", "large": "", "Large": "", "huge": "", "small": "",
    "parallel": "∥", "perp": "⊥", "cong": "≅", "rightarrow": "→", "longrightarrow": "→", "to": "→",
    "rightleftharpoons": "⇌", "therefore": "", "dfrac": r"\frac", "tfrac": r"\frac",
    "cfrac": r"\frac", "arcsin": r"\asin", "arccos": r"\acos", "arctan": r"\atan",
}  # fmt: skip
_WRAPPERS = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|emph|underline|mbox|fbox|mathrm|mathbf|mathit|mathsf"
    r"|mathbb|boldsymbol|bm|operatorname|vec|overrightarrow|ce)\s?\{|\\overline\s?(?=\{\s?[A-Z]\s?[A-Z]\s?\})\{"
)
_BEFORE_NFKC = str.maketrans(
    {
        "ℝ": REALS,
        "⟂": "⊥",
        "º": "°",
        "′": "'",
        "″": '"',
        "∶": ":",
        "⋅": "·",
        "∙": "·",
        "•": "·",
        "…": "...",
        "【": "[",
        "】": "]",
    }
    | dict.fromkeys("\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff", "")  # have no width
)
_UNIFY = str.maketrans(
    dict.fromkeys("−–—‐‑‒―", "-") | dict.fromkeys("“”„«»「」『』《》", '"') | dict.fromkeys("‘’‚‛", "'") | {"∕": "/"}
)
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_VULGAR_FRACTION = re.compile("[¼½¾⅐-⅞]")
_REPEATING = re.compile(r"(\d{1,9})\.(\d{0,9})\\(?:overline|dot|bar)\s?\{(\d{1,9})\}")
_RECURRING = re.compile(r"(\d{1,9})\.(\d{0,8}?)(\d)\3{2,}\s?\.\.\.")
_COMMAND = re.compile(r"\\([A-Za-z]+)\s?")
_REWRITES = Rewrites.of(
    (r"^<answer>|</answer>$|^####\s|<\|(?:im_end|endoftext)\|>$", ""),
    (r"\\mathbb\s?(?:\{\s?R\s?\}|R)$", REALS),
    (r"```(?:\w+\n)?|`", ""),
    (r"(?<![\w*)])(\*{1,3})(?=[^\s*])([^*]+)\1(?![\w*(])", r"\2"),
    (r"(?<!\w)__(?=[^\s_])([^_]+)__(?!\w)|^_([^_]+)_$", r"\1\2"),
    (r"(?<![\w)])([\"'])([^\"']+)\1(?!\w)", r"\2"),
    (r"\\[(\[]|\\[)\]]|\$\$", ""),
    (r"(?<!\\)\$([^$]*[^$\s\\])\$(?!\d)", r"\1"),  # $5$ cm, but not the prices in $5 or $7
    (r"\\([$%&#])", r"\1"),
    (r"\\_", "_"),
    (r"(?<=\d)(?:\\,|\{,\})(?=\d{3})", ","),  # 1\,000
    (r"\\\\", ";"),  # the rows of a matrix
    (r"\\\{", "⦃"),
    (r"\\\}", "⦄"),
    (r"\\!", ""),
    (r"\\[,;:> ]|~(?=[\\a-zA-Z])", " "),
    (r"\\(?:text)?color\s?\{[^{}]*\}", ""),
    (r"\\(?:begin|end)\s?\{[bpvB]?matrix\}", " ∥ "),
    (r"\^\s?(?:\\circ" + _WORD_END + r"|\{\s?\\circ\s?\}|\{\s?°\s?\}|°|(?:o|\{o\})(?!\w))", "°"),
)
_LAST_REWRITES = Rewrites.of(
    (r"^<answer>|</answer>$|^####\s|<\|(?:im_end|endoftext)\|>$", ""),
    (r"\*\*", "^"),
    (r"->|⟶", "→"),
    (r"(?<=[A-Z])\s?//\s?(?=[A-Z])", "∥"),
    (r"_\{(\w)\}", r"_\1"),
    (r"(?<=^[A-Za-z])\s?≈\s?", "="),
    (r"(?<=\d0)'s\b", "s"),
    (r">=|=>", "≥"),
    (r"<=|=<", "≤"),
    (r"!=", "≠"),
    (r"\+/-", "±"),
    (r"√\s?(\d+(?:\.\d+)?|\w)", r"\\sqrt{\1}"),
    (r"√\s?\(", r"\\sqrt("),
    (r"(?<![\\A-Za-z])sqrt(?=[({ ])", r"\\sqrt"),
    (r"(?<![\\A-Za-z])pi(?![A-Za-z])", "π"),
    (r"(?<![A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])", "∞"),
    (r"\+\s?∞", "∞"),
    (r"(?<=\d)\s?[xX]\s?(?=10\s?\^)", "×"),
    (r"\s+", " "),
)
_FACTORIAL_FREE = re.compile(r"(?<=[^\W\d_]{2})!+$|[\s.,;:?。、]+$")
_DIGIT_FREE_SPACE = re.compile(r"(?<!\d) | (?!\d)")


def clean(text: str) -> str:
    """The answer in the one spelling; "" where nothing but dressing was there."""
    text = _VULGAR_FRACTION.sub(_spell_fraction, _SUPERSCRIPT.sub(_spell_power, text.translate(_BEFORE_NFKC)))
    text = _RECURRING.sub(r"\1.\2\\overline{\3}", text)
    text = _REPEATING.sub(_repeating_fraction, text)
    text = unicodedata.normalize("NFKC", text).replace("⁄", "/").translate(_UNIFY).strip()
    if text.count(r"\boxed") == 1:
        text = _without_wrapper(text, re.compile(r"\\boxed\s?\{"))
    text = _REWRITES.apply(text)
    text = _without_wrapper(text, _WRAPPERS)
    text = _COMMAND.sub(_symbol, text)
    text = _LAST_REWRITES.apply(text)
    return strip_ends(text)


def strip_ends(text: str) -> str:
    """Without final punctuation, and without quotes or grouping braces around the whole."""
    previous = None
    while text != previous:
        previous = text
        text = _FACTORIAL_FREE.sub("", text.strip())
        for opening, closing in ('""', "''", "{}"):
            inner = text[1:-1].strip()
            if inner and text[0] == opening and text[-1] == closing and not {opening, closing} & set(inner):
                text = f"⦃{inner}⦄" if opening == "{" and "," in inner else inner
    return "⦃⦄" if text in ("{}", "{ }") else text


def squeeze(text: str) -> str:
    """Cleaned text without spaces, except between two digits: `1 1/2` must not become `11/2`."""
    return _DIGIT_FREE_SPACE.sub("", text)


def matching_bracket(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`, of whatever kinds; -1 where it stays open."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] in "([{⦃⟨") - (text[index] in ")]}⦄⟩")
        if depth == 0:
            return index
    return -1


def _without_wrapper(text: str, command: re.Pattern[str]) -> str:
    r"""`\text{ab}` is ` ab`: what stands before it is no part of the word."""
    search_from = 0
    while match := command.search(text, search_from):
        end = matching_bracket(text, match.end() - 1)
        if end < 0:
            search_from = match.end()
            continue
        before = "" if text[: match.start()].endswith("_") else " "
        inner = text[match.end() : end]
        text = text[: match.start()] + (f"{{{inner}}}" if not before else before + inner) + text[end + 1 :]
        search_from = match.start()
    return text


def _symbol(match: re.Match[str]) -> str:
    return _SYMBOLS.get(match[1], match[0])


def _repeating_fraction(match: re.Match[str]) -> str:
    """0.1666... as 15/90: all digits less those that do not repeat, over as many nines and zeros."""
    whole, once, again = match.groups()
    top = int(whole + once + again) - int(whole + once)
    return f"{top}/{10 ** len(once) * (10 ** len(again) - 1)}"


def _spell_power(match: re.Match[str]) -> str:
    return "^{" + unicodedata.normalize("NFKC", match[0]).translate(_UNIFY) + "}"


def _spell_fraction(match: re.Match[str]) -> str:
    return " " + unicodedata.normalize("NFKC", match[0]).replace("⁄", "/") + " "
