"""From demonstrations and scored rollouts to the packed micro-batches of one optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from megatron_sr1.config import Config, row_tokens
from megatron_sr1.objective import stream_advantages, token_kinds, token_weights
from megatron_sr1.packing import Family, moved, pack, split_for_ranks, split_groups
from megatron_sr1.processor import Processor
from megatron_sr1.prompts import templates_of
from megatron_sr1.rewards import find_reward
from megatron_sr1.streams import Preset
from megatron_sr1.training.segments import Response, response_masks, scored_responses
from megatron_sr1.training.step_rewards import per_rollout
from megatron_sr1.training.tokens import ResponseTokens, into_rows
from megatron_sr1.types import (
    MicroBatch,
    Ranks,
    RewardStream,
    Rollout,
    RolloutGroup,
    SftSample,
    TokenSequence,
)

CPU = torch.device("cpu")


@dataclass(frozen=True)
class SftBatch:
    """This replica's share of one optimizer step's demonstrations."""

    micro_batches: list[MicroBatch]
    token_weights: list[Tensor]  # per micro-batch [R]: 1 / response tokens of the whole step


@dataclass(frozen=True)
class StreamRows:
    """This replica's share of one optimizer step's rollouts, packed: the first passes, and the later ones that are
    trained; all that is known before rewards."""

    micro_batches: list[MicroBatch]
    tokens: list[ResponseTokens]  # of each micro-batch
    num_tokens: int  # of these responses, the whole step's, all replicas
    num_of_kind: Mapping[str, int]  # the same by `token_kinds`, those alone that occur


@dataclass(frozen=True)
class StreamBatch(StreamRows):
    """The same with what the loss is to make of it."""

    advantages: list[Tensor]  # of each micro-batch [S, R]


def rollout_advantages(
    groups: Sequence[RolloutGroup],
    rewards: Mapping[str, Tensor],
    preset: Preset,
    eps: float,
    kl: Tensor | None = None,
) -> Tensor:
    """Advantages of a whole rollout batch, before it is cut into mini-batches: scope "batch" means all of it
    (Vision-SR1, arXiv 2508.19652, eq. 6).

    Args:
        rewards: per component [B], rollouts in the order of the groups and, within, of the samples.
        eps: see `group_advantages`.
        kl: [S, B, M], see `stream_advantages`; needed where a stream's KL is in its reward.

    Returns:
        [S, B, M]: of the m samples of a stream's pass, each compared with those of all siblings; M is the largest m,
        and what is beyond m is 0.

    Raises:
        ValueError: see `stream_advantages`.
    """
    group_ids = torch.tensor([group.group_id for group in groups for _ in group.pairs])  # [B]
    shown = torch.tensor([bool(group.prompt.images) for group in groups for _ in group.pairs])  # [B]
    advantages = torch.zeros(len(preset.streams), len(group_ids), preset.most_samples)
    for index, stream in enumerate(preset.streams):
        # a prompt without images is not asked a later pass: it is not among those that are compared
        asked = shown if stream.trajectory != "first" else torch.ones_like(shown)
        if not asked.any():
            continue
        number = preset.num_samples(stream.trajectory)
        own = {name: _per_response(name, rewards[name][asked], stream, number) for name, _ in stream.rewards}
        held = None if kl is None else kl[index, asked, :number].flatten()
        found = stream_advantages(stream, own, group_ids[asked].repeat_interleave(number), eps, held)
        advantages[index, asked, :number] = found.view(-1, number)
    return advantages


def _per_response(name: str, reward: Tensor, stream: RewardStream, number: int) -> Tensor:
    """[B * number]: what each response of a stream's pass earns by itself, or else by what its rollout earns."""
    its_own = reward.ndim == 2 and find_reward(name).later == stream.trajectory
    return reward.flatten() if its_own else per_rollout(reward).repeat_interleave(number)


