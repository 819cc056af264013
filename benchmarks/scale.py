"""What a step's bookkeeping costs a rank, and what a rank receives and decodes, at the size of a cluster.

    python -m benchmarks.scale --ranks 8 64 512

One process stands for one rank after another; the others are not there. The step has --prompts prompts of 8 samples and
two passes, in the mix of lengths of `benchmarks.packing`, a prompt for each rank where there are more ranks. Columns,
each of the rank that has most unless it says otherwise:

    ledger kB    of the whole step, on every rank
    line us      to write the lines of a group, by the rank that holds it
    plan ms      lines to ledger, advantages, weights of all tokens, and who trains what, for all four optimizer steps
    send ms      to find and pack what a rank has for others, and to unpack what it gets
    get MB       payload that a rank receives; all is what each rank received before there was a ledger, the same
                 responses as Python's tuples, pickled
    decodes      images that a rank decodes; all of them before
    balance      tokens of the fullest replica over the mean
    MiB          peak of what Python and torch allocate for all of that
"""

from __future__ import annotations

import argparse
import pickle
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from benchmarks.packing import length_mix
from megatron_sr1.config import ObjectiveConfig
from megatron_sr1.objective import token_weights
from megatron_sr1.ranks import OneRank
from megatron_sr1.streams import PRESETS
from megatron_sr1.training.ledger import StepLedger, slots_of
from megatron_sr1.training.live_groups import step_advantages
from megatron_sr1.training.payload import FIRST, Payload, Place, share_responses
from megatron_sr1.training.recorder import GroupTracks, Recorder
from megatron_sr1.training.step_rewards import all_rewards
from megatron_sr1.types import Prompt, Rollout, RolloutGroup, RolloutPair

PRESET, SAMPLES, OPTIMIZER_STEPS = PRESETS["vision_sr1"], 8, 4
IMAGE_TOKEN = 151_655


