"""The expected time of a step: engines against a simulation of every token, terms against what they are made of."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sr1.cli import main
from megatron_sr1.estimate.host import HF_FILE_BYTES
from megatron_sr1.weights.hf_shards import MAX_SHARD_BYTES
from tests.source_tree import REPOSITORY

RECIPES = REPOSITORY / "examples" / "recipes"
MEASURES = """
import json, sys
from megatron_sr1.platform import start_platform
start_platform()
from dataclasses import replace
from megatron_sr1.config import load_config
from megatron_sr1.estimate import Machine, advice, make_plan
from megatron_sr1.estimate.step_time import GIVEN, rollout_seconds, step_time
found = {}
for name, file, changes in json.load(sys.stdin):
    plan = make_plan("grpo", load_config(file, changes), Machine())
    faster = replace(GIVEN, flops=2 * GIVEN.flops)
    found[name] = {
        "terms": dict(step_time(plan).terms), "faster": dict(step_time(plan, faster).terms),
        "eager": rollout_seconds(plan, graphs=False), "advice": advice(plan), "requests": plan.engine.requests,
        "flops": sum(plan.flops.values()), "rows": plan.num_rows, "row_tokens": plan.row_tokens,
        "host": dict(plan.host), "gradients": max(stage.state.gradients for stage in plan.stages),
    }
