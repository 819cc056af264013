"""CPU seconds of a GRPO step, ours and TRL's: the same model, prompts, batch and lengths, on this machine.

    pip install trl==1.16.0      # beside the rest, in whichever environment this runs in
    make quickstart              # for its model and its shards
    python -m benchmarks.against_trl --rounds 3

Three kinds of step take turns, each time in a process of its own:

    TRL, one pass      GRPOTrainer: beta 0, loss_type dapo, num_iterations 1, generation by transformers
    ours, one pass     answer-only GRPO without KL (one stream, `acc`)
    ours, two passes   the preset vision_sr1 without KL, which TRL has no counterpart of

All in fp32, from one Hugging Face folder and the same shards, asked by the text of the template see_think, with one
learning rate and one limit of gradients. The first steps of a process warm it up; the mean of the others counts, and of
all rounds the median. Seconds are user and system time of the process and of all that it has started.

    training     forward, backward, optimizer step; ours the advantages, too
    generation   prompts to responses and rewards; TRL's the advantages, too
    whole        from the end of a step to the end of the next: data, weight sync and metrics belong to it
    in rows      tokens that a step's forward passes of training take, padding included

Ours is as a run is by default, `train.shared_prefix` included; what it writes in the background counts where it
happens. Neither evaluates, logs or saves checkpoints. Lengths are fixed: the end of a turn is banned until a response
has --tokens tokens (--second-tokens in a second pass), about what the model of the quickstart writes by itself. With
--natural the model ends them, within these: give --tokens 64 --second-tokens 64, too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from megatron_sr1.config import load_config
from megatron_sr1.data import ShardDataset, StepPrompts, expand_shards
from megatron_sr1.platform import start_platform
from megatron_sr1.platform.torchvision_ops import define_missing_torchvision_ops
from megatron_sr1.prompts import SEE_THINK

KINDS = {"trl": "TRL, one pass", "ours": "ours, one pass", "two": "ours, two passes"}
PARTS = ("training", "generation", "whole")
LEARNING_RATE = 2e-4


def cpu_seconds() -> float:
    """Of this process and all that it has started, ended or not."""
    seconds = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # ended meanwhile: its parent's children
            times = process.cpu_times()
            seconds += times.user + times.system + times.children_user + times.children_system
    return seconds


class Meter:
    """The steps of a process: CPU seconds of their parts, and counts."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._step: dict[str, float] = {}
        self._last = cpu_seconds()

    def lap(self, part: str) -> None:
        """What was spent since the last lap was spent on that."""
        before, self._last = self._last, cpu_seconds()
        self.add("whole", self._last - before)
        self.add(part, self._last - before)

    def add(self, name: str, value: float) -> None:
        """To a number of the step."""
        self._step[name] = self._step.get(name, 0.0) + value

    def end_step(self) -> None:
        self.steps.append(self._step)
        self._step = {}


def our_config(options: argparse.Namespace, two_passes: bool, folder: Path) -> Any:
    """As a run's, but for what is said in this module."""
    steps, longest = options.warm_up + options.steps, max(options.tokens, options.second_tokens if two_passes else 0)
    # the trainer's log-probs are of a vocabulary that has the end of a turn
    objective: dict[str, Any] = {"kl_coef": 0.0, "max_logprob_gap": 1000.0}
    if not two_passes:  # a template that describes nothing has no second pass
        streams = [{"name": "answer", "rewards": {"acc": 1.0}}]
        objective |= {"preset": None, "streams": streams, "template": "see_think_once"}
    rollout = {"prompts_per_step": options.prompts, "samples_per_prompt": options.samples, "kv_cache_gib": 0.25}
    limits = {"max_response_tokens": longest, "max_description_tokens": 32, "max_model_tokens": 256 + longest}
    tree = {
        **{"run_dir": str(folder / "run"), "nproc": 1, "objective": objective, "rollout": rollout | limits},
        **{"model": {"hf_dir": options.model, "max_position": 512}, "data": {"train": options.data}},
        **{"optimizer": {"lr": LEARNING_RATE}, "train": {"steps": steps, "batch_size": options.prompts}},
        "templates": {"see_think_once": {"extends": "see_think", "describes": None}},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(tree))
    return load_config(path, [])


