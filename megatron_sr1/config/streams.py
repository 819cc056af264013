"""`objective.streams`: what is written of each reward stream, checked key by key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from megatron_sr1.config.rules import COUNT, Range, known_key, require, require_number
from megatron_sr1.config.schedules import check_schedule
from megatron_sr1.types import (
    AdvantageKind,
    AdvantageScope,
    Aggregation,
    ContrastDivergence,
    KlEstimator,
    KlPlace,
    Normalize,
    RatioLevel,
    SequenceWeightFor,
    Surrogate,
    TokenWeighting,
)

KL_COEF = Range(0, 1000)  # 0 switches the reference model off
ENTROPY_COEF = Range(-1, 1, above=True, below=True)  # below 0 entropy is pushed down
RATIO = Range(0, 1000, above=True)
DUAL_CLIP = Range(1, 1000, above=True)
_SHARE = Range(0, 1, above=True)
_NUMBERS = {
    "loss_weight": Range(0, 1000),
    "kl_coef": KL_COEF,
    "entropy_coef": ENTROPY_COEF,
    "constant_tokens": COUNT,
    "clip_low": RATIO,
    "clip_high": RATIO,
    "dual_clip": DUAL_CLIP,
    "token_share": _SHARE,
    "token_threshold": Range(0, 10),  # dependency is held at 10
    "sequence_weight_low": Range(0, 1),
    "contrast_coef": Range(-1000, 1000),  # below 0 both contexts are drawn together
    "contrast_entropy_coef": ENTROPY_COEF,
    "contrast_reward": Range(-1000, 1000),
    "contrast_entropy_reward": Range(-1000, 1000),
}
SCHEDULED = ("loss_weight", "kl_coef", "entropy_coef", "contrast_coef", "contrast_entropy_coef")
_SCHEDULE = "Write {from: 0.04, to: 0.0, steps: 200, shape: cosine}."
_CHOICES = {
    "kl_estimator": get_args(KlEstimator),
    "kl_in": get_args(KlPlace),
    "normalize": get_args(Normalize),
    "advantage": get_args(AdvantageKind),
    "scope": get_args(AdvantageScope),
    "aggregation": get_args(Aggregation),
    "surrogate": get_args(Surrogate),
    "ratio": get_args(RatioLevel),
    "token_weighting": get_args(TokenWeighting),
    "sequence_weight_for": get_args(SequenceWeightFor),
    "contrast_divergence": get_args(ContrastDivergence),
}
KEYS = ("name", "pass", "tokens", "rewards", "enabled", "contrast", "gate", *_NUMBERS, *_CHOICES)
_NULLABLE = ("dual_clip", "constant_tokens", "sequence_weight_low")
_WHOLE = ("constant_tokens",)
_WEIGHT = Range(-1e6, 1e6)


def check_streams(streams: Sequence[Any]) -> None:
    """
    Raises:
        ConfigError: an entry is no mapping, has no name or the name of another, an unknown key, or a value that is not
            allowed.
    """
    names: list[str] = []
    for index, stream in enumerate(streams):
        where = f"objective.streams[{index}]"
        example = "Write {name: brevity, pass: first, tokens: response, rewards: {acc: 1.0}}."
        require(isinstance(stream, Mapping), where, stream, "keys with values", example)
        name = stream.get("name")
        is_name = isinstance(name, str) and name != "" and name.replace("_", "").isalnum()
        require(is_name, f"{where}.name", name, "a word of letters, digits and _", example)
        require(name not in names, f"{where}.name", name, "a name that no other stream has", "Metrics need one each.")
        names.append(str(name))
        for key, value in stream.items():
            _check(f"{where} ({name}).{key}", str(key), value)


def _check(where: str, key: str, value: Any) -> None:
    known_key(where, key, KEYS, "stream")
    if key in SCHEDULED and isinstance(value, Mapping):
        check_schedule(where, value, _NUMBERS[key], _SCHEDULE)
    elif key in _NUMBERS:
        if value is not None or key not in _NULLABLE:
            require_number(where, value, _NUMBERS[key], whole=key in _WHOLE)
    elif key in _CHOICES:
        allowed = _CHOICES[key]
        require(value in allowed, where, value, "one of " + ", ".join(allowed), "Set it to one of them.")
    elif key == "rewards":
        example = 'Write rewards: {acc: 1.0, "my_rewards.py:brevity": 0.2}.'
        require(isinstance(value, Mapping) and len(value) > 0, where, value, "rewards with their weights", example)
        for name, weight in value.items():
            require(isinstance(name, str), where, name, "a reward's name or import path", example)
            require_number(f"{where}[{name!r}]", weight, _WEIGHT)
            require(weight != 0, f"{where}[{name!r}]", weight, "another weight than 0", "Leave the reward out.")
    elif key == "enabled":
        require(isinstance(value, bool), where, value, "true or false", "False takes a preset's stream away.")
    else:
        require(isinstance(value, str) and value != "", where, value, "a word", "Write it in quotes if need be.")