@dataclass(frozen=True)
class Apart(OneRank):
    """A rank without its neighbours: what it would receive is zeros, and is counted."""

    received: list[int] = field(default_factory=list)

    def swap(self, pieces: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Zeros, of those sizes."""
        self.received.append(4 * sum(sizes))
        return [torch.zeros(size, dtype=torch.int32) for size in sizes]


class Shown:
    """An image by its size alone."""

    size = (728, 588)


def made_groups(numbers: Sequence[int]) -> list[RolloutGroup]:
    """Groups of the mix; a number always gives the same group."""
    return [_group(number) for number in numbers]


def _group(number: int) -> RolloutGroup:
    pairs, sequences = [], length_mix(1, number, SAMPLES)
    firsts = [index for index, sequence in enumerate(sequences) if sequence.images]
    for sample, start in enumerate(firsts):
        end = firsts[sample + 1] if sample + 1 < len(firsts) else len(sequences)
        first, *later = [_rollout(len(each.prompt_ids), len(each.response_ids)) for each in sequences[start:end]]
        pairs.append(RolloutPair(sample, first, later[0] if later else None, "seen" if later else None))
    return RolloutGroup(number, Prompt(f"sample-{number}", "?", "1", (Shown(),)), tuple(pairs))  # type: ignore[arg-type]


def _rollout(prompt: int, response: int) -> Rollout:
    ids = tuple(range(100_000, 100_000 + prompt))
    return Rollout(
        "0/x/0/first", ids, tuple(range(90_000, 90_000 + response)), "", (-0.5,) * response, "stop", 0, 0.0, 1.0
    )


def recorded(groups: Sequence[RolloutGroup]) -> tuple[StepLedger, dict[int, GroupTracks]]:
    """As their rank records them."""

    def masks(response: object) -> Tensor:
        own = [stream.trajectory == response.pass_name for stream in PRESET.streams]  # type: ignore[attr-defined]
        length = len(response.rollout.response_ids)  # type: ignore[attr-defined]
        return torch.tensor(own, dtype=torch.float32)[:, None].expand(-1, length)

    recorder = Recorder(PRESET, SAMPLES, masks, IMAGE_TOKEN)
    draw = torch.Generator().manual_seed(0)
    rewards = [{name: torch.rand(SAMPLES, generator=draw) for name in all_rewards(PRESET)} for _ in groups]
    return recorder.record(groups, rewards, OneRank())


def planned(rows: Tensor, replicas: int) -> tuple[StepLedger, list[tuple[StepLedger, list[list[Place]]]]]:
    """What every rank makes of the lines of all."""
    ledger = StepLedger.empty(PRESET, SAMPLES).of_rows(rows)
    step_advantages(ledger, PRESET, ObjectiveConfig())
    size, plans = -(-ledger.num_groups // OPTIMIZER_STEPS), []
    for start in range(0, ledger.num_groups, size):
        share = ledger.of(slice(start, start + size))
        counts = share.in_stream.flatten(0, 1).transpose(0, 1).long()
        token_weights(counts.flatten(1), "token_mean")
        plans.append((share, share_responses(share, slots_of(PRESET), replicas, share_prefix=True)))
    return ledger, plans


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _tokens(ledger: StepLedger, places: Sequence[Place]) -> int:
    """That a replica trains, the prompt of a group's first passes once."""
    prompts, responses = ledger.prompt_tokens.numpy(), ledger.response_tokens.numpy()
    first = {place.group: int(prompts[place]) for place in places if place.slot == FIRST}
    later = sum(int(prompts[place]) for place in places if place.slot != FIRST)
    return sum(int(responses[place]) for place in places) + sum(first.values()) + later


def measure(ranks: int, of_engine: int, of_replica: int, prompts: int) -> dict[str, float]:
    """Figures of one number of ranks."""
    engines, replicas = max(1, ranks // of_engine), max(1, ranks // of_replica)
    ledger, _ = recorded(made_groups(range(prompts)))
    ledger = replace(ledger, holder=ledger.number * engines // prompts * of_engine)
    rows = ledger.as_rows()
    holder = int(ledger.holder.bincount().argmax())
    own = made_groups(ledger.number[ledger.holder == holder].tolist())
    line = min(_seconds(lambda: recorded(own)) for _ in range(3)) / len(own)
    _, held = recorded(own)
    plan = min(_seconds(lambda: planned(rows, replicas)) for _ in range(3))
    tracemalloc.start()
    ledger, plans = planned(rows, replicas)
    decodes, fullest = set(ledger.number[ledger.holder == holder].tolist()), 0.0
    apart = Apart(holder, ranks)
    payload = Payload(apart, [rank // of_replica for rank in range(ranks)])
    for share, shares in plans:
        loads = [_tokens(share, each) for each in shares]
        fullest = max(fullest, max(loads) * replicas / sum(loads))
        payload.fetch(share, shares, held)
        seen = [int(share.number[p.group]) for p in shares[holder // of_replica] if p.slot == FIRST]
        decodes |= set(seen[:: min(of_replica, max(1, len(seen)))])  # the ranks of a stage share a replica's images
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    received = sum(apart.received)
    sending = _seconds(lambda: [payload.fetch(share, shares, held) for share, shares in plans])
    pickled = len(pickle.dumps(own, protocol=5)) * prompts / len(own)
    return {
        "ledger kB": rows.nbytes / 1e3,
        "line us": 1e6 * line,
        "plan ms": 1e3 * plan,
        "send ms": 1e3 * sending,
        "get MB": received / 1e6,
        "all MB": pickled / 1e6,
        "decodes": len(decodes),
        "of": prompts,
        "balance": fullest,
        "MiB": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--engine", type=int, default=1, help="ranks of an engine")
    parser.add_argument("--replica", type=int, default=1, help="ranks of a replica of the policy")
    parser.add_argument("--prompts", type=int, default=512, help="of a step")
    args = parser.parse_args()
    torch.set_num_threads(1)
    layout = f"{args.engine} ranks an engine, {args.replica} a replica"
    print(f"{args.prompts} prompts x {SAMPLES} samples x 2 passes; {layout}")
    for number, ranks in enumerate(args.ranks):
        found = measure(ranks, args.engine, args.replica, max(args.prompts, ranks // args.engine))
        if number == 0:
            print(f"{'ranks':>6} " + " ".join(f"{name:>9}" for name in found))
        print(f"{ranks:6} " + " ".join(f"{value:9.2f}" for value in found.values()), flush=True)


if __name__ == "__main__":
    main()
