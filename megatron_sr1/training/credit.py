"""What an objective credits: what multiplies d log p of each token of a step's responses.

    credit[r] = sum_s lambda_s * A_s * w[s, r]

That is minus the gradient of the policy terms of `objective.losses` where no weight has moved yet: all probability
ratios are 1, and nothing is clipped. Terms for a KL, for entropy or for a contrast are no credit. Importance weights,
those of `objective.mismatch`, hang on the trainer's weights: they are left out. A sum whose terms cancel down to the
rounding of float32 is 0.

Shape legend: S streams, B rollouts, M as in `ledger.py`, n tokens of one response, T of all, N samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_sr1.config import Config
from megatron_sr1.report.credit.numbers import Comparison, Shift, Signs
from megatron_sr1.streams import Preset
from megatron_sr1.training.batches import optimizer_shares, response_weights
from megatron_sr1.training.ledger import StepLedger, slots_of
from megatron_sr1.training.live_groups import step_advantages
from megatron_sr1.training.recorder import GroupTracks, stream_masks
from megatron_sr1.training.step_rollouts import StepRollouts
from megatron_sr1.types import PassName

ROUNDING = 1e-6  # of float32, relative


class ResponseKey(NamedTuple):
    """A response of a step, whatever objective looks at it."""

    group: int  # its number
    sample: int
    later: bool  # first passes come first
    pass_name: PassName
    number: int  # among the samples of its pass


Credit = Mapping[ResponseKey, Tensor]  # [n] float64, of all responses that are scored


def step_credit(rollouts: StepRollouts, preset: Preset, config: Config) -> dict[ResponseKey, Tensor]:
    """Of all tokens of the groups that are trained on, as `config.objective` credits them; an optimizer step without
    groups has none.

    Args:
        rollouts: recorded for `preset`, and held by this process.
        preset: that of the configuration, or one with the same passes, segments and rewards.
    """
    ledger, places = rollouts.trained
    each = ledger.num_samples
    advantages = step_advantages(ledger, preset, config.objective)  # [S, B, M]
    found: dict[ResponseKey, Tensor] = {}
    for share in optimizer_shares(places, config):
        if share.start < share.stop:
            own = advantages[:, share.start * each : share.stop * each]
            found |= share_credit(ledger.of(share), own, rollouts.tracks, preset, config.rollout.max_response_tokens)
    return found


def share_credit(
    part: StepLedger,
    advantages: Tensor,
    tracks: Mapping[int, GroupTracks],
    preset: Preset,
    max_response_tokens: int,
) -> dict[ResponseKey, Tensor]:
    """The same of the groups of one optimizer step, of those that are held.

    Args:
        part: the ledger of these groups.
        advantages: [S, b, M], theirs.
        tracks: by number, of the groups that this process holds.
        max_response_tokens: see `response_weights`.
    """
    slots, each = slots_of(preset), part.num_samples
    lambdas = torch.tensor([stream.loss_weight for stream in preset.streams], dtype=torch.float64)
    weights = response_weights(part, preset, max_response_tokens).double()  # [S, b, M]
    of_responses = lambdas[:, None, None] * advantages.double() * weights
    found: dict[ResponseKey, Tensor] = {}
    for row, number in enumerate(part.number.tolist()):
        for (sample, slot), track in tracks.get(number, {}).items():
            pass_name, place = slots[slot].pass_name, slots[slot].number
            terms = of_responses[:, row * each + sample, place, None] * stream_masks(track, len(preset.streams))
            key = ResponseKey(number, sample, pass_name != "first", pass_name, place)
            found[key] = settled(terms.sum(0), terms.abs().sum(0))
    return found


def settled(sums: Tensor, sizes: Tensor) -> Tensor:
    """The sums, but 0 where the terms cancel.

    Args:
        sizes: the sums of |term|.
    """
    return torch.where(sums.abs() <= ROUNDING * sizes, 0.0, sums)


@dataclass(frozen=True, eq=False)
class Aligned:
    """The credit of the same tokens under a first and a second; 0 where one does not score the response."""

    keys: Sequence[ResponseKey]
    lengths: Sequence[int]  # tokens of each
    both: Tensor  # [2, T] float64
    samples: Sequence[tuple[int, int]]  # group and number of each sample, in order
    sample_of: Tensor  # [T] int64: which of these a token is of

    @classmethod
    def of(cls, first: Credit, second: Credit) -> Aligned:
        """Of all responses that one of the two scores."""
        keys = sorted(first.keys() | second.keys())
        lengths = [len(first[key] if key in first else second[key]) for key in keys]
        rows = [
            torch.cat(
                [credit.get(key, torch.zeros(n, dtype=torch.float64)) for key, n in zip(keys, lengths, strict=True)]
            )
            for credit in (first, second)
        ]
        samples = sorted({(key.group, key.sample) for key in keys})
        places = {sample: place for place, sample in enumerate(samples)}
        own = torch.tensor([places[key.group, key.sample] for key in keys], dtype=torch.long)
        sample_of = own.repeat_interleave(torch.tensor(lengths, dtype=torch.long))
        return cls(keys, lengths, torch.stack(rows), samples, sample_of)

    def pieces(self) -> dict[ResponseKey, Tensor]:
        """[2, n] of each response."""
        return dict(zip(self.keys, self.both.split(list(self.lengths), 1), strict=True))

    def of_samples(self) -> Tensor:
        """[2, N]: the credit of each sample."""
        return settled(self._summed(self.both), self._summed(self.both.abs()))

    def changes(self) -> Tensor:
        """[N]: how much credit of each sample's tokens is another, up or down."""
        return self._summed((self.both[1] - self.both[0]).abs()[None])[0]

    def compared(self) -> Comparison:
        """What is alike and what is not."""
        masses = self.both.abs().sum(1)
        shares = self.both.abs() / torch.where(masses > 0, masses, 1.0)[:, None]
        moved = (shares[1] - shares[0]).abs().sum() / 2 if bool((masses > 0).all()) else (masses > 0).any().double()
        return Comparison(
            samples=shift(*self.of_samples()),
            tokens=shift(*self.both),
            masses=(float(masses[0]), float(masses[1])),
            moved=float(moved),
        )

    def _summed(self, values: Tensor) -> Tensor:
        """[R, T] to [R, N]."""
        return values.new_zeros(len(values), len(self.samples)).index_add_(1, self.sample_of, values)


def shift(first: Tensor, second: Tensor) -> Shift:
    """Of numbers that stand beside each other."""
    change = settled(second - first, first.abs() + second.abs())
    return Shift(signs(first, second), int((change > 0).sum()), int((change < 0).sum()))


def signs(first: Tensor, second: Tensor) -> Signs:
    """Of numbers that stand beside each other."""
    product, only = first.sign() * second.sign(), (first == 0).int() - (second == 0).int()
    return Signs(
        same=int((product > 0).sum()),
        opposite=int((product < 0).sum()),
        only_first=int((only < 0).sum()),
        only_second=int((only > 0).sum()),
        neither=int(((first == 0) & (second == 0)).sum()),
    )


def sample_advantages(advantages: Tensor, preset: Preset) -> Tensor:
    """[S, B]: the mean over the samples of a stream's pass.

    Args:
        advantages: [S, B, M].
    """
    rows = []
    for row, stream in zip(advantages.double(), preset.streams, strict=True):
        own = row[:, : preset.num_samples(stream.trajectory)]
        rows.append(settled(own.mean(1), own.abs().mean(1)))
    return torch.stack(rows)
