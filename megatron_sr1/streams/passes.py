"""The passes that follow the first, from `objective.passes`.

The default is the paper's: one second pass of one sample, which answers from the description.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_sr1.prompts import Template
from megatron_sr1.types import SECOND, LaterPass, PassName


def later_passes(entries: Sequence[Mapping[str, Any]]) -> tuple[tuple[LaterPass, ...], tuple[PassName, ...]]:
    """All passes behind the first in the order of their first mention, the second one first; and the names of those
    that were written down.

    Args:
        entries: of `objective.passes`, checked by `config.passes`.

    Raises:
        ValueError: an entry takes away what there is not.
    """
    later = {SECOND.name: SECOND}
    for entry in entries:
        name = entry["name"]
        if not entry.get("enabled", True):
            if later.pop(name, None) is None:
                raise ValueError(f"objective.passes: there is no pass {name!r} to take away: leave the entry out.")
            continue
        keys = {key: value for key, value in entry.items() if key != "enabled"}
        later[name] = LaterPass(**keys)
    return tuple(later.values()), tuple(entry["name"] for entry in entries if entry.get("enabled", True))


def needs_description(later: LaterPass) -> bool:
    """Whether the pass reads what a first pass describes, so that one must be asked for."""
    return later.context in ("description", "other_description")


def check_later(later: Sequence[LaterPass], template: Template) -> None:
    """
    Raises:
        ValueError: a pass reads a description, and the first pass' template asks for none.
    """
    reading = [one.name for one in later if needs_description(one)]
    if reading and template.describes is None:
        raise ValueError(
            f"objective: the pass {reading[0]!r} reads a description, and the template {template.name!r} asks for "
            "none. Set objective.template=see_think, or another context."
        )
