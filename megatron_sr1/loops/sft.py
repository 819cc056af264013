"""The cold start: supervised fine-tuning on both response layouts."""

from __future__ import annotations

import time
from functools import partial

from megatron_sr1.config import Config
from megatron_sr1.data import SampleFeed, only_demonstrations
from megatron_sr1.loops.first_checks import Preflight
from megatron_sr1.loops.preemption import watch_for_stop
from megatron_sr1.loops.run import Run, course_of, metrics_of, open_run
from megatron_sr1.metrics.clock import Clock
from megatron_sr1.phases import during
from megatron_sr1.platform import Platform
from megatron_sr1.policy import Policy
from megatron_sr1.prompts import templates_of
from megatron_sr1.ranks import agreed
from megatron_sr1.rollout import deal_samples
from megatron_sr1.training.batches import Batcher
from megatron_sr1.training.losses import SftLoss
from megatron_sr1.training.step_work import take_work
from megatron_sr1.types import Prompt, Scoring, SftSample


def run_sft(config: Config, platform: Platform) -> None:
    """Trains on `data.cold_start` and exports to `<run_dir>/hf`. Continues from the newest checkpoint."""
    with open_run(config, platform, "sft") as run:
        _train(run)


def demonstrations(run: Run) -> SampleFeed:
    """Those of `data.cold_start`. Raises as `Run.feed`."""
    templates = templates_of(run.config)

    def check(sample: Prompt | SftSample) -> None:
        if isinstance(sample, SftSample):
            templates.of_demonstration(sample)
            for image in sample.prompt.images:
                run.processor.grid(image.size)

    return run.feed("cold_start", check)


def _train(run: Run) -> None:
    config = run.config
    with run.stage("data"):
        feed = demonstrations(run)
    with run.stage("model"):
        policy = Policy(config, run.platform, num_optimizer_steps=config.train.steps, keep_reference=False)
        feed.divide(policy.replicas, partial(deal_samples, run.processor))
        batcher = Batcher(config, run.processor, policy.replicas, run.platform.device)
        first = run.resume(policy)
    preflight = Preflight(run, "sft")
    preflight.machines(policy)
    preflight.demonstrations(feed)
    preflight.close()
    run.accept()
    course, profiler = course_of(run, evaluates=False), run.profiler(first)
    with feed, metrics_of(run, first, course) as writer, watch_for_stop(run.platform) as stop:
        for step in range(first, config.train.steps):
            during.step = step
            with profiler(step):
                start = time.perf_counter()
                taken = feed.next(config.train.batch_size)
                samples = agreed(run.platform.ranks, partial(only_demonstrations, taken.samples, "data.cold_start"))
                batch = batcher.sft(samples)
                clock = Clock()
                with clock("train"):
                    result = policy.train_step(batch.micro_batches, SftLoss(batch), Scoring())
                work = take_work(policy)
                feed.finish(taken)
                if writer is not None:
                    optimizer = {"grad_norm": result.grad_norm, "learning_rate": result.learning_rate}
                    optimizer["skipped_updates"] = float(result.skipped)
                    seconds = {**clock.seconds, "seconds/step": time.perf_counter() - start}
                    taken_of_all = work.metrics(clock.seconds["seconds/train"])
                    writer.write(step, {**result.metrics, **optimizer, **feed.metrics, **taken_of_all, **seconds})
                keys = [sample.prompt.key for sample in samples]
                run.take_bad(step, [result], policy.replicas.gather(keys) if result.skipped else [])
                run.end_step(step, feed, stop, policy)
    run.export(policy)
    run.say(f"exported to {run.export_dir}")
