"""What the training of a saved step has measured of its tokens, for the viewer; and where it is not there, why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sr1.report.viewer.names import MEASURES
from megatron_sr1.streams import Preset
from megatron_sr1.training.token_files import (
    DEPENDENCY,
    ENTROPY,
    GAP,
    ResponseName,
    TokenMeasures,
    digest_of,
    read_tokens,
)

_ALL = (GAP, ENTROPY, "dependency")  # as the viewer calls them
_NOT_SAVED = (
    "nothing was saved of its tokens: the step was not trained, with track.tokens=false or by an earlier release, "
    "or the files were removed; the curves have its means, {}"
)
_NOT_COMPARED = "no response of the step was scored by the weights, and with the images, that it was drawn by"
_NO_CONTRAST = "the objective has no contrast, which measures it: objective.contrast"
_OTHERS = "what was saved of its tokens is of other responses than these: the files are of two draws"


@dataclass(frozen=True)
class StepMeasures:
    """Of one step."""

    of_responses: Mapping[ResponseName, Mapping[str, Sequence[float]]]  # by name, one a token
    titles: Mapping[str, str]  # of those that some response has, by name
    absent: Mapping[str, str]  # the others, and why


def saved_measures(
    folder: Path, step: int, samples: Iterable[Mapping[str, Any]], preset: Preset | None
) -> StepMeasures:
    """
    Args:
        folder: of the rollouts.
        samples: all lines of the step that are of samples.
        preset: that the step was trained by; None: it is not known.
    """
    try:
        found = read_tokens(folder, step)
        _check_responses(found, samples)
    except ValueError as error:
        return StepMeasures({}, {}, dict.fromkeys(_ALL, str(error)))
    known = {name for one in found.values() for name in one.values}
    contrasts = sorted(name for name in known if name.startswith(DEPENDENCY))
    titles = {name: MEASURES[name] for name in (GAP, ENTROPY) if name in known}
    titles |= {name: f"{MEASURES['dependency']}, {name.removeprefix(DEPENDENCY)}" for name in contrasts}
    means = zip(_ALL, ("logprob_gap", "entropy", "dependency/..."), strict=True)
    absent = {name: _NOT_SAVED.format(mean) for name, mean in means if not found}
    if found and GAP not in known:
        absent[GAP] = _NOT_COMPARED
    if not contrasts and preset is not None and not preset.contrasts:
        absent["dependency"] = _NO_CONTRAST
    elif not contrasts:
        absent.setdefault("dependency", "no response of the step has another context")
    return StepMeasures({name: one.values for name, one in found.items()}, titles, absent)


def _check_responses(found: Mapping[ResponseName, TokenMeasures], samples: Iterable[Mapping[str, Any]]) -> None:
    """Raises ValueError where measures are not of the responses of the samples."""
    if not found:
        return
    digests = {name: digest_of(ids) for line in samples for name, ids in _responses(line)}
    if any(one.ids != digests.get(name) for name, one in found.items()):
        raise ValueError(_OTHERS)


def _responses(line: Mapping[str, Any]) -> Iterator[tuple[ResponseName, Sequence[int]]]:
    place = (line["group_id"], line["sample"])
    yield ResponseName(*place, "first", 0), line["first"]["response_ids"]
    if line["second"] is not None:
        yield ResponseName(*place, "second", 0), line["second"]["response_ids"]
    for reading in line.get("further", ()):
        yield ResponseName(*place, reading["pass_name"], reading["number"]), reading["rollout"]["response_ids"]
