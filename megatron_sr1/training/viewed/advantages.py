"""The advantages that a saved step was trained with, for the viewer: computed as the trainer does, by `step_advantages`
over the groups of the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_sr1.config import Config
from megatron_sr1.import_path import is_import_path
from megatron_sr1.processor import Processor
from megatron_sr1.report.viewer.shown import ShownStream
from megatron_sr1.streams import Preset
from megatron_sr1.training.credit import sample_advantages
from megatron_sr1.training.credit_report import check_made_by
from megatron_sr1.training.ledger import slots_of
from megatron_sr1.training.live_groups import live_groups, step_advantages
from megatron_sr1.training.recorder import stream_masks
from megatron_sr1.training.saved_step import SavedStep
from megatron_sr1.training.token_files import ResponseName
from megatron_sr1.types import RewardStream


@dataclass(frozen=True)
class StepAdvantages:
    """Of one step. A value is None where the stream's is not known."""

    streams: tuple[ShownStream, ...]
    of_samples: Mapping[tuple[int, int], tuple[float | None, ...]]  # group, sample -> by stream; trained groups alone
    of_responses: Mapping[ResponseName, tuple[float | None, ...]]  # the same of each response that is scored
    masks: Mapping[ResponseName, tuple[int, ...]]  # of each token: bit s is set where stream s credits it
    dead: frozenset[int]  # groups, dropped ones among them
    opposite: frozenset[tuple[int, int]]  # samples that two streams with a weight pull opposite ways
    unknown: str  # why neither of these is known, as of a stream with a weight; then both are empty


def saved_advantages(run: Path, number: int, config: Config, preset: Preset, processor: Processor) -> StepAdvantages:
    """
    Args:
        number: of the step.
        config, preset: that the step was made by; the preset with the coefficients of the step.

    Raises:
        ValueError: the step was made by another configuration, its objective needs what rollouts do not have, a reward
            is not finite, or a file is damaged.
    """
    step = SavedStep.read(run / "rollouts", number, processor.image_token_id)
    check_made_by(run, step, config)
    if missing := step.missing(preset):
        raise ValueError(f"{step.path} has no reward {missing[0]!r}, so another objective has made the step.")
    for stream in preset.streams:
        if is_import_path(stream.tokens):
            raise ValueError(
                f"the stream {stream.name!r} credits tokens={stream.tokens!r}, a function that is given the prompt "
                "with its images and metadata, which saved rollouts do not have."
            )
    rollouts = step.recorded(preset, processor, config.objective.cut_responses)
    if bad := rollouts.told_bad_rewards():
        raise ValueError(f"{step.path}: {bad[0]}, so the step was skipped: not all of its rewards are finite.")
    ledger, _ = rollouts.trained
    none = torch.zeros(len(preset.streams), ledger.num_groups * ledger.num_samples, preset.most_samples)
    advantages = step_advantages(ledger, preset, config.objective, none, none)  # [S, B, M]
    _, kept = live_groups(rollouts.ledger, preset, config.objective)
    streams = tuple(_shown(stream) for stream in preset.streams)
    unknown = next((stream.unknown for stream in streams if stream.unknown and stream.loss_weight != 0), "")
    means = sample_advantages(advantages, preset)  # [S, B]
    samples = [(number, k) for number in ledger.number.tolist() for k in range(ledger.num_samples)]
    weighted = torch.tensor([stream.loss_weight != 0 for stream in preset.streams])
    apart = (means[weighted] > 0).any(0) & (means[weighted] < 0).any(0)  # [B]
    numbers = rollouts.ledger.number.tolist()
    masks = {
        ResponseName(group, sample, slot.pass_name, slot.number): tuple(_bits(stream_masks(track, len(streams))))
        for group, tracks in rollouts.tracks.items()
        for (sample, place), track in tracks.items()
        for slot in [slots_of(preset)[place]]
    }
    return StepAdvantages(
        streams,
        {sample: _values(means[:, index], streams) for index, sample in enumerate(samples)},
        {
            ResponseName(*sample, slot.pass_name, slot.number): _values(advantages[:, index, slot.number], streams)
            for index, sample in enumerate(samples)
            for slot in slots_of(preset)
            if slot.scored
        },
        masks,
        frozenset(n for n, is_alive in zip(numbers, kept.tolist(), strict=True) if not (is_alive or unknown)),
        frozenset(s for s, is_apart in zip(samples, apart.tolist(), strict=True) if is_apart and not unknown),
        unknown,
    )


def _shown(stream: RewardStream) -> ShownStream:
    unknown = ""
    if stream.kl_in == "reward":
        unknown = "kl_in=reward takes a KL off its reward, which was measured as it was trained and not saved"
    elif stream.earns_by_contrast:
        unknown = f"it earns by its contrast {stream.contrast!r}, which was measured as it was trained and not saved"
    rewards = " + ".join(f"{weight:g} {name}" for name, weight in stream.rewards)
    return ShownStream(stream.name, stream.trajectory, stream.tokens, rewards, stream.loss_weight, unknown)


def _values(values: Tensor, streams: Sequence[ShownStream]) -> tuple[float | None, ...]:
    """`values`: [S]."""
    return tuple(None if stream.unknown else value for stream, value in zip(streams, values.tolist(), strict=True))


def _bits(masks: Tensor) -> list[int]:
    """[S, n] bool to n numbers."""
    return (masks.long() << torch.arange(len(masks))[:, None]).sum(0).tolist()
