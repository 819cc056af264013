"""What of a step's metrics whoever watches is shown, and in which words."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from megatron_sr1.printable import printable

Entry = Mapping[str, float | None]  # of metrics.jsonl: null where a number is not finite
_OF_STREAM = re.compile(r"loss/(.+)/(kl)")
_MEMORY = ("memory/peak_gib", "memory/host_gib")  # of a device, or where there is none
STREAM_REWARD = "reward/stream/"


def shown_metrics(values: Entry) -> list[str]:
    """Such as "reward 0.250 (answer 0.200, visual 0.050)", in order; what a step lacks is left out."""
    parts = [_reward(values), *(_joined(values, *each) for each in _JOINED)]
    return [printable(part) for part in parts if part]


def _number(value: float | None) -> str:
    if value is None or value != value:
        return "nan"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"


def _count(value: float | None) -> str:
    return "nan" if value is None or value != value else f"{value:,.0f}"


def _small(value: float | None) -> str:
    return "nan" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "nan" if value is None or value != value else f"{100 * value:.1f}%"


def _gib(value: float | None) -> str:
    return "nan" if value is None else f"{value:.1f} GiB"


# label, names that stand beside each other, how
_JOINED: tuple[tuple[str, tuple[str, ...] | Callable[[Entry], list[str]], Callable[[float | None], str]], ...] = (
    ("loss", ("loss/sft/nll",), _number),
    ("accuracy", ("accuracy", "second_pass_accuracy"), _number),
    ("LSR", ("language_shortcut_rate",), _number),
    ("KL", lambda values: [name for name in values if _OF_STREAM.fullmatch(name)], _small),
    ("entropy", ("entropy",), _small),
    ("tokens", ("first/response_tokens", "second/response_tokens"), _count),
    ("cut", ("first/truncated", "second/truncated"), _share),
    ("dead", ("groups/dead",), _share),
    ("generated/s", ("tokens_per_second",), _count),
    ("trained/s", ("trained_tokens_per_second",), _count),
    ("MFU", ("mfu",), _share),
    ("memory", lambda values: [name for name in _MEMORY if name in values][:1], _gib),
)


def _joined(
    values: Entry, label: str, names: tuple[str, ...] | Callable[[Entry], list[str]], text: Callable[..., str]
) -> str:
    found = [name for name in (names if isinstance(names, tuple) else names(values)) if name in values]
    return f"{label} {'/'.join(text(values[name]) for name in found)}" if found else ""


def _reward(values: Entry) -> str:
    if "reward/total" not in values:
        return ""
    streams = {name.removeprefix(STREAM_REWARD): value for name, value in values.items() if _is_stream(name)}
    own = ", ".join(f"{stream} {_number(value)}" for stream, value in streams.items())
    return f"reward {_number(values['reward/total'])}" + (f" ({own})" if len(streams) > 1 else "")


def _is_stream(name: str) -> bool:
    return name.startswith(STREAM_REWARD)