def our_generator(run: Any, weights: Any, options: argparse.Namespace) -> Any:
    """A run's; no response ends by itself, and each counts as ended."""
    from megatron_sr1.loops import generation
    from megatron_sr1.rollout import Engine

    class FixedEngine(Engine):
        def add(self, request_id: str, prepared: Any, draw: Any) -> None:
            tokens = options.second_tokens if request_id.endswith("/second") else options.tokens
            banned = (*draw.banned_ids, draw.end_of_turn_id)
            super().add(request_id, prepared, replace(draw, max_tokens=tokens, banned_ids=banned))

        def step(self) -> list[Any]:
            return [replace(generation, finish_reason="stop") for generation in super().step()]

    with mock.patch.object(generation, "Engine", Engine if options.natural else FixedEngine):
        return generation.build_generator(run, weights)


def measure_ours(two_passes: bool, options: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """The steps of `megatron-sr1 grpo`: the same parts in the same order."""
    platform = start_platform()
    from megatron_sr1 import policy as policies
    from megatron_sr1.loops.generation import prompt_check, training_sampling
    from megatron_sr1.loops.run import open_run
    from megatron_sr1.metrics.clock import Clock
    from megatron_sr1.streams import preset_of
    from megatron_sr1.training import live_rollouts, recorder, step_metrics, trainer

    class CountingPolicy(policies.Policy):
        def train_step(self, batches: Any, loss_fn: Any, scoring: Any) -> Any:
            meter.add("trained", sum(len(batch.input_ids) for batch in batches))
            return super().train_step(batches, loss_fn, scoring)

    config = our_config(options, two_passes, folder)
    preset = preset_of(config)
    with open_run(config, platform, "grpo") as run:
        feed = run.feed("train", prompt_check(run.planner, preset.passes.of, leaves_out=True))
        policy = CountingPolicy(config, platform, num_optimizer_steps=config.train.steps, keep_reference=False)
        learner = trainer.Trainer(config, policy, preset, run.processor)
        taker = recorder.Recorder.of(preset, options.samples, run.processor, config.objective.cut_responses)
        how = (our_generator(run, policy.hf_weights, options), training_sampling(config, preset), taker, config.rewards)
        source = live_rollouts.LiveRollouts(*how, platform.ranks, run.folder / "rollouts", objective=config.objective)
        with feed, source:
            source.refresh(policy.hf_weights(), version=0)
            meter = Meter()
            for step in range(config.train.steps):
                clock, prompts = Clock(), StepPrompts(feed, options.prompts)
                meter.lap("rest")
                rollouts = source.take(prompts, step, clock)
                meter.lap("generation")
                results = learner.update(rollouts)
                meter.lap("training")
                prompts.finish()
                step_metrics.step_metrics(rollouts, preset, config.objective, results, clock)
                source.settle()
                source.refresh(policy.hf_weights(), version=step + 1)
                meter.lap("rest")
                firsts = [pair.first for group in rollouts.groups for pair in group.pairs]
                meter.add("asked", sum(len(first.prompt_ids) for first in firsts) / len(firsts))
                meter.add("generated", int(rollouts.ledger.response_tokens.sum()))
                meter.end_step()
    return meter.steps


def trl_prompts(options: argparse.Namespace) -> list[dict[str, Any]]:
    """As many rows as TRL's steps take: what the template asks, the images, the right answer."""
    dataset = ShardDataset(expand_shards(options.data, "--data"))
    rows = []
    for place in range(min(len(dataset), options.prompts * (options.warm_up + options.steps))):
        prompt: Any = dataset.read(place)
        turn = {"role": "user", "content": SEE_THINK.user_text(prompt.problem, len(prompt.images))}
        rows.append({"prompt": [turn], "images": list(prompt.images), "answer": prompt.answer})
    return rows


def trl_settings(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Arguments of GRPOConfig: one optimizer step for each batch of responses."""
    each = math.gcd(batch := options.prompts * options.samples, options.trl_sequences)
    return {
        **{"output_dir": str(folder), "report_to": "none", "logging_strategy": "no", "save_strategy": "no"},
        **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "use_vllm": False},
        **{"beta": 0.0, "num_iterations": 1, "loss_type": "dapo", "temperature": 1.0, "dataloader_pin_memory": False},
        **{"learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "max_grad_norm": 1.0, "adam_beta2": 0.95},
        **{"num_generations": options.samples, "max_completion_length": options.tokens, "weight_decay": 0.01},
        "generation_kwargs": None if options.natural else {"min_new_tokens": options.tokens},
        **{"per_device_train_batch_size": each, "gradient_accumulation_steps": batch // each},
        "max_steps": options.warm_up + options.steps,
    }


def acc(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """Whether the last answer of each response is the right one."""
    given = [SEE_THINK.answer_of(completion[0]["content"]) or "" for completion in completions]
    return [float(found.strip() == gold.strip()) for found, gold in zip(given, answer, strict=True)]


def measure_trl(options: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """The steps of `GRPOTrainer.train`."""
    define_missing_torchvision_ops()
    try:
        from datasets import Dataset
        from transformers import TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        sys.exit(f"this benchmark needs TRL beside the rest: pip install trl==1.16.0 ({error})")

    class MeasuredTrainer(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            meter.lap("rest")
            made = super()._generate_and_score_completions(inputs)
            meter.lap("generation")
            meter.add("asked", made["prompt_mask"].sum().item() / len(inputs))
            meter.add("generated", made["completion_mask"].sum().item())
            return made

        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            meter.add("trained", inputs["prompt_ids"].numel() + inputs["completion_ids"].numel())
            return super()._compute_loss(model, inputs)

    class StepEnds(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.lap("training")
            meter.end_step()

    # with pyarrow 26 datasets 5.2 fails to make a name for its cache, which nothing here needs
    with mock.patch("datasets.arrow_dataset.generate_fingerprint", return_value="prompts"):
        rows = Dataset.from_list(trl_prompts(options))
    settings, meter = GRPOConfig(**trl_settings(options, folder)), Meter()
    MeasuredTrainer(options.model, acc, settings, rows, callbacks=[StepEnds()]).train()
    return meter.steps


def measured(kind: str, options: argparse.Namespace) -> dict[str, float]:
    """The mean step of a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.against_trl", *sys.argv[1:], "--measure", kind]
    done = subprocess.run(command, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1", **os.environ})
    if done.returncode:
        sys.exit(f"{KINDS[kind]}: {done.stderr.strip().splitlines()[-1]}")
    steps = json.loads(done.stdout.splitlines()[-1])[options.warm_up :]
    return {key: statistics.mean(step[key] for step in steps) for key in steps[0]}


def _seconds(step: dict[str, float]) -> str:
    return "  ".join(f"{part} {step[part]:6.2f}" for part in PARTS)


def show(runs: dict[str, list[dict[str, float]]]) -> None:
    """Medians of the rounds, and their ratios."""
    middle = {kind: {key: statistics.median(run[key] for run in of) for key in of[0]} for kind, of in runs.items()}
    for kind, found in middle.items():
        tokens = f"{found['asked']:.1f} a prompt, {found['generated']:.0f} generated, {found['trained']:.0f} in rows"
        print(f"{KINDS[kind]:<17} {_seconds(found)}  tokens: {tokens}")
    trl, ours, two = (middle[kind] for kind in ("trl", "ours", "two"))
    print("TRL / ours, one pass:", "  ".join(f"{part} {trl[part] / ours[part]:.2f}x" for part in PARTS))
    print(f"ours, two passes / TRL, one pass: whole {two['whole'] / trl['whole']:.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm-up", type=int, default=2, help="first steps of each process, which do not count")
    parser.add_argument("--steps", type=int, default=3, help="of each process that count")
    parser.add_argument("--model", default="runs/quickstart/sft/hf", help="a Hugging Face folder")
    parser.add_argument("--data", nargs="+", default=["runs/quickstart/data/train-*.tar"], help="shards or patterns")
    for name, default in {"--rounds": 3, "--prompts": 32, "--samples": 8}.items():
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--tokens", type=int, default=33, help="of each response")
    parser.add_argument("--second-tokens", type=int, default=19, help="of each response of the second pass")
    parser.add_argument("--natural", action="store_true", help="responses end where the model ends them")
    parser.add_argument("--trl-sequences", type=int, default=64, help="at a time in TRL's training; 64 is its best")
    parser.add_argument("--measure", choices=list(KINDS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure = {"trl": measure_trl, "ours": partial(measure_ours, False), "two": partial(measure_ours, True)}
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure[options.measure](options, Path(folder))))
        return
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for number in range(1, options.rounds + 1):
        for kind, found in runs.items():
            found.append(measured(kind, options))
            print(f"round {number}  {KINDS[kind]:<17} {_seconds(found[-1])}", flush=True)
    print(f"CPU seconds a step of {options.prompts} prompts x {options.samples} samples, median of the rounds:")
    show(runs)


if __name__ == "__main__":
    main()
