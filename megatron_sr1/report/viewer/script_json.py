"""JSON that may stand in a script, in a script's file and in a data block of a page."""

from __future__ import annotations

import json
import math
from typing import Any

# what ends a script element, opens a comment in one, or ends a line of JavaScript before 2019
_ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
_TABLE = str.maketrans(_ESCAPED)


def script_json(value: Any) -> str:
    """The value as JSON, in ASCII. A float that is not finite is the text NaN, Infinity or -Infinity, as JSON has no
    number for it."""
    try:
        text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    except ValueError:
        text = json.dumps(_told(value), separators=(",", ":"), allow_nan=False)
    return text.translate(_TABLE)


def _told(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _told(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_told(each) for each in value]
    return value
