"""What every rank knows of a step: a kilobyte or two a group, whatever the groups hold.

Advantages, denominators, metrics, the balance of replicas and the plan of what is sent where are functions of it alone,
so all ranks agree about them without another word.

Shape legend:
    G  graded groups of the step    K  samples of each    B = G * K rollouts, in the order of groups and samples
    N  responses that a sample may have: the first pass, then every sample of every later pass
    S  reward streams    M  the most samples of a pass that a stream trains    C  kinds of tokens (`token_kinds`)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from megatron_sr1.objective import token_kinds
from megatron_sr1.streams import Preset
from megatron_sr1.training.step_rewards import Rewards, all_rewards, num_readings
from megatron_sr1.types import PassName

FIRST = 0  # the slot whose prompt all samples of a group share
KINDS = tuple(token_kinds(torch.zeros(1), torch.zeros(1)))


@dataclass(frozen=True)
class Slot:
    """A place for a response of a sample."""

    pass_name: PassName
    number: int  # among the samples of its pass
    scored: bool  # by the policy: it is a first pass, or a stream credits it


def slots_of(preset: Preset) -> tuple[Slot, ...]:
    """[N]: the first pass, then the samples of the later passes."""
    later = [(one.name, number) for one in preset.passes.later for number in range(one.samples)]
    return (Slot("first", 0, True), *(Slot(*place, preset.trains(place[0])) for place in later))


@dataclass(frozen=True, eq=False)
class StepLedger:
    """Columns of the groups; of a rank's own before they are gathered, of all afterwards."""

    number: Tensor  # [G] int64: place among the prompts that the step has drawn, increasing
    holder: Tensor  # [G] int64: the rank that has the group itself
    num_images: Tensor  # [G] int32: of its prompt
    described: Tensor  # [G, K] bool
    description_cut: Tensor  # [G, K] bool
    distorted: Tensor  # [G, K] bool: the engine saw noisy images in the first pass, see `types.Distorted`
    faithful: Tensor  # [G, K] float32: whether the description says what the image shows; NaN: nobody knows
    answered: Tensor  # [G, K, N] bool: the response is there
    cut: Tensor  # [G, K, N] bool: by the token limit
    prompt_tokens: Tensor  # [G, K, N] int32
    response_tokens: Tensor  # [G, K, N] int32; 0 where an endpoint has answered
    seconds: Tensor  # [G, K, N] float32, from the queue to the answer
    in_stream: Tensor  # [G, K, S, M] int32: tokens that a stream credits in each sample of its pass
    of_kind: Tensor  # [G, K, C] int32: tokens by kind of the scored responses whose engine saw what the trainer sees
    rewards: Mapping[str, Tensor]  # [G, K] float32 each, of passes with m > 1 samples [G, K, m]

    @classmethod
    def empty(cls, preset: Preset, num_samples: int) -> StepLedger:
        """Of no group; G is 0, the other lengths are those of the preset and of `num_samples`."""

        def none(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(0, *shape, dtype=dtype)

        sample, each = (num_samples,), (num_samples, len(slots_of(preset)))
        numbers = {name: num_readings(name, preset) for name in all_rewards(preset)}
        return cls(
            number=none(dtype=torch.int64),
            holder=none(dtype=torch.int64),
            num_images=none(dtype=torch.int32),
            described=none(*sample, dtype=torch.bool),
            description_cut=none(*sample, dtype=torch.bool),
            distorted=none(*sample, dtype=torch.bool),
            faithful=none(*sample, dtype=torch.float32),
            answered=none(*each, dtype=torch.bool),
            cut=none(*each, dtype=torch.bool),
            prompt_tokens=none(*each, dtype=torch.int32),
            response_tokens=none(*each, dtype=torch.int32),
            seconds=none(*each, dtype=torch.float32),
            in_stream=none(*sample, len(preset.streams), preset.most_samples, dtype=torch.int32),
            of_kind=none(*sample, len(KINDS), dtype=torch.int32),
            rewards={n: none(*sample, *([m] if m > 1 else []), dtype=torch.float32) for n, m in numbers.items()},
        )

    @property
    def num_groups(self) -> int:
        return len(self.number)

    @property
    def shown(self) -> Tensor:
        """[G] bool: the prompt has images."""
        return self.num_images > 0

    @property
    def num_samples(self) -> int:
        """K."""
        return self.described.shape[1]

    @property
    def rollout_rewards(self) -> Rewards:
        """[B], or [B, m]."""
        return {name: reward.flatten(0, 1) for name, reward in self.rewards.items()}

    @property
    def rollout_group(self) -> Tensor:
        """[B] int64: `number` of the group of each rollout."""
        return self.number.repeat_interleave(self.num_samples)

    @property
    def rollout_shown(self) -> Tensor:
        """[B] bool."""
        return self.shown.repeat_interleave(self.num_samples)

    @property
    def bad_rewards(self) -> Tensor:
        """[G, K] bool: a reward of the sample is not finite."""
        bad = torch.zeros_like(self.described)
        for reward in self.rewards.values():
            bad |= ~torch.isfinite(reward).unflatten(1, (self.num_samples, 1)).flatten(2).all(2)
        return bad

    def of(self, groups: slice | Sequence[int] | Tensor) -> StepLedger:
        """The ledger of some of the groups."""
        chosen = groups if isinstance(groups, slice) else torch.as_tensor(groups, dtype=torch.long)
        return self._built(tensor[chosen] for tensor in self.columns())

    def as_rows(self) -> Tensor:
        """[G, W] float32: all columns of each group side by side. Whole numbers up to 2**24 stay what they are."""
        return torch.cat(
            [tensor.float().reshape(len(tensor), math.prod(tensor.shape[1:])) for tensor in self.columns()], 1
        )

    def of_rows(self, rows: Tensor) -> StepLedger:
        """The inverse of `as_rows`, in the order of numbers; the lengths are those of this ledger."""
        rows = rows[rows[:, 0].argsort()]
        assert bool((rows[1:, 0] > rows[:-1, 0]).all()), "two ranks have one group"
        shapes = [tensor.shape[1:] for tensor in self.columns()]
        pieces = rows.split([math.prod(shape) for shape in shapes], 1)
        kinds = [tensor.dtype for tensor in self.columns()]
        return self._built(
            piece.unflatten(1, shape).to(kind) if shape else piece[:, 0].to(kind)
            for piece, shape, kind in zip(pieces, shapes, kinds, strict=True)
        )

    def joined(self, other: StepLedger) -> StepLedger:
        """This and another, whose numbers are higher."""
        return self._built(torch.cat(pair) for pair in zip(self.columns(), other.columns(), strict=True))

    def columns(self) -> list[Tensor]:
        """All of them, [G, ...] each."""
        plain = [getattr(self, name) for name in _PLAIN]
        return [*plain, *self.rewards.values()]

    def _built(self, columns: Iterator[Tensor]) -> StepLedger:
        plain = {name: next(columns) for name in _PLAIN}
        return replace(self, **plain, rewards=dict(zip(self.rewards, columns, strict=True)))


_PLAIN = tuple(each.name for each in fields(StepLedger) if each.name != "rewards")
