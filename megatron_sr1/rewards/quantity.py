r"""Numbers with an optional unit, compared exactly: the fast path that most answers take.

A quantity is an optional sign and currency sign, then `7`, `1,234.5`, `.5`, `1.2e3`, `1.2\times10^{3}`, `3/4`,
`\frac{3}{4}`, `\frac34`, `1 3/4`, `1\frac{3}{4}` or a number word up to twenty, then an optional unit.

Units: known names are unified (`centimetres` = `cm`), never converted (`100 cm` is not `1 m`). A word of three or
more letters after a space also counts as a unit (`5 apples`). A one-letter unit needs its space: `5m` may be algebra.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_WORDS_TO_TWENTY = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen twenty
"""
NUMBER_WORDS = {word: str(value) for value, word in enumerate(_WORDS_TO_TWENTY.split())}

# A decimal that stands for a fraction: 0.333333 is 1/3, 0.333 is not.
FRACTION_TOLERANCE = Fraction(2, 10**6)  # relative

_UNIT_NAMES = """
mm millimeter millimetre | cm centimeter centimetre | m meter metre | km kilometer kilometre
in inch inches | ft foot feet | yd yard | mi mile
mg milligram | g gram | kg kilogram kgs | lb pound lbs | oz ounce
ms millisecond | s sec second secs | min minute mins | h hr hour hrs | day | week | month | yr year yrs
ml mL milliliter millilitre | l L liter litre | gal gallon
° degree deg | °c °C degreecelsius degreescelsius | °f °F degreefahrenheit degreesfahrenheit | rad radian
N newton | J joule | kJ | W watt | kW | V volt | A amp ampere | Ω ohm \\Omega | Hz hertz | Pa pascal | K kelvin
m/s metersps meterspersecond metrespersecond | km/h kmh kph kilometersperhour | mph milesperhour
mm^2 sqmm squaremillimeters | cm^2 sqcm squarecentimeters squarecentimetres | m^2 sqm squaremeters squaremetres
km^2 sqkm squarekilometers | in^2 squareinches | ft^2 sqft squarefeet | m/s^2
mm^3 | cm^3 cc cubiccentimeters | m^3 cubicmeters cubicmetres | in^3 cubicinches | ft^3 cubicfeet
$ dollar usd USD | € euro eur EUR | £ gbp GBP | ¥ yen yuan | cent | unit | square units^2 unit^2 squareunits
"""
_UNITS = {
    name: names[0]
    for names in (group.split() for group in re.split(r"[|\n]", _UNIT_NAMES) if group.strip())
    for name in names
}
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_NUMBER = rf"(?:{_INTEGER}(?:\.\d+)?|\.\d+)"
_EXPONENT = r"\^(?:\{\s?(?P<power_braced>[+-]?\d{1,3})\s?\}|(?P<power>[+-]?\d{1,3}))"
_PART = rf"(?:\{{\s?([+-]?{_NUMBER})\s?\}}|(\d))"
_FRACTION = re.compile(rf"(?:(?P<whole>\d+)(?:\s|(?=\\)))?(?:\\frac\s?{_PART}\s?{_PART}|({_NUMBER})\s?/\s?({_NUMBER}))")
_DECIMAL = re.compile(
    rf"(?P<number>{_NUMBER})(?:[eE](?P<e>[+-]?\d{{1,3}})(?![\dA-Za-z])|\s?(?:\\times|\\cdot|\*|x)\s?10{_EXPONENT})?"
)
_HEAD = re.compile(r"\s?([+-]?)\s?([$€£¥]?)\s?([+-]?)\s?")


@dataclass(frozen=True)
class Quantity:
    """`value` is the number as written: 50 for `50%`."""

    value: Fraction
    unit: str  # "" where none
    percent: bool
    decimal: bool  # written with a decimal point


