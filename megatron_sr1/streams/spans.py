"""Segments of a user's own: the spans of a response that a function finds."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

from megatron_sr1.import_path import UserCode, load_object, source_of
from megatron_sr1.prompts import Span
from megatron_sr1.rewards import RewardError
from megatron_sr1.types import Prompt

_WANTED = "a segment is a function of (text, prompt) that returns a list of (start, end), characters of the text"


def find_spans(path: str) -> Callable[[str, Prompt], Sequence[Span]]:
    """The function at an import path.

    Raises:
        ValueError: there is none that takes two arguments.
    """
    found: Any = load_object(path, "a segment")
    function: Callable[[str, Prompt], Sequence[Span]] = found
    if isinstance(found, type) or not callable(found):
        raise ValueError(f"tokens={path!r} is {found!r}: {_WANTED}.")
    try:
        inspect.signature(function).bind("", None)
    except (TypeError, ValueError) as error:
        raise ValueError(f"tokens={path!r}: {error}. {_WANTED[0].upper()}{_WANTED[1:]}.") from error
    return function


def own_spans(path: str, text: str, prompt: Prompt) -> tuple[Span, ...]:
    """What the function at an import path finds in a response.

    Raises:
        RewardError: it failed, or gave something else than spans of the text; the message names the sample.
    """
    function, what = find_spans(path), f"the segment {path!r} of a response to sample {prompt.key!r}"
    with UserCode(f"{what} failed", source_of(function), RewardError):
        found = [tuple(map(_integer, span)) for span in function(text, prompt)]
    for span in found:
        whole = len(span) == 2 and all(type(place) is int for place in span)
        if not whole or not 0 <= span[0] <= span[1] <= len(text):
            raise RewardError(
                f"{what}: the function gave {span!r}, which is no (start, end) of a text of {len(text)} characters."
            )
    return tuple((span[0], span[1]) for span in found)


def _integer(place: Any) -> Any:
    """A plain int of whatever Python, numpy or torch call an integer; others as they are, to be named."""
    if isinstance(place, bool):
        return place
    try:
        return operator.index(place)
    except TypeError:
        return place
