"""Where each response is trained, and how it gets there: once to each rank of one replica, and to nobody else.

Both ends know from the ledger what is sent, in which order and how long it is, so nothing is said about it. A response
goes as 32-bit words:

    [ image sizes, prompt ids and their experts, unless the receiver has them of a sibling
    | response ids | log-probs | credited | experts ]

The experts are there where the generator's choice of them is replayed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_sr1.config import NO_REPLAY, Replay
from megatron_sr1.packing import Family, split_groups
from megatron_sr1.ranks import Exchange
from megatron_sr1.training.expert_ids import as_words, num_words, of_words
from megatron_sr1.training.ledger import FIRST, Slot, StepLedger
from megatron_sr1.training.recorder import GroupTracks
from megatron_sr1.types import TokenTrack


class Place(NamedTuple):
    """A response that is trained."""

    group: int  # row of the ledger
    sample: int
    slot: int


def share_responses(
    ledger: StepLedger, slots: Sequence[Slot], num_replicas: int, *, share_prefix: bool = False
) -> list[list[Place]]:
    """The responses that each replica trains, balanced by their tokens: see `packing.split_groups`.

    Args:
        share_prefix: the prompt of a group's first passes counts once on a replica, see `packing.pack`.

    Returns:
        For each replica, in order.
    """
    scored = [number for number, slot in enumerate(slots) if slot.scored]
    prompts, own = ledger.prompt_tokens.tolist(), ledger.response_tokens.tolist()
    there, shown = ledger.answered.tolist(), ledger.shown.tolist()
    places, families = [], []
    for group, sees in enumerate(shown):
        seeing: list[Place] = []
        blind: list[Place] = []
        for sample, answered in enumerate(there[group]):
            for slot in scored:
                if answered[slot]:
                    together = slot == FIRST and (sees or share_prefix)
                    (seeing if together else blind).append(Place(group, sample, slot))
        shared = prompts[group][seeing[0].sample][FIRST] if seeing and share_prefix else 0

        def length(place: Place, has: int) -> int:
            return prompts[place.group][place.sample][place.slot] + own[place.group][place.sample][place.slot] - has

        places.append([*seeing, *blind])
        families.append(Family([length(place, shared) for place in seeing], [length(p, 0) for p in blind], shared))
    shares = split_groups(families, num_replicas)
    return [sorted(places[group][number] for group, number in share) for share in shares]


class Payload:
    """Sends responses from the ranks that hold them to those that train them."""

    def __init__(self, ranks: Exchange, replica_of: Sequence[int], replay: Replay = NO_REPLAY) -> None:
        """
        Args:
            ranks: all of the job.
            replica_of: the replica that each of them is of.
        """
        self._ranks, self._replay = ranks, replay
        self._replica_of = replica_of

    def fetch(
        self, ledger: StepLedger, shares: Sequence[Sequence[Place]], held: Mapping[int, GroupTracks]
    ) -> list[TokenTrack]:
        """This rank's responses, in the order of its replica's share. Collective.

        Args:
            shares: see `share_responses`.
            held: the groups that this rank has, by number.
        """
        holders = ledger.holder.tolist()
        lengths = _Lengths(ledger, self._replay)
        pieces = [self._piece(shares[replica], ledger, holders, held) for replica in range(len(shares))]
        mine: list[list[Place]] = [[] for _ in self._replica_of]
        for place in shares[self._replica_of[self._ranks.rank]]:
            mine[holders[place.group]].append(place)
        sizes = [sum(size for _, size in lengths.of(places)) for places in mine]
        received = self._ranks.swap([pieces[replica] for replica in self._replica_of], sizes)
        found = {
            place: track
            for places, words in zip(mine, received, strict=True)
            for place, track in _unpacked(places, words, lengths)
        }
        return [found[place] for place in shares[self._replica_of[self._ranks.rank]]]

    def _piece(
        self, share: Sequence[Place], ledger: StepLedger, holders: Sequence[int], held: Mapping[int, GroupTracks]
    ) -> Tensor:
        """What this rank has for a replica."""
        words, numbers = [torch.zeros(0, dtype=torch.int32)], ledger.number.tolist()
        for place, is_new in _with_prompts([place for place in share if holders[place.group] == self._ranks.rank]):
            track = held[numbers[place.group]][place.sample, place.slot]
            if is_new:
                words += [track.image_sizes.flatten(), track.prompt_ids, as_words(track.prompt_experts)]
            words += [track.response_ids, track.generator_logprobs.view(torch.int32), track.credited]
            words.append(as_words(track.response_experts))
        return torch.cat(words)


def _with_prompts(places: Sequence[Place]) -> Iterator[tuple[Place, bool]]:
    """What one rank sends another, and whether the prompt goes along: that of siblings' first passes goes once."""
    sent: set[int] = set()
    for place in places:
        yield place, place.slot != FIRST or place.group not in sent
        if place.slot == FIRST:
            sent.add(place.group)


class _Lengths:
    """Of what is sent, in words."""

    def __init__(self, ledger: StepLedger, replay: Replay) -> None:
        self.num_images = ledger.num_images.tolist()
        self.prompt = ledger.prompt_tokens.tolist()
        self.response = ledger.response_tokens.tolist()
        self.replay = replay

    def of(self, places: Sequence[Place]) -> Iterator[tuple[Place, int]]:
        """Of each of the responses that one rank sends another."""
        for place, is_new in _with_prompts(places):
            yield place, sum(self.asked(place) if is_new else ()) + sum(self.answered(place))

    def asked(self, place: Place) -> tuple[int, int, int]:
        """Of the sizes of the images that a response was given, its prompt's ids and their experts."""
        num_tokens = self.prompt[place.group][place.sample][place.slot]
        sizes = 2 * self.num_images[place.group] if place.slot == FIRST else 0
        return sizes, num_tokens, num_words(num_tokens, self.replay)

    def answered(self, place: Place) -> tuple[int, int, int, int]:
        """Of its ids, their log-probs, who credits them, and their experts."""
        num_tokens = self.response[place.group][place.sample][place.slot]
        return num_tokens, num_tokens, num_tokens, num_words(max(num_tokens - 1, 0), self.replay)


def _unpacked(places: Sequence[Place], words: Tensor, lengths: _Lengths) -> Iterator[tuple[Place, TokenTrack]]:
    prompts: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
    pairs, replay = list(lengths.of(places)), lengths.replay
    for (place, size), piece in zip(pairs, words.split([size for _, size in pairs]), strict=True):
        answered = lengths.answered(place)
        asked, response, logprobs, credited, chosen = piece.split([size - sum(answered), *answered])
        if len(asked):
            sizes, ids, experts = asked.split(lengths.asked(place))
            prompt = (sizes.view(-1, 2), ids, of_words(experts, len(ids), replay))
            if place.slot == FIRST:
                prompts[place.group] = prompt
        else:
            prompt = prompts[place.group]
        after = of_words(chosen, max(len(response) - 1, 0), replay)
        yield place, TokenTrack(*prompt[:2], response, logprobs.view(torch.float32), credited, prompt[2], after)
