"""From demonstrations and scored rollouts to the packed micro-batches of one optimizer step."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_sr1.config import NO_REPLAY, Config, Replay, row_tokens
from megatron_sr1.objective import stream_advantages, token_weights
from megatron_sr1.packing import moved, pack
from megatron_sr1.platform.precision import shares_prefixes
from megatron_sr1.processor import Processor
from megatron_sr1.prompts import templates_of
from megatron_sr1.ranks import Exchange, agreed
from megatron_sr1.rewards import find_reward
from megatron_sr1.streams import Preset
from megatron_sr1.training.contrasts import ContextMaker, ContrastRows
from megatron_sr1.training.ledger import FIRST, KINDS, Slot, StepLedger, slots_of
from megatron_sr1.training.payload import Place
from megatron_sr1.training.recorder import image_distance, segment_masks, stream_masks
from megatron_sr1.training.step_rewards import per_rollout
from megatron_sr1.training.tokens import ResponseTokens, into_rows
from megatron_sr1.types import (
    DrawnPrompts,
    EncodedImage,
    MicroBatch,
    RewardStream,
    Routing,
    SftSample,
    TokenSequence,
    TokenTrack,
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
    num_compared: int  # of these the ones whose engine saw what the trainer sees: those of no distorted first pass
    num_of_kind: Mapping[str, int]  # the same by `token_kinds`, those alone that occur
    share: Sequence[Place]  # the responses of this replica, in the order that was packed
    contrasts: Mapping[str, ContrastRows]  # by name

    @property
    def num_responses(self) -> int:
        """Of this replica."""
        return len(self.share)


@dataclass(frozen=True)
class StreamBatch(StreamRows):
    """The same with what the loss is to make of it."""

    advantages: list[Tensor] = field(default_factory=list)  # of each micro-batch [S, R]


def rollout_advantages(
    ledger: StepLedger,
    rewards: Mapping[str, Tensor],
    preset: Preset,
    eps: float,
    kl: Tensor | None = None,
    earned: Tensor | None = None,
) -> Tensor:
    """Advantages of a whole rollout batch, before it is cut into mini-batches: scope "batch" means all of it
    (Vision-SR1, arXiv 2508.19652, eq. 6).

    Args:
        rewards: those of the ledger, or what a filter has left of them.
        eps: see `group_advantages`.
        kl, earned: [S, B, M], see `stream_advantages`; needed where a stream's KL, or its contrast, is in its reward.

    Returns:
        [S, B, M]: of the m samples of a stream's pass, each compared with those of all siblings; M is the largest m,
        and what is beyond m is 0. Where the reward that gates a stream is less than 1, its advantage is 0, however it
        compares.

    Raises:
        ValueError: see `stream_advantages`.
    """
    group_ids, shown = ledger.rollout_group, ledger.rollout_shown  # [B]
    advantages = torch.zeros(len(preset.streams), len(group_ids), preset.most_samples)
    for index, stream in enumerate(preset.streams):
        # a prompt without images is not asked a later pass: it is not among those that are compared
        asked = shown if stream.trajectory != "first" else torch.ones_like(shown)
        if not asked.any():
            continue
        number = preset.num_samples(stream.trajectory)
        own = {name: _per_response(name, rewards[name][asked], stream, number) for name, _ in stream.rewards}
        more = [None if each is None else each[index, asked, :number].flatten() for each in (kl, earned)]
        found = stream_advantages(stream, own, group_ids[asked].repeat_interleave(number), eps, *more)
        if stream.gate:
            found = found * (_per_response(stream.gate, rewards[stream.gate][asked], stream, number) >= 1.0)
        advantages[index, asked, :number] = found.view(-1, number)
    return advantages


def _per_response(name: str, reward: Tensor, stream: RewardStream, number: int) -> Tensor:
    """[B * number]: what each response of a stream's pass earns by itself, or else by what its rollout earns."""
    its_own = reward.ndim == 2 and find_reward(name).later == stream.trajectory
    return reward.flatten() if its_own else per_rollout(reward).repeat_interleave(number)


def response_weights(ledger: StepLedger, preset: Preset, max_response_tokens: int) -> Tensor:
    """[S, B, M]: the weight of each token that a stream credits in a response, see `token_weights`. All responses of a
    stream's pass count, those that are missing among them.

    Args:
        ledger: of all groups of the optimizer step.
        max_response_tokens: what a stream of aggregation "constant" divides by, unless it says another number.
    """
    counts = ledger.in_stream.flatten(0, 1).transpose(0, 1).long()  # [S, B, M]
    weights = torch.zeros(counts.shape)
    for row, count, stream in zip(weights, counts, preset.streams, strict=True):
        number = preset.num_samples(stream.trajectory)
        constant = (stream.constant_tokens or max_response_tokens) if stream.aggregation == "constant" else None
        found = token_weights(count[:, :number].flatten(), stream.aggregation, constant)
        row[:, :number] = found.view(-1, number)
    return weights


