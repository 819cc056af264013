r"""Units of measurement, by pint: names, prefixes and exact factors; and what pint does not know.

`kg·m/s^2`, `g cm^{-3}`, `meters per second squared`, `square feet`, `平方厘米`. All after the first `/` is divided by,
as in `J/kg·K`. An angle is a dimension of its own (rad/s is not Hz), with the factor of π kept apart, so that 180° is
exactly π rad. Currencies and counted nouns (`5 apples`) are units that are never converted.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron_sr1.rewards.answers.rewrites import Rewrites
from megatron_sr1.rewards.answers.unit_names import (
    ANGLES,
    CURRENCIES,
    NO_NOUN,
    ONE_LETTER,
    OWN,
    PREFIXED,
    SMALL_CHANGE,
    SPELLINGS,
)

MAX_CHARACTERS = 60
_MAX_POWER = 12
_REWRITES = Rewrites.of(
    (r"(?:°|\b[Dd]egrees?\b|\bdeg\b)\s?(?:[Cc]elsius|[Cc]entigrade|C\b)", "degC"),
    (r"(?:°|\b[Dd]egrees?\b|\bdeg\b)\s?(?:[Ff]ahrenheit|F\b)", "degF"),
    (r"\b[Cc]elsius\b", "degC"),
    (r"\b[Ff]ahrenheit\b", "degF"),
    (r"(?<=[\dA-Za-zμ])\s?Ω|(?<=\b[kMGm])[- ]?[Oo]hm", "Ω"),
    (r"μ\s", "μ"),
    (r"^-(?=[A-Za-z])", ""),
    (r"(?<=[a-z]{3})-(?=[a-z]{3})", "·"),
    (r"\b([Ss]quare|[Ss]q\.?|[Cc]ubic|[Cc]u\.?)\s(\w+)", lambda m: f"{m[2]}^{_power_word(m[1])}"),
    (r"(平方|立方)([^\W/]+)", lambda m: f"{m[2]}^{_power_word(m[1])}"),
    (r"\b(\w+) (squared|cubed)\b", lambda m: f"{m[1]}^{_power_word(m[2])}"),
    (r"\bper\b|每", "/"),
    (r"\*|×|⋅", "·"),
    (r"(?<=[A-Za-z])\.(?=[A-Za-z])", "·"),
    (r"\blight[ ·-]years?\b", "light_year"),
)
_TOKEN = re.compile(
    r"\s*(?:(?P<name>US\$|[AC]\$|[A-Za-zμΩÅ°一-鿿][A-Za-z_μΩ°一-鿿]*\.?|['\"$€£¥₹₩¢%])(?P<power>\^?\{?(?P<exponent>[+-]?\d{1,2})\}?|)|(?P<sign>[/·()]))"
)
_NOUN = re.compile(r"[a-z][a-z'-]{2,}(?: [a-z'-]+){0,4}|\S?[一-鿿]{1,6}", re.IGNORECASE)
_NO_CHINESE_NOUN = re.compile(r"以|多$|点|或|到|不|余")


@dataclass(frozen=True)
class Unit:
    """What one of it is: `scale` * π^`pi_power` of its dimensions, above `offset` (temperatures, in kelvin).

    A counted noun has `noun` and no dimensions.
    """

    dimensions: tuple[tuple[str, Fraction], ...]
    scale: Fraction = Fraction(1)
    pi_power: int = 0
    offset: Fraction = Fraction(0)
    noun: str = ""


@functools.lru_cache(maxsize=4096)
def read_unit(text: str) -> tuple[Unit, ...]:
    """The readings of a cleaned unit, without its number: `pounds` are of mass or of money. () where it is none."""
    text = text.strip().strip("()").strip() if text.strip().startswith("(") else text.strip().removeprefix("US ")
    if not text or len(text) > MAX_CHARACTERS:
        return ()
    money = tuple(_currencies(text))
    measure = _measure(text)
    return (*money, *([measure] if measure is not None else ()))


def read_noun(text: str) -> Unit | None:
    """What is counted: `apples`, `red balls`, `个苹果`; None where the words say something else (`pm`, `or more`)."""
    text = text.strip()
    words = text.lower().split()
    if not _NOUN.fullmatch(text) or NO_NOUN & set(words) or _NO_CHINESE_NOUN.search(text):
        return None
    return Unit((), noun=text.lower())


def product(first: Unit, second: Unit) -> Unit:
    """Dollars and `per hour`."""
    dimensions: dict[str, Fraction] = {}
    for name, power in first.dimensions + second.dimensions:
        dimensions[name] = dimensions.get(name, Fraction(0)) + power
    kept = tuple(sorted((name, power) for name, power in dimensions.items() if power))
    return Unit(kept, first.scale * second.scale, first.pi_power + second.pi_power)


def _currencies(text: str) -> Iterator[Unit]:
    for code, names in CURRENCIES.items():
        if text in names.split() or text.lower() in names.split():
            yield Unit(((code, Fraction(1)),))
    for code, names in SMALL_CHANGE.items():
        if text in names.split():
            yield Unit(((code, Fraction(1)),), Fraction(1, 100))
    if text in ("角", "毛"):
        yield Unit((("CNY", Fraction(1)),), Fraction(1, 10))


def _measure(text: str) -> Unit | None:
    if (degrees := _temperature(text)) is not None:
        return degrees
    text = _REWRITES.apply(text)
    if (degrees := _temperature(text)) is not None:
        return degrees
    factors = _factors(text)
    if factors is None:
        return None
    result = Unit(())
    for name, power in factors:
        unit = _named(name)
        if unit is None:
            return None
        powers = tuple((dimension, exponent * power) for dimension, exponent in unit.dimensions)
        result = product(result, Unit(powers, unit.scale**power, unit.pi_power * power))
    return result


def _factors(text: str) -> list[tuple[str, int]] | None:
    """The names and their powers; None where the text is no product of names."""
    factors, position, below = list[tuple[str, int]](), 0, False
    while position < len(text.rstrip()):
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        position = match.end()
        if match["sign"]:
            below |= match["sign"] == "/"
            continue
        power = int(match["exponent"] or 1)
        if abs(power) > _MAX_POWER:
            return None
        factors.append((match["name"], -power if below else power))
    return factors or None


def _temperature(text: str) -> Unit | None:
    kelvin = (("[temperature]", Fraction(1)),)
    if text in ("degC", "摄氏度", "°C"):
        return Unit(kelvin, offset=Fraction(27315, 100))
    if text in ("degF", "华氏度", "°F"):
        return Unit(kelvin, Fraction(5, 9), offset=Fraction(45967, 100) * Fraction(5, 9))
    return None


@functools.lru_cache(maxsize=4096)
def _named(name: str) -> Unit | None:
    spellings = (name, name.lower(), name.removesuffix("s"), name.lower().removesuffix("s"))
    spelled = next((SPELLINGS[spelling] for spelling in spellings if spelling in SPELLINGS), name)
    if spelled != name:
        return _measure(spelled)
    name = name.removesuffix(".")
    if name in ("acre", "acres"):  # pint has the survey acre
        return Unit((("[length]", Fraction(2)),), 43560 * Fraction(3048, 10000) ** 2)
    if name in OWN:
        return Unit(((name.removesuffix("s"), Fraction(1)),))
    if (len(name) == 1 and name not in ONE_LETTER) or not name.replace("_", "").isalpha():
        return None
    for spelling in spellings:
        if len(spelling) > 1 or spelling == name:
            parsed = _registry().parse_unit_name(spelling)
            if parsed and (not parsed[0][0] or _takes_prefix(spelling, parsed[0][0])):
                return _from_pint(parsed[0][0], parsed[0][1])
    return None


def _takes_prefix(spelling: str, prefix: str) -> bool:
    return spelling.startswith(prefix) or spelling[1:] in PREFIXED or spelling in ("dam", "dag", "daL")


def _from_pint(prefix: str, name: str) -> Unit:
    registry = _registry()
    if name in ANGLES:
        factor, pi_power = ANGLES[name]
        return Unit((("angle", Fraction(1)),), factor * _scale(prefix + name) / _scale(name), pi_power)
    dimensions = tuple(registry.get_dimensionality(prefix + name).items())
    if not dimensions:  # byte, decibel, ppm
        return Unit(((name, Fraction(1)),), _scale(prefix + name) / _scale(name))
    return Unit(tuple((dimension, Fraction(power)) for dimension, power in dimensions), _scale(prefix + name))


def _scale(name: str) -> Fraction:
    factor, _ = _registry().get_root_units(name, check_nonmult=False)
    return Fraction(factor)


@functools.cache
def _registry() -> Any:
    import pint  # only here: it reads its table for about a second, and many answers have no unit

    exact: Any = Fraction  # pint's own annotation wants a float
    return pint.UnitRegistry(non_int_type=exact)


def _power_word(word: str) -> int:
    return 3 if word.lower().startswith("cu") or word == "立方" else 2
