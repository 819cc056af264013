"""The siblings that are drawn from noisy images (`objective.distorted`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_sr1.config import Config
from megatron_sr1.config.distorted import EXAMPLE, KEYS
from megatron_sr1.config.rules import require
from megatron_sr1.streams.schedules import schedule_of
from megatron_sr1.types import Distorted


def distorted_of(entry: Mapping[str, Any]) -> Distorted | None:
    """None where nothing is written, or 0 samples are.

    Args:
        entry: of `objective.distorted` over what the preset has, checked by `config.distorted`.

    Raises:
        ConfigError: a key is missing.
    """
    if not entry or entry.get("samples") == 0:
        return None
    missing = [key for key in KEYS if key not in entry]
    require(not missing, f"objective.distorted.{''.join(missing[:1])}", None, "given", EXAMPLE)
    strength = entry["strength"]
    changing = isinstance(strength, Mapping)
    return Distorted(entry["samples"], schedule_of("strength", strength) if changing else float(strength))


def check_siblings(distorted: Distorted | None, config: Config) -> None:
    """Whether a run can have such siblings.

    Raises:
        ConfigError: no sibling would see the images as they are; ratios would be to what the generator says, who has
            seen others, or tokens would be sent where it sent them.
    """
    if distorted is None:
        return
    samples, old = config.rollout.samples_per_prompt, config.objective.old
    require(
        distorted.samples < samples,
        "objective.distorted.samples",
        distorted.samples,
        f"less than rollout.samples_per_prompt={samples}, so that some siblings see the images as they are",
        "Half of them is the paper's. Lower it, or raise rollout.samples_per_prompt.",
    )
    check_old(old)
    check_replay(config.objective.router_replay)


def check_replay(who: str | None) -> None:
    """
    Args:
        who: `objective.router_replay`, where some responses were drawn from noisy images.

    Raises:
        ConfigError: it is the generator, whose choice of experts was made for other images.
    """
    require(
        who != "generator",
        "objective.router_replay",
        who,
        "trainer or none where siblings are drawn from noisy images: the generator chose experts for these, and they "
        "are trained on the images themselves",
        "Set objective.router_replay=trainer.",
    )


def check_old(old: str) -> None:
    """
    Args:
        old: `objective.old`, where some responses were drawn from noisy images.

    Raises:
        ConfigError: it is not the trainer, who alone can score them under the images that they are trained on.
    """
    require(
        old == "trainer",
        "objective.old",
        old,
        "trainer where siblings are drawn from noisy images: they are trained on the images themselves, and what the "
        "generator says of them is of another prompt",
        "A step of one optimizer step needs no pass for it.",
    )
