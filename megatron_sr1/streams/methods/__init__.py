"""Published methods as files of YAML, each with its formula and its paper.

A file has keys of `objective`: `template`, `streams`, `passes`, `contrast` and `distorted`. The weight `alpha` of a
reward is `objective.format_weight`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, cast, get_args

import yaml

from megatron_sr1.streams.presets import Written
from megatron_sr1.types import MethodName, TemplateName


@dataclass(frozen=True)
class Method:
    """What a preset stands for, as it is written in `objective`."""

    template: TemplateName
    streams: Sequence[Written]
    passes: Sequence[Written]
    contrast: Sequence[Written]
    distorted: Mapping[str, Any] = field(default_factory=dict)


METHODS = cast(tuple[MethodName, ...], get_args(MethodName))


def read_method(name: str, alpha: float) -> Method:
    """The method's file, with `alpha` in the place of its name."""
    keys = yaml.safe_load(files("megatron_sr1.streams.methods").joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
    assert keys.keys() <= {"template", "streams", "passes", "contrast", "distorted"}, keys
    for stream in keys["streams"]:
        weights = {reward: alpha if weight == "alpha" else weight for reward, weight in stream["rewards"].items()}
        stream["rewards"] = weights
    more = (keys.get("passes", []), keys.get("contrast", []), keys.get("distorted", {}))
    return Method(keys["template"], keys["streams"], *more)
