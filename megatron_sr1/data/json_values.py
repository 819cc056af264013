"""Values of a row as text and as JSON: one rule for every reader, so that what is written is always valid JSON."""

from __future__ import annotations

import datetime
import json
import math
from collections import Counter
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

_MAX_DIGITS = 20  # of a number that is written without an exponent


def load_json(data: bytes | str) -> Any:
    """What a JSON text holds; NaN and infinities, which JSON does not have but Python writes, are null.

    Raises:
        ValueError: it is no JSON, or an object has two values of one name.
    """
    try:
        return json.loads(data, parse_constant=lambda _: None, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no text in UTF-8 ({error.reason} at byte {error.start})") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it has two values of {name!r}")
    return made


def is_number(value: object) -> bool:
    """Of bool, which Python counts among the integers, no."""
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def is_missing(value: object) -> bool:
    """Null, and NaN, by which tables say the same."""
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def number_text(number: int | float | Decimal) -> str:
    """The shortest decimal text: 0.3, 3, 0.00001; a Decimal keeps its digits. "" where it is not finite."""
    if isinstance(number, int):
        return str(number)
    if not math.isfinite(number):
        return ""
    exact = number if isinstance(number, Decimal) else Decimal(repr(number)).normalize()
    return format(exact, "f") if exact and abs(exact.adjusted()) < _MAX_DIGITS else str(number if exact else 0)


def as_json(value: object) -> Any:
    """The value as JSON holds it: what is no finite number is null; decimals, dates and times are their text.

    Raises:
        TypeError: JSON has nothing like it.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Decimal():
            return number_text(value) or None
        case datetime.date() | datetime.time():
            return value.isoformat()
        case Mapping():
            return {str(name): as_json(inner) for name, inner in value.items()}
        case list() | tuple():
            return [as_json(inner) for inner in value]
    raise TypeError(f"a {type(value).__name__}, which JSON cannot")
