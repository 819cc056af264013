"""Where each response is trained, and how it gets there: once to each rank of one replica, and to nobody else.

Both ends know from the ledger what is sent, in which order and how long it is, so nothing is said about it. A response
goes as 32-bit words:

    [ image sizes and prompt ids, unless the receiver has them of a sibling | response ids | log-probs | credited ]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_sr1.packing import Family, split_groups
from megatron_sr1.ranks import Exchange
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

    def __init__(self, ranks: Exchange, replica_of: Sequence[int]) -> None:
        """
        Args:
            ranks: all of the job.
            replica_of: the replica that each of them is of.
        """
        self._ranks = ranks
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
        lengths = _Lengths(ledger)
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
                words += [track.image_sizes.flatten(), track.prompt_ids]
            words += [track.response_ids, track.generator_logprobs.view(torch.int32), track.credited]
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

    def __init__(self, ledger: StepLedger) -> None:
        self.num_images = ledger.num_images.tolist()
        self.prompt = ledger.prompt_tokens.tolist()
        self.response = ledger.response_tokens.tolist()

    def of(self, places: Sequence[Place]) -> Iterator[tuple[Place, int]]:
        """Of each of the responses that one rank sends another."""
        for place, is_new in _with_prompts(places):
            group, sample, slot = place
            asked = self.sizes(place) + self.prompt[group][sample][slot]
            yield place, (asked if is_new else 0) + 3 * self.response[group][sample][slot]

    def sizes(self, place: Place) -> int:
        """Of the images that a response was given."""
        return 2 * self.num_images[place.group] if place.slot == FIRST else 0


def _unpacked(places: Sequence[Place], words: Tensor, lengths: _Lengths) -> Iterator[tuple[Place, TokenTrack]]:
    prompts: dict[int, tuple[Tensor, Tensor]] = {}
    pairs = list(lengths.of(places))
    for (place, size), piece in zip(pairs, words.split([size for _, size in pairs]), strict=True):
        group, sample, slot = place
        num_response = lengths.response[group][sample][slot]
        asked, response, logprobs, credited = piece.split([size - 3 * num_response, *[num_response] * 3])
        sizes, ids = asked[: lengths.sizes(place)], asked[lengths.sizes(place) :]
        prompt = (sizes.view(-1, 2), ids)
        if slot == FIRST:
            prompt = prompts.setdefault(group, prompt)
        yield place, TokenTrack(*prompt, response, logprobs.view(torch.float32), credited)