print(json.dumps(found))
"""
SEVEN, SEVENTY = RECIPES / "qwen2_5_vl_7b" / "grpo.yaml", RECIPES / "qwen2_5_vl_72b" / "grpo.yaml"
CASES: dict[str, tuple[Path, list[str]]] = {
    "7B": (SEVEN, []),
    "7B/64": (SEVEN, ["nproc=64"]),
    "7B/256 prompts": (SEVEN, ["rollout.prompts_per_step=256"]),
    "7B eager": (SEVEN, ["rollout.cuda_graphs=false"]),
    "7B noisy": (SEVEN, ["objective.distorted={samples: 4, strength: 0.5}"]),
    "7B few": (SEVEN, ["rollout.max_running_requests=32"]),
    "7B waits": (SEVEN, ["train.async_save=false", "train.save_every=10"]),
    "7B export": (SEVEN, ["train.async_save=false", "train.save_every=10", "train.save_hf=true"]),
    "72B": (SEVENTY, []),
}


# ---------------------------------------------------------------- an engine
def token_by_token(requests: list[list[int]], slots: int, seconds: Callable[[int], float]) -> float:
    """Every step of every request, one token each."""
    firsts, later, running, time = list(range(len(requests))), [], [], 0.0
    while firsts or later or running:
        while len(running) < slots and (firsts or later):
            if firsts:
                sample = firsts.pop(0)
                running.append([requests[sample][0], sample, True])
            else:
                sample, tokens = later.pop(0)
                running.append([tokens, sample, False])
        time += seconds(len(running))
        for request in running:
            request[0] -= 1
        for _, sample, is_first in sorted((r for r in running if r[0] == 0), key=lambda r: (r[1], r[2])):
            later += [(sample, tokens) for tokens in requests[sample][1:]] if is_first else []
        running = [request for request in running if request[0]]
    return time


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=3), min_size=1, max_size=12),
    st.integers(1, 9),
    st.sampled_from([(1.0, 0.0), (0.0, 1.0), (0.5, 0.25)]),
)
def test_an_engine_is_simulated_to_the_token(requests: list[list[int]], slots: int, cost: tuple[float, float]) -> None:
    from megatron_sr1.estimate.step_time import simulated

    def seconds(running: int) -> float:
        return cost[0] + cost[1] * running

    expected = token_by_token([list(each) for each in requests], slots, seconds)
    assert simulated(requests, slots, seconds) == pytest.approx(expected, rel=1e-12)


def test_more_slots_take_no_longer_where_a_step_costs_the_same() -> None:
    from megatron_sr1.estimate.step_time import simulated

    draw = random.Random(0)
    requests = [[draw.randint(1, 200), draw.randint(1, 100)] for _ in range(64)]
    times = [simulated(requests, slots, lambda running: 1.0) for slots in (4, 8, 16, 32, 64)]
    assert times == sorted(times, reverse=True)
    assert times[-1] == max(sum(each) for each in requests), "with a slot for each the longest chain is left"
    work = sum(map(sum, requests))
    assert times[0] == pytest.approx(work / 4, rel=0.1), "and with few slots the work"


# ---------------------------------------------------------------- recipes
@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    cases = [(name, str(file), changes) for name, (file, changes) in CASES.items()]
    command = [sys.executable, "-c", MEASURES]
    done = subprocess.run(command, input=json.dumps(cases), text=True, capture_output=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_training_is_the_arithmetic_and_what_is_sent(found: dict[str, Any]) -> None:
    seven = found["7B"]
    computing = 1.05 * seven["flops"] / (8 * 370e12)
    # of 4 tensor ranks each sends three quarters of 4 * H * 2 bytes a token, layer and pass: forward, backward, old
    # log-probs and reference; and of 2 replicas each half of 4 bytes of gradients and 2 of weights, four times a
    # step
    sent = 4 * (2 + 1 + 1) * 28 * 4 * seven["rows"] * seven["row_tokens"] * 3584 * 2 * 0.75 / 400e9
    met = 4 * seven["gradients"] * 1.5 / 2 / 50e9
    assert seven["terms"]["train"] == pytest.approx(computing + sent + met, rel=1e-6)
    assert seven["terms"]["train"] - seven["faster"]["train"] == pytest.approx(computing / 2, rel=1e-6)
    assert seven["terms"]["images"] == 0.0, "hidden behind the rest"


def test_a_decoding_step_costs_what_is_published(found: dict[str, Any]) -> None:
    """vLLM on H100s, eager and with CUDA graphs (vllm-omni #7960: 22 to 13 ms for a 30B mixture, DeepSpeed #8352: up to
    3.7x at small batches): graphs are worth a factor between one and a half and three."""
    for name in ("7B", "72B"):
        assert 1.3 < found[name]["eager"] / found[name]["terms"]["rollout"] < 3


def test_more_engines_and_fewer_prompts_take_less(found: dict[str, Any]) -> None:
    whole, many, few = (found[name]["terms"] for name in ("7B", "7B/64", "7B/256 prompts"))
    assert many["rollout"] < whole["rollout"] / 2 and many["train"] < whole["train"] / 6
    assert many["rollout"] > whole["rollout"] / 8, "the longest responses do not divide"
    assert few["train"] == pytest.approx(whole["train"] / 2, rel=1e-6) and few["exchange"] < whole["exchange"]


def test_a_noisy_copy_of_an_image_is_read_once_more_and_nothing_else_is(found: dict[str, Any]) -> None:
    plain, noisy = found["7B"], found["7B noisy"]
    more = noisy["terms"]["rollout"] - plain["terms"]["rollout"]
    assert more > 0 and more == pytest.approx(2 * (noisy["faster"]["rollout"] - plain["faster"]["rollout"]), rel=1e-6)
    assert all(noisy["terms"][name] == plain["terms"][name] for name in ("exchange", "train", "sync"))


def test_a_checkpoint_costs_its_copy_unless_the_run_waits(found: dict[str, Any]) -> None:
    behind, waits, export = (found[name]["terms"] for name in ("7B", "7B waits", "7B export"))
    parameters = (behind["sync"] - 2.0) * 20e9 / 2
    assert 10 * (waits["save"] - behind["save"]) == pytest.approx(14 * parameters / 2e9, rel=1e-6), "one node's disk"
    assert 10 * (export["save"] - waits["save"]) == pytest.approx(2 * parameters / 2e9 + behind["sync"], rel=1e-6)
    copies = [found[name]["host"]["checkpoint"] for name in ("7B waits", "7B export")]
    assert HF_FILE_BYTES == MAX_SHARD_BYTES
    assert copies[1] - copies[0] == pytest.approx(2 * parameters, rel=1e-6), "all files of eight ranks of one node"
    # 4 tensor ranks, which have the vision tower each, and 2 replicas: 14 bytes of a parameter, cut in eight
    assert 1 < 10 * behind["save"] * 3e9 / (14 * parameters / 8) < 1.3


def test_slow_decoding_is_warned_of_with_what_it_costs(found: dict[str, Any]) -> None:
    def about(name: str, key: str) -> list[str]:
        return [line for line in found[name]["advice"] if key in line]

    assert not about("7B", "cuda_graphs") and not about("7B", "twice as many")
    (eager,) = about("7B eager", "rollout.cuda_graphs=false")
    assert f"{found['7B']['eager']:,.0f} s" in eager and f"{found['7B']['terms']['rollout']:,.0f} s" in eager
    (slots,) = about("7B few", "decodes 32 requests at a time")
    assert "twice as many" in slots and "rollout.kv_cache_gib" in slots


def test_a_plan_names_the_fastest_layout() -> None:
    script = "import sys; from megatron_sr1.cli import main; main(sys.argv[1:])"
    words = ["plan", str(RECIPES / "qwen2_5_vl_3b" / "grpo.yaml"), "--gpus", "8", "--top", "2"]
    done = subprocess.run([sys.executable, "-c", script, *words], text=True, capture_output=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-3000:]
    heads, first, second, overrides, supposed = done.stdout.splitlines()
    assert heads.split()[:7] == ["GPUs", "tensor", "pipeline", "data", "engine", "GiB", "step"]
    rows = [[float(value.replace(",", "")) for value in line.split()] for line in (first, second)]
    for row in rows:
        assert row[0] == 8 and row[1] * row[2] * row[3] == 8 and row[5] < 80
        assert row[6] == pytest.approx(sum(row[7:]), abs=0.4)
    assert rows[0][6] <= rows[1][6]
    assert overrides.startswith(f"# nproc=8 layout.tensor={rows[0][1]:.0f} ") and "measured are" in supposed
    for words, complaint in (
        (["--gpus", "8,x"], r"--gpus '8,x' is not allowed"),
        (["--gpus", "0"], r"--gpus '0' is not allowed"),
        (["--gpus", "8", "--top", "0"], r"--top 0 is not allowed"),
        (["--gpus", "8", "rollout.no_key=1"], r"no_key"),
    ):
        with pytest.raises(SystemExit, match=complaint):
            main(["plan", str(RECIPES / "qwen2_5_vl_3b" / "grpo.yaml"), *words])