def parse_quantity(text: str) -> Quantity | None:
    """Reads a cleaned answer that is one quantity and nothing else; None otherwise (also for a zero denominator)."""
    if text.lower() in NUMBER_WORDS:
        return Quantity(Fraction(NUMBER_WORDS[text.lower()]), "", percent=False, decimal=False)
    head = _HEAD.match(text)
    assert head is not None  # every part is optional
    before, currency, after = head.groups()
    if before and after:
        return None
    number = _read_number(text, head.end())
    if number is None:
        return None
    value, decimal, end = number
    tail = _read_unit(text[end:])
    if tail is None or (currency and tail[0]):
        return None
    unit, scale = tail
    value *= -scale if "-" in (before, after) else scale
    percent = unit == "%"
    return Quantity(value, currency or ("" if percent else unit), percent, decimal)


def same_quantity(answer: Quantity, gold: Quantity) -> bool:
    """Equality of value and unit; a unit only one side names is ignored.

    `50%` equals `1/2`. A bare `50` also equals a gold `50%`, but `50%` does not equal a gold `50`.
    """
    answer_unit, gold_unit = answer.unit or answer.percent * "%", gold.unit or gold.percent * "%"
    if answer_unit and gold_unit and answer_unit != gold_unit:
        return False
    if gold.percent and not answer.percent:
        return _same_value(answer, gold, Fraction(1)) or _same_value(answer, gold, Fraction(1, 100))
    if answer.percent and not gold.percent:
        return _same_value(answer, gold, Fraction(100))
    return _same_value(answer, gold, Fraction(1))


def split_unit(text: str) -> tuple[str, str]:
    r"""A cleaned expression and the known unit that ends it after a space: `4\sqrt{3} cm`; "" where none."""
    head, _, name = text.rpartition(" ")
    unit = _known_unit(name)
    return (head, unit) if unit is not None and any(c.isdigit() or c == "\\" for c in head) else (text, "")


def _same_value(answer: Quantity, gold: Quantity, gold_scale: Fraction) -> bool:
    value = gold.value * gold_scale
    if answer.value == value:
        return True
    is_fraction_with_decimal = answer.decimal != gold.decimal and not (_is_whole(answer) or _is_whole(gold))
    return is_fraction_with_decimal and abs(answer.value - value) <= FRACTION_TOLERANCE * abs(value)


def _is_whole(quantity: Quantity) -> bool:
    return quantity.value.denominator == 1


def _read_number(text: str, start: int) -> tuple[Fraction, bool, int] | None:
    """(value, written with a decimal point, end) of the unsigned number at `start`."""
    if match := _FRACTION.match(text, start):
        numerator, denominator = (part.replace(",", "") for part in match.groups()[1:] if part is not None)
        if Fraction(denominator) == 0:
            return None
        return int(match["whole"] or 0) + Fraction(numerator) / Fraction(denominator), False, match.end()
    if match := _DECIMAL.match(text, start):
        number = match["number"].replace(",", "")
        power = int(match["e"] or match["power_braced"] or match["power"] or 0)
        return Fraction(number) * Fraction(10) ** power, "." in number, match.end()
    return None


def _read_unit(text: str) -> tuple[str, int] | None:
    """(unit, factor the number is multiplied by), or None where the rest is not a unit."""
    words = text.split()
    scale = 1
    if words and words[0].lower() in _SCALES:
        scale = _SCALES[words.pop(0).lower()]
    name = "".join(words).replace("{", "").replace("}", "")
    if not name:
        return "", scale
    if name == "%" or name.lower() in ("percent", "percentage"):
        return "%", scale
    spaced = text[0] == " "
    known = _known_unit(name)
    if known is not None and (spaced or len(name) > 1 or not name.isalpha()):
        return known, scale
    if spaced and len(words) == 1 and len(name) >= 3 and name.isalpha():
        return name.lower().rstrip("s"), scale
    return None


def _known_unit(name: str) -> str | None:
    spellings = (name, name.lower(), name.removesuffix("s"), name.lower().removesuffix("s"))
    return next((_UNITS[spelling] for spelling in spellings if spelling in _UNITS), None)