def optimizer_shares(places: Sequence[int], config: Config) -> list[slice]:
    """Which groups each optimizer step of a rollout batch trains on: those of the prompts of `train.batch_size`, but
    for groups that were skipped.

    Args:
        places: of the groups in the training batch, increasing.
    """
    size = config.train.batch_size
    firsts = range(0, config.rollout.prompts_per_step, size)
    return [slice(bisect_left(places, first), bisect_left(places, first + size)) for first in firsts]


class Batcher:
    """Packs what a policy is trained on."""

    def __init__(
        self,
        config: Config,
        processor: Processor,
        replicas: Exchange,
        device: torch.device = CPU,
        replay: Replay = NO_REPLAY,
    ) -> None:
        """`device`: where the policy computes, and so where everything it is trained on goes.

        Raises:
            ConfigError: train.micro_batch_tokens has no room for a row of the layout; see `templates_of`.
        """
        self._config = config
        self._row_tokens = row_tokens(config)
        self._templates = templates_of(config)
        self._device = device
        self._replay = replay
        self.share_prefix = shares_prefixes(config, on_cpu=device.type == CPU.type)
        self._processor = processor
        self._replicas = replicas

    def sft(self, samples: Sequence[SftSample]) -> SftBatch:
        """Demonstrations of any template; the response tokens are trained on, each with the same weight. Collective
        over the replicas.

        Args:
            samples: this replica's.

        Raises:
            ValueError: on every rank: an image of one of them cannot be encoded; see `Templates.of_demonstration`.
        """
        sequences = agreed(self._replicas, lambda: [self._demonstration(sample) for sample in samples])
        num_tokens = torch.tensor([[sum(len(sequence.response_ids) for sequence in sequences)]])
        weight = 1.0 / int(self._replicas.gather_rows(num_tokens).sum())
        micro_batches = self._pack(sequences)
        weights = [torch.full((len(batch.targets),), weight, device=self._device) for batch in micro_batches]
        return SftBatch(micro_batches, weights)

    def measured(self, samples: Sequence[SftSample]) -> list[MicroBatch]:
        """Demonstrations whose tokens are scored and not trained on, rows that mark the top; none of none. Collective
        over the replicas. Raises as `sft`."""
        rows = agreed(self._replicas, lambda: self._pack([self._demonstration(sample) for sample in samples]))
        return [replace(batch, marks_top=True) for batch in rows]

    def streams(
        self, rows: StreamRows, advantages: Tensor, preset: Preset, weights: Sequence[Tensor] | None = None
    ) -> StreamBatch:
        """The rows with the advantage of every response token in every stream, and what of them the head must
        differentiate.

        Args:
            rows: see `rows`.
            advantages: [S, B, M], see `rollout_advantages`.
            weights: of each micro-batch [S, R], that scale them; None: 1.
        """
        flat = advantages.flatten(1).to(self._device)  # [S, B * M]
        of_tokens = [flat[:, tokens.place] for tokens in rows.tokens]  # [S, R] each
        if weights is not None:
            of_tokens = [each * weight for each, weight in zip(of_tokens, weights, strict=True)]
        triples = zip(rows.micro_batches, rows.tokens, of_tokens, strict=True)
        micro_batches = [self._with_gradients(*triple, preset) for triple in triples]
        return StreamBatch(**{**vars(rows), "micro_batches": micro_batches}, advantages=of_tokens)

    def rows(
        self,
        ledger: StepLedger,
        share: Sequence[Place],
        tracks: Sequence[TokenTrack],
        prompts: DrawnPrompts,
        preset: Preset,
        step: int,
        texts: Mapping[int, Mapping[str, str]] | None = None,
    ) -> StreamRows:
        """The responses that this replica trains, packed, with the weight of each token in every stream.

        Args:
            ledger: of all groups of the optimizer step.
            share: this replica's, see `share_responses`.
            tracks: of the responses of the share.
            prompts: of all groups, by number. Only whoever encodes an image has it decoded.
            step: what a contrast draws of pixels depends on it.
            texts: by group of the share, those of contrasts, see `Preset.told_of`.
        """
        slots, numbers = slots_of(preset), ledger.number.tolist()
        first_of = {slot.pass_name: number for number, slot in reversed(list(enumerate(slots)))}
        weights = response_weights(ledger, preset, self._config.rollout.max_response_tokens)  # [S, B, M]
        distorted = ledger.distorted.tolist()
        sequences: list[TokenSequence] = []
        responses: list[ResponseTokens] = []
        encoded: dict[int, tuple[EncodedImage, ...]] = {}  # by group: siblings share them
        for (group, sample, slot), track in zip(share, tracks, strict=True):
            if slot == FIRST and group not in encoded:
                images = prompts.images(
                    numbers[group], [(width, height) for width, height in track.image_sizes.tolist()]
                )
                encoded[group] = tuple(self._processor.encode_image(image) for image in images)
            seen = encoded[group] if slot == FIRST else ()
            its_pass = group * len(slots) + first_of[slots[slot].pass_name]
            ids = (track.prompt_ids.tolist(), track.response_ids.tolist())
            sequences.append(TokenSequence(*ids, seen, its_pass, _experts(track)))
            index, number = group * ledger.num_samples + sample, slots[slot].number
            place = index * preset.most_samples + number
            responses.append(
                ResponseTokens(
                    token_weights=weights[:, index, number, None] * stream_masks(track, len(preset.streams)),
                    generator_logprobs=track.generator_logprobs,
                    image_distance=image_distance(track, self._processor.image_token_id),
                    place=torch.full((len(track.response_ids),), place),
                    segments=segment_masks(track, preset),
                    compared=torch.full((len(track.response_ids),), slot != FIRST or not distorted[group][sample]),
                )
            )
        micro_batches = self._replayed(self._pack(sequences))
        keys = [prompts.keys[int(number)] for number in numbers] if preset.contrasts else []  # of the groups
        make = ContextMaker(self._processor, self._config, step, texts)
        contrasts = {
            contrast.name: self._contrast(
                place, sequences, responses, [group for group, _, _ in share], keys, preset, make
            )
            for place, contrast in enumerate(preset.contrasts)
        }
        tokens = [row.moved(self._device) for row in into_rows(responses, micro_batches)]
        return StreamRows(micro_batches, tokens, *_counts(ledger, slots), share, contrasts)

    def _contrast(
        self,
        place: int,
        sequences: Sequence[TokenSequence],
        responses: Sequence[ResponseTokens],
        groups: Sequence[int],
        keys: Sequence[str],
        preset: Preset,
        make: ContextMaker,
    ) -> ContrastRows:
        """Those of a replica's responses that the contrast at `place` has.

        Args:
            groups: of each response.
            keys: of each group's prompt, which two of them may share.
        """
        contrast, describes = preset.contrasts[place], preset.asked.first.describes
        block = preset.measured.index(describes) if contrast.context == "description" and describes else None
        others: dict[int, TokenSequence] = {}
        for index, (sequence, group) in enumerate(zip(sequences, groups, strict=True)):
            if sequence.images:
                told = torch.zeros(0) if block is None else responses[index].segments[block]
                number = -1 - place * len(keys) - group  # of no other prompt, nor of another context
                other = make.sequence(contrast, sequence, told, keys[group], number, group)
                if other is not None:
                    others[index] = other
        return ContrastRows(self._replayed(self._pack(list(others.values()))), list(others))

    def _with_gradients(
        self, batch: MicroBatch, tokens: ResponseTokens, advantages: Tensor, preset: Preset
    ) -> MicroBatch:
        """The row with what of its scores the loss depends on."""
        batch = replace(batch, entropy_grad=preset.has_entropy_bonus)
        matters = tokens.matters(preset.streams, advantages)
        if self._config.objective.loss or matters.all():  # a loss of the user's own may look at any token
            return batch
        return replace(batch, grad_rows=torch.nonzero(matters).squeeze(1))

    def _replayed(self, rows: list[MicroBatch]) -> list[MicroBatch]:
        """Rows whose passes all follow the first, unless the generator says where their tokens go."""
        if self._replay.who == "none":
            return rows
        return [replace(row, routing=row.routing or Routing()) for row in rows]

    def _pack(self, sequences: Sequence[TokenSequence]) -> list[MicroBatch]:
        batches = pack(
            sequences,
            max_tokens=self._row_tokens,
            row_multiple=self._config.row_multiple,
            sequence_multiple=self._config.sequence_multiple,
            image_token_id=self._processor.image_token_id,
            merge_size=self._processor.merge_size,
            share_prefix=self.share_prefix,
        )
        return [moved(batch, self._device) for batch in batches]

    def _demonstration(self, sample: SftSample) -> TokenSequence:
        template = self._templates.of_demonstration(sample)
        images = tuple(self._processor.encode_image(image) for image in sample.prompt.images)
        turn = template.render(sample.prompt.problem, len(images), sample.description)
        ids = self._processor.expand(self._processor.turn_ids(turn, len(images)), [image.grid_thw for image in images])
        return TokenSequence(ids, self._processor.response_ids(sample.response), images)


def _experts(track: TokenTrack) -> Tensor | None:
    """[p + n - 1, M, k]"""
    parts = [part for part in (track.prompt_experts, track.response_experts) if part is not None]
    return torch.cat(parts) if parts else None


def _counts(ledger: StepLedger, slots: Sequence[Slot]) -> tuple[int, int, dict[str, int]]:
    """`num_tokens`, `num_compared` and `num_of_kind` of `StreamRows`."""
    counts = dict(zip(KINDS, ledger.of_kind.sum((0, 1)).tolist(), strict=True))
    num_tokens = int(ledger.response_tokens[..., [slot.scored for slot in slots]].sum())
    num_distorted = int(ledger.response_tokens[..., FIRST][ledger.distorted].sum())
    return num_tokens, num_tokens - num_distorted, {name: count for name, count in counts.items() if count > 0}
