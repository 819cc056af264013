"""From a group as its engine has made it to its line in the ledger, and to what of it a policy is trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from megatron_sr1.config import NO_REPLAY, Replay
from megatron_sr1.objective import token_kinds
from megatron_sr1.processor import Processor
from megatron_sr1.ranks import Exchange, agreed
from megatron_sr1.rewards import faithful
from megatron_sr1.streams import Preset
from megatron_sr1.training.expert_ids import experts_of
from megatron_sr1.training.ledger import FIRST, KINDS, StepLedger, slots_of
from megatron_sr1.training.segments import Response, response_masks, scored_responses
from megatron_sr1.training.step_rewards import Rewards
from megatron_sr1.types import CutResponses, Rollout, RolloutGroup, RolloutPair, TokenTrack

GroupTracks = Mapping[tuple[int, int], TokenTrack]  # by sample and slot: the scored responses of a group
Masks = Callable[[Response], Tensor]  # [S + E, n]: see `response_masks`
_NONE = Rollout("", (), (), "", (), "stop", 0)  # a response that is not there


class Recorder:
    """Of the groups that one rank holds."""

    def __init__(
        self, preset: Preset, num_samples: int, masks: Masks, image_token_id: int, replay: Replay = NO_REPLAY
    ) -> None:
        """`num_samples`: K."""
        self.preset, self.num_samples = preset, num_samples
        self._replay = replay
        self._masks = masks
        self._image_token_id = image_token_id
        self._slots = slots_of(preset)
        self._places = {(slot.pass_name, slot.number): place for place, slot in enumerate(self._slots)}

    @classmethod
    def of(
        cls, preset: Preset, num_samples: int, processor: Processor, cut: CutResponses, replay: Replay = NO_REPLAY
    ) -> Recorder:
        """`cut`: see `response_masks`."""
        masks = partial(response_masks, processor, streams=preset.streams, cut=cut, measured=preset.measured)
        return cls(preset, num_samples, masks, processor.image_token_id, replay)

    def none(self) -> StepLedger:
        """The ledger before anything is drawn."""
        return StepLedger.empty(self.preset, self.num_samples)

    def record(
        self, groups: Sequence[RolloutGroup], rewards: Sequence[Rewards], ranks: Exchange
    ) -> tuple[StepLedger, dict[int, GroupTracks]]:
        """The ledger of the groups of all ranks, and the tracks of these, by their numbers. Collective.

        Args:
            groups: that this rank holds; group_id is their number.
            rewards: of each, see `sample_rewards`.

        Raises:
            ValueError: on every rank: the facts of a sample are no list; a user's function of spans fails; see
                `experts_of`.
        """

        def recorded() -> tuple[StepLedger, dict[int, GroupTracks]]:
            tracks = {group.group_id: self._tracks(group) for group in groups}
            return self._ledger(groups, rewards, tracks, ranks.rank) if groups else self.none(), tracks

        own, tracks = agreed(ranks, recorded)
        return self.none().of_rows(ranks.gather_rows(own.as_rows())), tracks

    def _tracks(self, group: RolloutGroup) -> GroupTracks:
        sizes = [image.size for image in group.prompt.images]
        found = {
            (sample, self._places[response.pass_name, response.number]): self._track(response, sizes)
            for sample, pair in enumerate(group.pairs)
            for response in scored_responses(pair, group.prompt, self.preset)
        }
        asked = found[0, FIRST].prompt_experts
        if asked is None:
            return found
        return {
            place: replace(track, prompt_experts=asked) if place[1] == FIRST else track
            for place, track in found.items()
        }

    def _track(self, response: Response, sizes: Sequence[tuple[int, int]]) -> TokenTrack:
        rollout = response.rollout
        shown = torch.tensor(sizes if response.pass_name == "first" else [], dtype=torch.int32)
        masks = self._masks(response).long()
        bits = 1 << torch.arange(len(masks))
        credited = (masks * bits[:, None]).sum(0)
        prompt_experts, response_experts = experts_of(rollout, self._replay)
        return TokenTrack(
            image_sizes=shown.view(-1, 2),
            prompt_ids=torch.tensor(rollout.prompt_ids, dtype=torch.int32),
            response_ids=torch.tensor(rollout.response_ids, dtype=torch.int32),
            generator_logprobs=torch.tensor(rollout.generator_logprobs, dtype=torch.float32),
            credited=credited.to(torch.int32),
            prompt_experts=prompt_experts,
            response_experts=response_experts,
        )

    def _ledger(
        self,
        groups: Sequence[RolloutGroup],
        rewards: Sequence[Rewards],
        tracks: Mapping[int, GroupTracks],
        holder: int,
    ) -> StepLedger:
        assert all(len(group.pairs) == self.num_samples for group in groups), "a group has all its samples"
        rollouts = [[self._rollouts(pair) for pair in group.pairs] for group in groups]  # [G][K][N]
        truths = [[faithful(pair.description, group.prompt) for pair in group.pairs] for group in groups]
        none = StepLedger.empty(self.preset, self.num_samples)

        def of_pairs(value: Callable[[RolloutPair], bool]) -> Tensor:
            return torch.tensor([[value(pair) for pair in group.pairs] for group in groups])

        def of_rollouts(value: Callable[[Rollout], float], like: Tensor) -> Tensor:
            found = [[[value(rollout) for rollout in sample] for sample in group] for group in rollouts]
            return torch.tensor(found, dtype=like.dtype)

        return StepLedger(
            number=torch.tensor([group.group_id for group in groups]),
            holder=torch.full((len(groups),), holder),
            num_images=torch.tensor([len(group.prompt.images) for group in groups], dtype=torch.int32),
            described=of_pairs(lambda pair: pair.description is not None),
            description_cut=of_pairs(lambda pair: pair.description_cut),
            distorted=of_pairs(lambda pair: pair.distorted),
            faithful=torch.tensor([[_number(truth) for truth in group] for group in truths]),
            answered=of_rollouts(lambda rollout: rollout is not _NONE, none.answered),
            cut=of_rollouts(lambda rollout: rollout.finish_reason == "length", none.cut),
            prompt_tokens=of_rollouts(lambda rollout: len(rollout.prompt_ids), none.prompt_tokens),
            response_tokens=of_rollouts(lambda rollout: len(rollout.response_ids), none.response_tokens),
            seconds=of_rollouts(lambda rollout: rollout.finished_at - rollout.queued_at, none.seconds),
            in_stream=torch.stack([self._in_stream(tracks[group.group_id]) for group in groups]),
            of_kind=torch.stack([self._of_kind(group, tracks[group.group_id]) for group in groups]),
            rewards={name: torch.stack([each[name] for each in rewards]) for name in none.rewards},
        )

    def _rollouts(self, pair: RolloutPair) -> list[Rollout]:
        """[N]"""
        found = {("first", 0): pair.first}
        for name in {slot.pass_name for slot in self._slots[1:]}:
            found |= {(name, reading.number): reading.rollout for reading in pair.readings(name)}
        return [found.get((slot.pass_name, slot.number), _NONE) for slot in self._slots]

    def _in_stream(self, tracks: GroupTracks) -> Tensor:
        """[K, S, M] int32"""
        counts = torch.zeros(self.num_samples, len(self.preset.streams), self.preset.most_samples, dtype=torch.int32)
        for (sample, slot), track in tracks.items():
            counts[sample, :, self._slots[slot].number] += stream_masks(track, len(self.preset.streams)).sum(1)
        return counts

    def _of_kind(self, group: RolloutGroup, tracks: GroupTracks) -> Tensor:
        """[K, C] int32"""
        lengths = torch.tensor([len(track.response_ids) for track in tracks.values()])
        others = [slot == FIRST and group.pairs[sample].distorted for sample, slot in tracks]  # saw other images
        distance = torch.cat([image_distance(track, self._image_token_id) for track in tracks.values()])
        offset = torch.cat([torch.arange(length, dtype=torch.float32) for length in lengths.tolist()])
        kinds = torch.stack(list(token_kinds(distance, offset).values()), 1).to(torch.int32)  # [tokens, C]
        kinds[torch.tensor(others).repeat_interleave(lengths)] = 0
        samples = torch.tensor([sample for sample, _ in tracks]).repeat_interleave(lengths)
        return torch.zeros(self.num_samples, len(KINDS), dtype=torch.int32).index_add_(0, samples, kinds)


def stream_masks(track: TokenTrack, num_streams: int) -> Tensor:
    """[S, n] bool: which stream credits which token."""
    return _bits(track, range(num_streams))


def segment_masks(track: TokenTrack, preset: Preset) -> Tensor:
    """[E, n] bool: which of `Preset.measured` has which token."""
    return _bits(track, range(len(preset.streams), len(preset.streams) + len(preset.measured)))


def _bits(track: TokenTrack, chosen: range) -> Tensor:
    return (track.credited >> torch.tensor(chosen, dtype=torch.int32)[:, None] & 1).bool()


def image_distance(track: TokenTrack, image_token_id: int) -> Tensor:
    """[n] float32: how far each response token is behind the last visual token of its prompt; -1 without images."""
    offset = torch.arange(len(track.response_ids), dtype=torch.float32)
    seen = (track.prompt_ids == image_token_id).nonzero()
    return offset + (len(track.prompt_ids) - int(seen[-1])) if len(seen) else torch.full_like(offset, -1.0)


def _number(truth: bool | None) -> float:
    return float("nan") if truth is None else float(truth)
