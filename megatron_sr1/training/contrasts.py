"""First passes under other contexts: what is asked in them, how it is packed, and what the policy says to it.

The same response ids follow another prompt (`streams.Contrast`). A prompt that shows no image, and a response that
describes nothing where its description is wanted, or with it is too long for a row, has no other context: it is not
scored.

Shape legend: R scored tokens of a row, n response tokens of a sequence, P patches, C values of a patch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_sr1.config import Config, row_tokens
from megatron_sr1.packing import gather_rows, scatter_rows
from megatron_sr1.processor import Processor
from megatron_sr1.streams import Contrast
from megatron_sr1.types import EncodedImage, LogProbs, MicroBatch, TokenSequence


@dataclass(frozen=True)
class ContrastRows:
    """Those of a replica's responses that a contrast has, packed."""

    micro_batches: list[MicroBatch]
    sequences: list[int]  # which of the replica's responses they are, in the order that was packed

    def onto_own(self, values: Sequence[Tensor], own: Sequence[MicroBatch], number: int) -> tuple[list[Tensor], ...]:
        """Values of these rows, [..., R] each, where the same tokens are in the rows of their own context; 0 elsewhere.
        And whether there is one, [R] bool.

        Args:
            own: all rows of the `number` responses of the replica.
        """
        found = dict(zip(self.sequences, gather_rows(values, self.micro_batches, len(self.sequences)), strict=True))
        blank = values[0][..., :0] if values else torch.zeros(0)
        lengths = torch.cat([batch.row_sequence for batch in own]).bincount(minlength=number).tolist()
        device = own[0].row_sequence.device
        each = [
            found.get(index, blank.new_zeros(*blank.shape[:-1], length, device=device))
            for index, length in enumerate(lengths)
        ]
        there = [
            torch.full((length,), index in found, device=device, dtype=torch.bool)
            for index, length in enumerate(lengths)
        ]
        return scatter_rows(each, own), scatter_rows(there, own)

    def from_own(self, values: Sequence[Tensor], own: Sequence[MicroBatch], number: int) -> list[Tensor]:
        """Values of the rows of their own context, [..., R] each, where the same tokens are in these rows."""
        each = gather_rows(values, own, number)
        return scatter_rows([each[index] for index in self.sequences], self.micro_batches)


class ContextMaker:
    """Of a replica's share of one optimizer step."""

    def __init__(
        self, processor: Processor, config: Config, step: int, texts: Mapping[int, Mapping[str, str]] | None = None
    ) -> None:
        """
        Args:
            step: what is drawn of pixels depends on it, the run's seed, the prompt and the contrast alone.
            texts: by group and contrast, see `Preset.told_of`.
        """
        self._processor, self._texts = processor, texts or {}
        self._media_ids = frozenset(processor.media_ids)
        self._image_token_id = processor.image_token_id
        self._seed, self._step = config.seed, step
        self._most_told = config.rollout.max_description_tokens
        self._room, self._multiple = row_tokens(config), config.sequence_multiple
        self._made: dict[tuple[str, int], tuple[EncodedImage, ...]] = {}  # siblings share them

    def sequence(
        self, contrast: Contrast, sequence: TokenSequence, described: Tensor, key: str, group: int, of: int = 0
    ) -> TokenSequence | None:
        """The response in its other context; None: there is none.

        Args:
            sequence: a first pass with images.
            described: [n] bool: the block that it describes with; as much of it as a description may have is told.
            key: of its prompt.
            group: a number that no other prompt and context has; those of one may begin alike.
            of: the group that `texts` are of.
        """
        if contrast.context in ("masked", "noise"):
            images = self._made.get((contrast.name, group))
            if images is None:
                images = tuple(
                    self._processor.changed(image, _change(contrast, self._generator(contrast, key, number)))
                    for number, image in enumerate(sequence.images)
                )
                self._made[contrast.name, group] = images
            return replace(sequence, images=images, group=group, experts=None)
        told: list[int] = []
        if contrast.context == "description":
            ids = torch.tensor(list(sequence.response_ids))
            told = [token for token in ids[described].tolist() if token not in self._media_ids][: self._most_told]
            if not told:
                return None
        if contrast.context == "metadata":
            told = list(self._processor.text_ids(self._texts[of][contrast.name]))
        prompt_ids = self._told(sequence.prompt_ids, told)
        num_tokens = len(prompt_ids) + len(sequence.response_ids)
        if num_tokens + -num_tokens % self._multiple > self._room:
            return None
        return replace(sequence, prompt_ids=prompt_ids, images=(), group=group, experts=None)

    def _told(self, prompt_ids: Sequence[int], text: Sequence[int]) -> list[int]:
        """The prompt without its images; `text` is where the first of them was."""
        kept: list[int] = []
        placed = False
        for token in prompt_ids:
            if token not in self._media_ids:
                kept.append(token)
            elif token == self._image_token_id and not placed:
                kept.extend(text)
                placed = True
        return kept

    def _generator(self, contrast: Contrast, key: str, image: int) -> Callable[[], torch.Generator]:
        words = f"{self._seed}/{self._step}/{contrast.name}/{key}/{image}"
        seed = int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big") >> 1
        return lambda: torch.Generator().manual_seed(seed)