class Batcher:
    """Packs what a policy is trained on."""

    def __init__(self, config: Config, processor: Processor, replicas: Ranks, device: torch.device = CPU) -> None:
        """`device`: where the policy computes, and so where everything it is trained on goes.

        Raises:
            ConfigError: train.micro_batch_tokens has no room for a row of the layout; see `templates_of`.
        """
        self._config = config
        self._row_tokens = row_tokens(config)
        self._templates = templates_of(config)
        self._device = device
        self._processor = processor
        self._replicas = replicas

    def sft(self, samples: Sequence[SftSample]) -> SftBatch:
        """Demonstrations of any template; the response tokens are trained on, each with the same weight."""
        sequences = [self._demonstration(sample) for sample in samples]
        weight = 1.0 / sum(len(sequence.response_ids) for sequence in sequences)
        lengths = [len(sequence.prompt_ids) + len(sequence.response_ids) for sequence in sequences]
        micro_batches = self._pack([sequences[index] for index in self._mine(lengths)])
        weights = [torch.full((len(batch.targets),), weight, device=self._device) for batch in micro_batches]
        return SftBatch(micro_batches, weights)

    def streams(self, rows: StreamRows, advantages: Tensor, preset: Preset) -> StreamBatch:
        """The rows with the advantage of every response token in every stream, and what of them the head must
        differentiate.

        Args:
            rows: see `rows`.
            advantages: [S, B, M], see `rollout_advantages`.
        """
        flat = advantages.flatten(1).to(self._device)  # [S, B * M]
        of_tokens = [flat[:, tokens.place] for tokens in rows.tokens]  # [S, R] each
        triples = zip(rows.micro_batches, rows.tokens, of_tokens, strict=True)
        micro_batches = [self._with_gradients(*triple, preset) for triple in triples]
        return StreamBatch(micro_batches, rows.tokens, rows.num_tokens, rows.num_of_kind, of_tokens)

    def rows(self, groups: Sequence[RolloutGroup], preset: Preset) -> StreamRows:
        """The scored responses of this replica's share of the groups, packed, with the weight of each token in
        every stream.

        Args:
            groups: all groups of the optimizer step, the same on every rank.
        """
        how = (preset.streams, self._config.objective.cut_responses)
        scored = [scored_responses(pair, group.prompt, preset) for group in groups for pair in group.pairs]
        masks = [[response_masks(self._processor, each, *how) for each in responses] for responses in scored]
        weights = self._weights(scored, masks, preset)  # [S, B, M]

        sequences: list[TokenSequence] = []
        responses: list[ResponseTokens] = []
        for group, index, each in self._mine_of(groups, scored):
            response, mask = scored[index][each], masks[index][each]
            rollout, number = response.rollout, response.number
            images = group.prompt.images if response.pass_name == "first" else ()
            seen = tuple(self._processor.encode_image(image) for image in images)
            sequences.append(TokenSequence(rollout.prompt_ids, rollout.response_ids, seen))
            place = index * preset.most_samples + number
            responses.append(
                ResponseTokens(
                    token_weights=weights[:, index, number, None] * mask,
                    generator_logprobs=torch.tensor(rollout.generator_logprobs),
                    image_distance=self._image_distance(rollout),
                    place=torch.full((len(rollout.response_ids),), place),
                )
            )
        micro_batches = self._pack(sequences)
        tokens = [row.moved(self._device) for row in into_rows(responses, micro_batches)]
        rollouts = [response.rollout for pair in scored for response in pair]
        num_tokens = sum(len(rollout.response_ids) for rollout in rollouts)
        return StreamRows(micro_batches, tokens, num_tokens, self._num_of_kind(rollouts))

    def _weights(
        self, scored: Sequence[Sequence[Response]], masks: Sequence[Sequence[Tensor]], preset: Preset
    ) -> Tensor:
        """[S, B, M]: the weight of each token that a stream credits in a response, see `token_weights`. All responses
        of a stream's pass count, those that are missing among them."""
        counts = torch.zeros(len(preset.streams), len(scored), preset.most_samples, dtype=torch.int64)
        for index, responses in enumerate(scored):
            for response, mask in zip(responses, masks[index], strict=True):
                counts[:, index, response.number] += mask.sum(1).long()  # 0 for streams of other passes
        weights = torch.zeros(counts.shape)
        for row, count, stream in zip(weights, counts, preset.streams, strict=True):
            number = preset.num_samples(stream.trajectory)
            row[:, :number] = self._token_weights(count[:, :number].flatten(), stream).view(-1, number)
        return weights

    def _token_weights(self, num_tokens: Tensor, stream: RewardStream) -> Tensor:
        constant = stream.constant_tokens or self._config.rollout.max_response_tokens
        return token_weights(num_tokens, stream.aggregation, constant if stream.aggregation == "constant" else None)

    def _with_gradients(
        self, batch: MicroBatch, tokens: ResponseTokens, advantages: Tensor, preset: Preset
    ) -> MicroBatch:
        """The row with what of its scores the loss depends on."""
        batch = replace(batch, entropy_grad=preset.has_entropy_bonus)
        matters = tokens.matters(preset.streams, advantages)
        if self._config.objective.loss or matters.all():  # a loss of the user's own may look at any token
            return batch
        return replace(batch, grad_rows=torch.nonzero(matters).squeeze(1))

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
        template = self._templates.of_demonstration(sample)
        images = tuple(self._processor.encode_image(image) for image in sample.prompt.images)
        turn = template.render(sample.prompt.problem, len(images), sample.description)
        ids = self._processor.expand(self._processor.turn_ids(turn, len(images)), [image.grid_thw for image in images])
        return TokenSequence(ids, self._processor.response_ids(sample.response), images)

    def _mine(self, lengths: Sequence[int]) -> list[int]:
        """Which of the items of these lengths, in tokens, this replica trains on."""
        return split_for_ranks(lengths, self._replicas.num_ranks)[self._replicas.rank]

    def _mine_of(
        self, groups: Sequence[RolloutGroup], scored: Sequence[Sequence[Response]]
    ) -> Iterator[tuple[RolloutGroup, int, int]]:
        """This replica's responses: their group, the number of their sample among all of the step, and their own among
        those of the sample."""
        samples, places, families = iter(range(len(scored))), [], []
        for group in groups:
            seeing: list[tuple[int, int]] = []
            blind: list[tuple[int, int]] = []
            for n in islice(samples, len(group.pairs)):
                for each, response in enumerate(scored[n]):
                    sees = response.pass_name == "first" and bool(group.prompt.images)
                    (seeing if sees else blind).append((n, each))
            tokens = ([_num_tokens(scored[n][each].rollout) for n, each in part] for part in (seeing, blind))
            places.append([*seeing, *blind])
            families.append(Family(*tokens))
        mine = split_groups(families, self._replicas.num_ranks)[self._replicas.rank]
        for index, place in sorted((index, places[index][number]) for index, number in mine):
            yield groups[index], *place


def _num_tokens(rollout: Rollout) -> int:
    return len(rollout.prompt_ids) + len(rollout.response_ids)
