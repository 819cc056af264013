"""`megatron-sr1 preflight`: the first phase of a run by itself. It writes nothing into the run folder, whose run may be
at work."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from megatron_sr1.config import Command, Config, check_batched_tokens, replay_of
from megatron_sr1.loops.first_checks import Checks
from megatron_sr1.loops.generation import build_generator, live_rollouts, training_feed, training_sampling
from megatron_sr1.loops.run import Run, watched
from megatron_sr1.loops.sft import demonstrations
from megatron_sr1.platform import Platform
from megatron_sr1.policy import Policy
from megatron_sr1.preflight import check_rows, table_of, to_json
from megatron_sr1.printable import printable
from megatron_sr1.streams import preset_of
from megatron_sr1.training.recorder import Recorder
from megatron_sr1.training.trainer import Trainer


def run_preflight(config: Config, platform: Platform, *, command: Command = "grpo", as_json: bool = False) -> None:
    """Prints the table, or JSON, of all checks of a run that begins with this configuration: with the weights that it
    starts from, whatever checkpoints there are.

    Raises:
        ValueError: a check failed, once all is printed; see `open_run` and `run_grpo` for what keeps them from being
            made.
    """
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        run = Run(replace(config, run_dir=scratch), platform)
        # where a rank hangs, what all were at stays in the main rank's folder, which every rank can name
        stack.enter_context(watched(run, Path(platform.on_main(lambda: scratch))))
        checks = Checks(run, command, config, preset_of(config) if command == "grpo" else None)
        try:
            if command == "sft":
                _check_sft(run, checks)
            else:
                _check_grpo(run, checks)
            checks.all_made = True
        finally:  # an engine that does not fit ends them, or Ctrl-C
            checks.end()
            if platform.is_main and checks.rows:
                print(to_json(checks.rows) if as_json else printable(table_of(checks.rows)), flush=True)
    platform.on_main(lambda: check_rows(checks.rows))


def _check_sft(run: Run, checks: Checks) -> None:
    with demonstrations(run) as feed:
        num_steps = run.count_steps(feed, "train.batch_size")
        policy = Policy(run.config, run.platform, num_optimizer_steps=1, keep_reference=False)
        checks.machines(policy, num_steps)
        feed.divide(policy.replicas)
        checks.demonstrations(feed)


def _check_grpo(run: Run, checks: Checks) -> None:
    config, preset = run.config, preset_of(run.config)
    check_batched_tokens(config.rollout, on_cpu=run.platform.on_cpu)
    sampling = training_sampling(config, preset)
    feed = training_feed(run, preset, sampling)
    policy = Policy(config, run.platform, num_optimizer_steps=1, keep_reference=preset.needs_reference)
    checks.machines(policy, run.count_steps(feed, "rollout.prompts_per_step"))
    if not config.preflight.prompts or not checks.engines_have_room():
        return
    replay, cut = replay_of(config), config.objective.cut_responses
    trainer = Trainer(config, policy, preset, run.processor, replay)
    recorder = Recorder.of(preset, config.rollout.samples_per_prompt, run.processor, cut, replay)
    complaints: list[str] = []
    policy.leave_device()
    generator = build_generator(run, policy.hf_weights, complaints.append)
    checks.engines(complaints)
    with feed, live_rollouts(run, generator, sampling, recorder, refreshed=True) as source:
        checks.responses(feed, source, trainer, 0)