def _change(contrast: Contrast, drawn: Callable[[], torch.Generator]) -> Callable[[Tensor], Tensor]:
    """Of the patches [P, C] of an image: some are black, or all have other pixels."""

    def change(patches: Tensor) -> Tensor:
        generator = drawn()
        if contrast.context == "noise":
            return torch.randint(0, 256, patches.shape, generator=generator, dtype=torch.uint8)
        hidden = torch.rand(len(patches), generator=generator) < contrast.share
        return patches.masked_fill(hidden[:, None], 0)

    return change


@dataclass(frozen=True)
class ContrastScores:
    """Log-probs and entropies of a replica's responses under each contrast, without gradient, where they stand in
    their own rows."""

    own: Mapping[str, list[LogProbs] | None]  # by contrast and micro-batch, [R], same weights; None: the trainer's
    under: Mapping[str, list[LogProbs]]  # by contrast and micro-batch, [R]; 0 where it does not have the token
    there: Mapping[str, list[Tensor]]  # whether it has it, bool
    hidden: Mapping[str, list[Tensor | None]] = field(default_factory=dict)  # of the contrast's own rows, where kept

    def without_hidden(self) -> ContrastScores:
        """The same without hidden states, which are large."""
        own = {
            name: None if scores is None else [replace(each, hidden=None) for each in scores]
            for name, scores in self.own.items()
        }
        return replace(self, own=own, hidden={})

    def own_of(self, name: str, index: int, trainer: LogProbs) -> LogProbs:
        """[R] in their own context; `trainer`: the present scores."""
        own = self.own[name]
        return trainer if own is None else own[index]

    def gaps(self, name: str, index: int, trainer: LogProbs) -> tuple[Tensor, Tensor]:
        """How much likelier a token is in its own context, log pi(own) - log pi(contrast), and how much surer the
        policy is there, H(contrast) - H(own): [R] nats each, without gradient; 0 where the contrast lacks the token."""
        own, under, there = self.own_of(name, index, trainer), self.under[name][index], self.there[name][index]
        assert own.entropy is not None and under.entropy is not None, "the policy's head gives both"
        pairs = (own.logprobs - under.logprobs, under.entropy - own.entropy)
        return pairs[0].detach().masked_fill(~there, 0.0), pairs[1].detach().masked_fill(~there, 0.0)

    def joined(self, other: ContrastScores) -> ContrastScores:
        """These and those of other contrasts."""
        under, there = {**self.under, **other.under}, {**self.there, **other.there}
        return ContrastScores({**self.own, **other.own}, under, there, {**self.hidden, **other.hidden})
