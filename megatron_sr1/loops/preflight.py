"""`megatron-sr1 preflight`: the first phase of a run by itself. It writes nothing into the run folder, whose run may be
at work."""

from __future__ import annotations

import tempfile
from dataclasses import replace

from megatron_sr1.config import Command, Config
from megatron_sr1.loops.first_checks import Checks
from megatron_sr1.loops.generation import build_generator, live_rollouts, training_feed, training_sampling
from megatron_sr1.loops.run import Run
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
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(replace(config, run_dir=scratch), platform)
        checks = Checks(run, command, config, preset_of(config) if command == "grpo" else None)
        try:
            if command == "sft":
                _check_sft(run, checks)
            else:
                _check_grpo(run, checks)
        finally:  # an engine that does not fit ends them
            if platform.is_main and checks.rows:
                print(to_json(checks.rows) if as_json else printable(table_of(checks.rows)), flush=True)
    platform.on_main(lambda: check_rows(checks.rows))


def _check_sft(run: Run, checks: Checks) -> None:
    policy = Policy(run.config, run.platform, num_optimizer_steps=1, keep_reference=False)
    checks.machines(policy)
    with demonstrations(run) as feed:
        feed.divide(policy.replicas)
        checks.demonstrations(feed)


def _check_grpo(run: Run, checks: Checks) -> None:
    config, preset = run.config, preset_of(run.config)
    sampling = training_sampling(config, preset)
    feed = training_feed(run, preset, sampling)
    policy = Policy(config, run.platform, num_optimizer_steps=1, keep_reference=preset.needs_reference)
    checks.machines(policy)
    if not config.preflight.prompts:
        return
    trainer = Trainer(config, policy, preset, run.processor)
    recorder = Recorder.of(preset, config.rollout.samples_per_prompt, run.processor, config.objective.cut_responses)
    complaints: list[str] = []
    policy.leave_device()
    generator = build_generator(run, policy.hf_weights, complaints.append)
    checks.engines(complaints)
    with feed, live_rollouts(run, generator, sampling, recorder, refreshed=True) as source:
        checks.responses(feed, source, trainer, 0)
