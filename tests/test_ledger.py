"""The ledger of a step, and its payload: the same on every rank, small, and sent to nobody who does not train it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from megatron_sr1.packing.bins import MAX_IMBALANCE
from megatron_sr1.ranks import Exchange, OneRank
from megatron_sr1.streams import PRESETS, Preset
from megatron_sr1.training.ledger import StepLedger, slots_of
from megatron_sr1.training.payload import Payload, Place, share_responses
from megatron_sr1.training.recorder import GroupTracks
from megatron_sr1.training.step_rewards import all_rewards, num_readings
from megatron_sr1.types import LaterPass, Prompt, Reading, Rollout, RolloutGroup, RolloutPair
from tests.pass_cases import preset as preset_with
from tests.ranks import run_ranks
from tests.step_cases import IMAGE_TOKEN, recorder
from tests.thread_ranks import on_threads

SAMPLES = 3
PRESET = PRESETS["vision_sr1"]
SAMPLED = preset_with({"name": "second", "samples": 2}, {"name": "blind", "context": "nothing"})


def groups_of(count: int, later: Sequence[LaterPass], seed: int = 0) -> list[RolloutGroup]:
    """Of all shapes: without images, without a description, cut, long and short; numbered with gaps."""
    draw = random.Random(seed)

    def rollout(name: str, prompt: int, image: bool) -> Rollout:
        ids = ([IMAGE_TOKEN] * 5 if image else []) + [draw.randrange(9, 10**5) for _ in range(prompt)]
        response = tuple(draw.randrange(9, 10**5) for _ in range(draw.randint(1, 40)))
        logprobs = tuple(-draw.random() for _ in response)
        kind: Any = draw.choice(["stop", "length"])
        return Rollout(name, tuple(ids), response, "t", logprobs, kind, 0, draw.random(), 1 + draw.random())

    groups = []
    for index in range(count):
        shown = draw.random() < 0.8
        prompt = Prompt(f"p{index}", "?", "1", (Image.new("RGB", (8, 8)),) if shown else ())
        first = rollout("first", draw.randint(1, 60), shown)
        pairs = []
        for sample in range(SAMPLES):
            own = rollout("first", 0, False)
            own = Rollout(**{**vars(own), "prompt_ids": first.prompt_ids})  # siblings share it
            asked = shown and draw.random() < 0.8
            second = rollout("second", draw.randint(1, 50), False) if asked else None
            further = [
                Reading(one.name, number, rollout(one.name, 4, False), None)
                for one in later
                for number in range(one.samples)
                if asked and (one.name, number) != ("second", 0)
            ]
            pairs.append(RolloutPair(sample, own, second, "d" if asked else None, draw.random() < 0.3, tuple(further)))
        groups.append(RolloutGroup(3 * index + index % 2, prompt, tuple(pairs)))
    return groups


def rewards_of(groups: Sequence[RolloutGroup], preset: Preset) -> list[dict[str, Tensor]]:
    def one(name: str, number: int) -> Tensor:
        m = num_readings(name, preset)
        return torch.rand(SAMPLES, *([m] if m > 1 else []), generator=torch.Generator().manual_seed(number))

    return [{name: one(name, group.group_id) for name in all_rewards(preset)} for group in groups]


def recorded(
    groups: Sequence[RolloutGroup], preset: Preset, ranks: Exchange, holds: Callable[[int], bool]
) -> tuple[StepLedger, dict[int, GroupTracks]]:
    own = [group for index, group in enumerate(groups) if holds(index)]
    return recorder(preset, SAMPLES).record(own, rewards_of(own, preset), ranks)


def same(ours: StepLedger, theirs: StepLedger) -> bool:
    pairs = zip(ours.columns(), theirs.columns(), strict=True)
    return all(torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0)) and a.dtype == b.dtype for a, b in pairs)


# ---------------------------------------------------------------- the ledger
@pytest.mark.parametrize("preset", [PRESET, SAMPLED], ids=["two passes", "samples of a pass"])
def test_it_says_what_the_groups_are(preset: Preset) -> None:
    groups = groups_of(20, preset.passes.later)
    ledger, tracks = recorded(groups, preset, OneRank(), lambda index: True)
    slots, rewards = slots_of(preset), rewards_of(groups, preset)
    assert ledger.number.tolist() == [group.group_id for group in groups]
    for g, group in enumerate(groups):
        assert bool(ledger.shown[g]) is bool(group.prompt.images)
        for k, pair in enumerate(group.pairs):
            assert bool(ledger.described[g, k]) is (pair.description is not None)
            for n, slot in enumerate(slots):
                found = [pair.first] if slot.pass_name == "first" else []
                found += [r.rollout for r in pair.readings(slot.pass_name) if r.number == slot.number]
                assert bool(ledger.answered[g, k, n]) is bool(found)
                assert ((k, n) in tracks[group.group_id]) is (bool(found) and slot.scored)
                for rollout in found:
                    lengths = (len(rollout.prompt_ids), len(rollout.response_ids))
                    assert (int(ledger.prompt_tokens[g, k, n]), int(ledger.response_tokens[g, k, n])) == lengths
                    assert bool(ledger.cut[g, k, n]) is (rollout.finish_reason == "length")
            for s, stream in enumerate(preset.streams):
                own = [r.rollout for r in pair.readings(stream.trajectory)]
                own = [pair.first] if stream.trajectory == "first" else own
                counts = [len(rollout.response_ids) for rollout in own] or [0]
                assert ledger.in_stream[g, k, s].tolist() == counts + [0] * (preset.most_samples - len(counts))
        for name, value in rewards[g].items():
            assert torch.equal(ledger.rewards[name][g], value)
    assert not ledger.answered.all() and ledger.cut.any() and not ledger.shown.all(), "of all shapes"


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=0, max_size=12), st.integers(1, 5))
def test_every_rank_has_the_whole_of_it_whoever_holds_what(holders: list[int], num_ranks: int) -> None:
    groups = groups_of(len(holders), PRESET.passes.later)
    alone, _ = recorded(groups, PRESET, OneRank(), lambda index: True)

    def one(ranks: Exchange) -> tuple[StepLedger, dict[int, GroupTracks]]:
        return recorded(groups, PRESET, ranks, lambda index: holders[index] % num_ranks == ranks.rank)

    for rank, (ledger, tracks) in enumerate(on_threads(num_ranks, one)):
        assert ledger.holder.tolist() == [holder % num_ranks for holder in holders]
        assert same(replace(ledger, holder=alone.holder), alone)
        assert sorted(tracks) == ledger.number[ledger.holder == rank].tolist()


def test_two_ranks_with_one_group_are_a_bug() -> None:
    groups = groups_of(2, PRESET.passes.later)
    with pytest.raises((AssertionError, RuntimeError)):
        on_threads(2, lambda ranks: recorded(groups, PRESET, ranks, lambda index: True))


def test_what_one_rank_cannot_record_every_rank_hears_of() -> None:
    groups = groups_of(6, PRESET.passes.later)
    odd = replace(groups[2], prompt=replace(groups[2].prompt, metadata={"facts": "3"}))
    groups[2] = replace(odd, pairs=tuple(replace(pair, description="d") for pair in odd.pairs))

    def one(ranks: Exchange) -> str:
        with pytest.raises(ValueError, match="facts") as error:
            recorded(groups, PRESET, ranks, lambda index: index % 3 == ranks.rank)
        return str(error.value)

    assert len(set(on_threads(3, one))) == 1


def test_a_group_is_about_a_kilobyte() -> None:
    (group,) = groups_of(1, PRESET.passes.later)
    pairs = tuple(RolloutPair(**{**vars(group.pairs[0]), "sample_index": k}) for k in range(8))
    made = RolloutGroup(0, group.prompt, pairs)
    rewards = {name: torch.zeros(8) for name in all_rewards(PRESET)}
    ledger, _ = recorder(PRESET, 8).record([made], [rewards], OneRank())
    assert ledger.as_rows().nbytes < 1500


# ---------------------------------------------------------------- the payload
def expected(groups: Sequence[RolloutGroup], ledger: StepLedger, place: Place) -> tuple[tuple[int, ...], ...]:
    pair = next(group for group in groups if group.group_id == int(ledger.number[place.group])).pairs[place.sample]
    slot = slots_of(PRESET)[place.slot]
    rollout = pair.first if slot.pass_name == "first" else pair.readings(slot.pass_name)[slot.number].rollout
    return rollout.prompt_ids, rollout.response_ids, tuple(torch.tensor(rollout.generator_logprobs).tolist())


def fetched(groups: Sequence[RolloutGroup], ranks: Exchange, replica_of: Sequence[int], engines: int) -> int:
    """Checks all that a rank gets; returns the number of replicas."""
    ledger, held = recorded(groups, PRESET, ranks, lambda index: index % engines == ranks.rank)
    num_replicas = max(replica_of) + 1
    shares = share_responses(ledger, slots_of(PRESET), num_replicas)
    everything = sorted(place for share in shares for place in share)
    scored = torch.tensor([slot.scored for slot in slots_of(PRESET)])
    assert everything == [Place(*place) for place in (ledger.answered & scored).nonzero().tolist()]
    mine = shares[replica_of[ranks.rank]]
    tracks = Payload(ranks, replica_of).fetch(ledger, shares, held)
    for place, track in zip(mine, tracks, strict=True):
        prompt, response, logprobs = expected(groups, ledger, place)
        assert (tuple(track.prompt_ids.tolist()), tuple(track.response_ids.tolist())) == (prompt, response)
        assert tuple(track.generator_logprobs.tolist()) == logprobs
        own = [stream.trajectory == slots_of(PRESET)[place.slot].pass_name for stream in PRESET.streams]
        assert track.credited.tolist() == [sum(1 << s for s, mine in enumerate(own) if mine)] * len(response)
    return num_replicas


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 14), st.integers(1, 5), st.integers(1, 3), st.integers(1, 5))
def test_each_replica_gets_its_own_responses_to_the_bit(
    count: int, replicas: int, ranks_of_one: int, engines: int
) -> None:
    replica_of = [rank // ranks_of_one for rank in range(replicas * ranks_of_one)]
    groups = groups_of(count, PRESET.passes.later, seed=count)
    on_threads(len(replica_of), lambda ranks: fetched(groups, ranks, replica_of, min(engines, len(replica_of))))


def on_four_ranks(rank: int, num_ranks: int, folder: str) -> None:
    """Every collective is counted: what kind it is, and what a rank receives of others."""
    from megatron_sr1.platform import GroupRanks

    calls: list[tuple[str, int]] = []
    swap, gather, objects = (
        torch.distributed.all_to_all_single,
        torch.distributed.all_gather_into_tensor,
        torch.distributed.all_gather_object,
    )

    def counted_swap(output: Tensor, *rest: Any, **more: Any) -> None:
        calls.append(("swap", output.nbytes))
        swap(output, *rest, **more)

    def counted_gather(output: Tensor, *rest: Any, **more: Any) -> None:
        calls.append(("gather", output.nbytes))
        gather(output, *rest, **more)

    def counted_objects(*arguments: Any, **more: Any) -> None:
        calls.append(("complaints", len(arguments[1])))
        objects(*arguments, **more)

    torch.distributed.all_to_all_single = counted_swap
    torch.distributed.all_gather_into_tensor = counted_gather
    torch.distributed.all_gather_object = counted_objects
    groups, ranks = groups_of(32, PRESET.passes.later), GroupRanks()
    for engines, replica_of in ((4, [0, 1, 2, 3]), (1, [0, 1, 2, 3]), (2, [0, 0, 1, 1]), (4, [0, 0, 0, 0])):
        calls.clear()
        num_replicas = fetched(groups, ranks, replica_of, engines)
        responses = [r for group in groups for pair in group.pairs for rs in pair.rollouts().values() for r in rs]
        whole = sum(4 * (len(r.prompt_ids) + 3 * len(r.response_ids)) for r in responses)
        assert [kind for kind, _ in calls] == ["complaints", "gather", "gather", "swap"]
        assert calls[0][1] == 0, "numbers alone, and no words about them"
        assert calls[-1][1] <= 2 * whole / num_replicas
        assert calls[2][1] <= (4 if engines == 1 else 2) * 32 * 1500, "the ledger"
    assert ranks.send_to_main([rank, "x"]) == ([0, "x", 1, "x", 2, "x", 3, "x"] if rank == 0 else [])
    assert ranks.gather_rows(torch.zeros(0, 3)).shape == (0, 3)
    (Path(folder) / f"done{rank}").touch()


def test_four_ranks_send_numbers_and_receive_their_share(tmp_path: Path) -> None:
    run_ranks(4, on_four_ranks, str(tmp_path))
    assert len(list(tmp_path.glob("done*"))) == 4


# ---------------------------------------------------------------- at the size it is for
def test_shares_are_even_and_groups_are_cut_no_more_than_needed() -> None:
    groups = groups_of(64, PRESET.passes.later)
    ledger, _ = recorded(groups, PRESET, OneRank(), lambda index: True)
    tokens = ledger.prompt_tokens + ledger.response_tokens
    for replicas in (1, 3, 16, 50):
        shares = share_responses(ledger, slots_of(PRESET), replicas)
        loads = [sum(int(tokens[tuple(place)]) for place in share) for share in shares]
        assert max(loads) <= max(MAX_IMBALANCE * sum(loads) / replicas, int(tokens.max()))
    assert share_responses(ledger.of([]), slots_of(PRESET), 2) == [[], []]


def test_a_token_s_streams_are_bits_of_a_word() -> None:
    stream = PRESET.streams[0]
    many = tuple(replace(stream, name=f"s{number}") for number in range(32))
    assert Preset("mine", "see_think", many[:31]).streams
    with pytest.raises(ValueError, match="it has 32 streams, more than 31"):
        Preset("mine", "see_think", many)
