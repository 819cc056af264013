"""From demonstrations and scored rollouts to the packed micro-batches of one optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from megatron_sr1.config import Config, row_tokens
from megatron_sr1.objective import Preset, stream_advantages, token_kinds, token_weights
from megatron_sr1.packing import moved, pack, scatter_rows, split_for_ranks
from megatron_sr1.processor import Processor
from megatron_sr1.prompts import description_block, render_caption_reasoner, render_see_think
from megatron_sr1.types import (
    EncodedImage,
    MicroBatch,
    RewardStream,
    Rollout,
    RolloutGroup,
    SftSample,
    TokenSequence,
)

CPU = torch.device("cpu")


class Shares(Protocol):
    """Where a rank stands among the data-parallel replicas: `ProcessGroup` is one."""

    def rank(self) -> int: ...
    def size(self) -> int: ...


@dataclass(frozen=True)
class SftBatch:
    """This replica's share of one optimizer step's demonstrations."""

    micro_batches: list[MicroBatch]
    token_weights: list[Tensor]  # per micro-batch [R]: 1 / response tokens of the whole step


@dataclass(frozen=True)
class StreamBatch:
    """This replica's share of one optimizer step's rollouts, both passes."""

    micro_batches: list[MicroBatch]
    advantages: list[Tensor]  # per micro-batch [S, R]
    token_weights: list[Tensor]  # per micro-batch [S, R]
    generator_logprobs: list[Tensor]  # per micro-batch [R]
    image_distance: list[Tensor]  # per micro-batch [R]: tokens since the prompt's last visual token, -1 without images
    num_tokens: int  # response tokens of the whole step, all replicas
    num_of_kind: Mapping[str, int]  # the same by `token_kinds`, those alone that occur


class Batcher:
    """Packs what a policy is trained on."""

    def __init__(self, config: Config, processor: Processor, replicas: Shares, device: torch.device = CPU) -> None:
        """`device`: where the policy computes, and so where everything it is trained on goes.

        Raises:
            ConfigError: train.micro_batch_tokens has no room for a row of the layout.
        """
        self._config = config
        self._row_tokens = row_tokens(config)
        self._device = device
        self._processor = processor
        self._replicas = replicas

    def sft(self, samples: Sequence[SftSample]) -> SftBatch:
        """Demonstrations of either layout; the response tokens are trained on, each with the same weight."""
        sequences = [self._demonstration(sample) for sample in samples]
        weight = 1.0 / sum(len(sequence.response_ids) for sequence in sequences)
        lengths = [len(sequence.prompt_ids) + len(sequence.response_ids) for sequence in sequences]
        mine = [sequences[index] for index in split_for_ranks(lengths, self._replicas.size())[self._replicas.rank()]]
        micro_batches = self._pack(mine)
        weights = [torch.full((len(batch.targets),), weight, device=self._device) for batch in micro_batches]
        return SftBatch(micro_batches, weights)

    def streams(self, groups: Sequence[RolloutGroup], rewards: Mapping[str, Tensor], preset: Preset) -> StreamBatch:
        """Advantages and weights of every response token in every stream.

        Args:
            groups: all groups of the optimizer step, the same on every rank.
            rewards: per component [B], rollouts in the order of the groups and, within, of the samples.
        """
        objective = self._config.objective
        pairs = [pair for group in groups for pair in group.pairs]
        group_ids = torch.tensor([group.group_id for group in groups for _ in group.pairs])
        scopes = (objective.advantage_eps, objective.advantage_scope)
        advantages = torch.stack([stream_advantages(s, rewards, group_ids, *scopes) for s in preset.streams])  # [S, B]
        masks = [self._masks(pair.first, pair.second, preset.streams) for pair in pairs]
        num_tokens = torch.stack([first.sum(1) + second.sum(1) for first, second in masks], dim=1)  # [S, B]
        weights = token_weights(num_tokens.long(), objective.aggregation)  # [S, B]

        sequences: list[TokenSequence] = []
        values: list[Tensor] = []  # per sequence [2 * S + 2, n]: advantages, weights, generator log-probs, distances
        for rollout in self._my_rollouts(groups):
            images = tuple(self._processor.encode_image(image) for image in rollout.group.prompt.images)
            for index in rollout.indices:
                pair = pairs[index]
                for response, mask, seen in ((pair.first, masks[index][0], images), (pair.second, masks[index][1], ())):
                    if response is not None:
                        sequences.append(TokenSequence(response.prompt_ids, response.response_ids, seen))
                        credit = advantages[:, index, None].expand_as(mask)
                        generator = torch.tensor(response.generator_logprobs)[None]
                        distance = self._image_distance(response)[None]
                        values.append(torch.cat([credit, weights[:, index, None] * mask, generator, distance]))
        micro_batches = self._pack(sequences)
        num_streams = len(preset.streams)
        rows = [value.to(self._device) for value in scatter_rows(values, micro_batches)]
        parts = [value.split([num_streams, num_streams, 1, 1]) for value in rows]
        return StreamBatch(
            [
                _with_grad_rows(batch, *part[:2], preset.streams)
                for batch, part in zip(micro_batches, parts, strict=True)
            ],
            [part[0] for part in parts],
            [part[1] for part in parts],
            [part[2][0] for part in parts],
            [part[3][0] for part in parts],
            sum(first.shape[1] + second.shape[1] for first, second in masks),
            self._num_of_kind(
                [rollout for pair in pairs for rollout in (pair.first, pair.second) if rollout is not None]
            ),
        )

    def _image_distance(self, rollout: Rollout) -> Tensor:
        """[n]: how far each response token is behind the last visual token of its prompt; -1 without images."""
        offset = torch.arange(len(rollout.response_ids), dtype=torch.float32)
        behind = next(
            (n for n, i in enumerate(reversed(rollout.prompt_ids)) if i == self._processor.image_token_id), None
        )
        return torch.full_like(offset, -1.0) if behind is None else offset + behind + 1

    def _num_of_kind(self, rollouts: Sequence[Rollout]) -> dict[str, int]:
        distance = torch.cat([self._image_distance(rollout) for rollout in rollouts])
        offset = torch.cat([torch.arange(len(rollout.response_ids)) for rollout in rollouts])
        counts = {name: int(mask.sum()) for name, mask in token_kinds(distance, offset).items()}
        return {name: count for name, count in counts.items() if count > 0}

    def _pack(self, sequences: Sequence[TokenSequence]) -> list[MicroBatch]:
        batches = pack(
            sequences,
            max_tokens=self._row_tokens,
            row_multiple=self._config.row_multiple,
            sequence_multiple=self._config.sequence_multiple,
            image_token_id=self._processor.image_token_id,
            merge_size=self._processor.merge_size,
        )
        return [moved(batch, self._device) for batch in batches]

    def _demonstration(self, sample: SftSample) -> TokenSequence:
        if sample.template == "caption_reasoner":
            text, images = render_caption_reasoner(sample.description or "", sample.prompt.problem), ()
        else:
            text = render_see_think(sample.prompt.problem)
            images = tuple(self._processor.encode_image(image) for image in sample.prompt.images)
        return TokenSequence(self._prompt_ids(text, images), self._processor.response_ids(sample.response), images)

    def _prompt_ids(self, text: str, images: tuple[EncodedImage, ...]) -> tuple[int, ...]:
        ids = self._processor.prompt_ids(text, len(images))
        return self._processor.expand(ids, [image.grid_thw for image in images])

    def _my_rollouts(self, groups: Sequence[RolloutGroup]) -> list[_GroupShare]:
        """This replica's groups. A group is never split: its samples share their images."""
        shares, start = [], 0
        for group in groups:
            shares.append(_GroupShare(group, range(start, start + len(group.pairs))))
            start += len(group.pairs)
        lengths = [_group_tokens(group) for group in groups]
        return [shares[index] for index in split_for_ranks(lengths, self._replicas.size())[self._replicas.rank()]]

    def _masks(self, first: Rollout, second: Rollout | None, streams: Sequence[RewardStream]) -> tuple[Tensor, Tensor]:
        """Which response tokens each stream credits: [S, n] of the first pass and [S, n'] of the second."""
        return self._pass_masks(first, "first", streams), self._pass_masks(second, "second", streams)

    def _pass_masks(self, rollout: Rollout | None, trajectory: str, streams: Sequence[RewardStream]) -> Tensor:
        if rollout is None:
            return torch.zeros(len(streams), 0)
        rows = torch.zeros(len(streams), len(rollout.response_ids))
        for row, stream in zip(rows, streams, strict=True):
            if stream.trajectory == trajectory:
                row.copy_(self._segment(rollout, stream.tokens))
        return rows

    def _segment(self, rollout: Rollout, tokens: str) -> Tensor:
        """1.0 on the response tokens of the segment. `reasoning` is all that is outside the description block."""
        everything = torch.ones(len(rollout.response_ids))
        if tokens == "response":
            return everything
        block = description_block(rollout.response_text)
        inside = torch.zeros(len(rollout.response_ids))
        if block is not None:
            inside = torch.tensor(self._processor.segment_mask(rollout.response_ids, block), dtype=torch.float32)
        return inside if tokens == "description" else everything - inside


def _with_grad_rows(
    batch: MicroBatch, advantages: Tensor, weights: Tensor, streams: Sequence[RewardStream]
) -> MicroBatch:
    """The loss depends on the tokens that a stream credits with an advantage or holds to the reference. Others, such as
    those of a group with equal rewards where there is no KL term, cost no backward in the output head."""
    held = torch.tensor([stream.kl_coef > 0 for stream in streams], device=weights.device)[:, None]
    counts = ((weights != 0) & (held | (advantages != 0))).any(0)
    return batch if counts.all() else replace(batch, grad_rows=torch.nonzero(counts).squeeze(1))


@dataclass(frozen=True)
class _GroupShare:
    group: RolloutGroup
    indices: range  # of its rollouts, among all rollouts of the step


def _group_tokens(group: RolloutGroup) -> int:
    responses = [response for pair in group.pairs for response in (pair.first, pair.second) if response is not None]
    return sum(len(response.prompt_ids) + len(response.response_ids) for response in responses)
