"""What a judge as a reward costs a step: the groups of a run's saved rollouts are handed to the graders at the times at
which they were finished then, and a server on loopback answers each question after a given time.

    python -m benchmarks.judge runs/quickstart/grpo/rollouts --latency 0 0.1 0.5 1 --steps 5

    --pass     the endpoint reads a pass, where without it a reward asks: both when a response has its description

    rollout    seconds from a step's first request to its last answer, as it was
    waited     seconds that the rewards take beyond it: what `seconds/reward` is in a run
    share      of both, median over the steps
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from megatron_sr1.config import JudgeConfig
from megatron_sr1.prompts import CAPTION_REASONER
from megatron_sr1.rewards import Ungraded
from megatron_sr1.rewards.workers import Graders
from megatron_sr1.training.rollout_files import step_lines, steps_in
from megatron_sr1.types import Prompt, Reading, Rollout, RolloutGroup, RolloutPair

NAMES = {False: ("acc", "acc_judge", "fmt"), True: ("acc", "acc_vis@reader", "fmt")}  # by whether it reads a pass


def groups_of(path: Path) -> list[tuple[float, RolloutGroup]]:
    """Each group of a file of rollouts with the second at which it was finished, in that order."""
    pairs: dict[int, list[RolloutPair]] = {}
    prompts: dict[int, Prompt] = {}
    for line in step_lines(path):
        if "skipped" in line:
            continue
        number, second = line["group_id"], line["second"]
        prompts[number] = Prompt(line["key"], line["problem"], line["answer"])
        both = (_rollout(line["first"]), None if second is None else _rollout(second))
        pairs.setdefault(number, []).append(RolloutPair(line["sample"], *both, line["description"]))
    groups = [RolloutGroup(number, prompts[number], tuple(found)) for number, found in pairs.items()]
    return sorted(((_finished(group), group) for group in groups), key=lambda item: item[0])


def _rollout(fields: dict[str, Any]) -> Rollout:
    return Rollout(**fields)


def _finished(group: RolloutGroup) -> float:
    return max(one.finished_at for pair in group.pairs for one in (pair.first, pair.second) if one is not None)


@contextmanager
def answering(latency: float) -> Iterator[str]:
    """The base URL of a server that answers every question after `latency` seconds."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": r"\boxed{1}"}}
    body = json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            time.sleep(latency)
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()


def waited(graders: Graders, groups: Sequence[tuple[float, RolloutGroup]]) -> float:
    """Seconds from the last group to all rewards."""
    events: list[tuple[float, Callable[[], None]]] = []
    for finished, group in groups:
        if graders.ask is not None:
            events += [
                (
                    pair.first.finished_at,
                    partial(graders.ask, group.group_id, pair.sample_index, *_question(group, pair)),
                )
                for pair in group.pairs
                if pair.description is not None
            ]
        if graders.ask_early is not None:
            samples = [replace(group, pairs=(pair,)) for pair in group.pairs]
            events += [(pair.pairs[0].first.finished_at, partial(graders.ask_early, pair)) for pair in samples]
        events.append((finished, partial(graders.submit, group)))
    start = time.perf_counter()
    for moment, act in sorted(events, key=lambda event: event[0]):
        time.sleep(max(0.0, moment - (time.perf_counter() - start)))
        act()
    last = time.perf_counter()
    graded = graders.collect()
    assert not any(isinstance(share, Ungraded) for _, share in graded), graded
    graders.readings()
    return time.perf_counter() - last


def _question(group: RolloutGroup, pair: RolloutPair) -> tuple[str, Reading]:
    assert pair.description is not None
    name = f"{pair.first.rollout_id.removesuffix('first')}reader"
    reading = Reading("reader", 0, Rollout(name, (), (), "", (), "stop", 0), pair.description)
    return CAPTION_REASONER.as_question(group.prompt.problem, pair.description), reading


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rollouts", type=Path, help="the folder of a run")
    parser.add_argument("--latency", type=float, nargs="+", default=[0.0, 0.1, 0.5, 1.0], metavar="SECONDS")
    parser.add_argument("--steps", type=int, default=5, help="the last ones")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--pass", dest="reads", action="store_true", help="the endpoint reads a pass")
    args = parser.parse_args()
    steps = [groups_of(path) for path in steps_in(args.rollouts)[-args.steps :]]
    print(f"{'latency s':>10} {'questions':>10} {'rollout s':>10} {'waited s':>10} {'share':>8}")
    for latency in args.latency:
        with answering(latency) as url:
            judge = JudgeConfig(url=url, model="reader", concurrency=args.concurrency).endpoint
            with closing(Graders(NAMES[args.reads], judge=judge, reads=args.reads)) as graders:
                waited(graders, steps[0])  # starts the processes
                times = [(groups[-1][0], waited(graders, groups)) for groups in steps]
        asked = sum(pair.description is not None for groups in steps for _, group in groups for pair in group.pairs)
        rollout, wait = (statistics.median(column) for column in zip(*times, strict=True))
        share = statistics.median(wait / (wait + rollout) for rollout, wait in times)
        print(f"{latency:10.2f} {asked / len(steps):10.0f} {rollout:10.2f} {wait:10.3f} {share:8.1%}")


if __name__ == "__main__":
    main()
