"""What a slow engine costs a step: prompts dealt out beforehand, and taken as slots get free.

    python -m benchmarks.stragglers --engines 4 --slow 5

Scripted engines on threads, the first of which takes --slow times as long for a response; 64 prompts an engine of one
response each, in --slots slots. Seconds of a step:

    even      no engine is slow
    dealt     each answers its own
    pulled    rollout.pull
    model     work / (sum of speeds), and what a slow engine that takes its last prompts then still needs for them
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from megatron_sr1.types import Prompt, PromptShare
from tests.scripted_engine import ScriptedEngine, generator, sampling
from tests.thread_ranks import Meeting

STEP, EACH = 2e-3, 64  # seconds of a response; prompts of an engine


class Paced(ScriptedEngine):
    """A response takes so long, one after the other."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def step(self) -> list:
        """The next response."""
        time.sleep(self._seconds)
        return super().step()


class Counter:
    """Of all threads."""

    def __init__(self) -> None:
        self._lock, self._number = threading.Lock(), 0

    def begin(self, name: str) -> None:
        """There is one round."""

    def next(self) -> int:
        """The next number."""
        with self._lock:
            self._number += 1
            return self._number - 1


def step_seconds(paces: Sequence[float], slots: int, *, pulled: bool) -> float:
    """Of engines with these seconds a response."""
    number, counter, meeting = len(paces), Counter(), Meeting(len(paces))
    prompts = [Prompt(f"p{index}", "How many?", "1") for index in range(EACH * number)]
    shares = [list(range(engine, len(prompts), number)) for engine in range(number)]
    how = sampling(num_samples=1, later=(), template="cot")

    def one(rank: int) -> None:
        own = {place: prompts[place] for place in shares[rank]}
        share = PromptShare([prompt.key for prompt in prompts], own, shares, prompts.__getitem__)
        options = {"counter": counter, "slots": slots} if pulled else {}
        made = generator(Paced(paces[rank]), engines=meeting.of(rank), weights=dict, **options)
        made.generate(share, how, 0)

    start = time.perf_counter()
    with ThreadPoolExecutor(number) as pool:
        list(pool.map(one, range(number)))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--slow", type=float, default=5.0, help="times as long")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 4, 16])
    args = parser.parse_args()
    even, paces = [STEP] * args.engines, [args.slow * STEP] + [STEP] * (args.engines - 1)
    speeds = sum(1 / pace for pace in paces)
    print(f"{args.engines} engines, one {args.slow:g} times as slow, {EACH * args.engines} prompts")
    print(f"{'slots':>6} {'even':>8} {'dealt':>8} {'pulled':>8} {'model':>8}")
    for slots in args.slots:
        found = [step_seconds(even, slots, pulled=False)]
        found += [step_seconds(paces, slots, pulled=pulled) for pulled in (False, True)]
        model = EACH * args.engines / speeds + (slots + 1) / 2 * args.slow * STEP
        print(f"{slots:6} " + " ".join(f"{value:8.2f}" for value in (*found, model)), flush=True)


if __name__ == "__main__":
    main()
