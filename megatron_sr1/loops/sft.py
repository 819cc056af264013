"""The cold start: supervised fine-tuning on both response layouts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from megatron_sr1.config import Config
from megatron_sr1.data import Check, SampleFeed, only_demonstrations, open_dataset
from megatron_sr1.loops.first_checks import Preflight
from megatron_sr1.loops.preemption import watch_for_stop
from megatron_sr1.loops.run import Run, course_of, metrics_of, open_run
from megatron_sr1.metrics.clock import Clock
from megatron_sr1.metrics.pace import EVALUATION
from megatron_sr1.phases import during
from megatron_sr1.platform import Platform
from megatron_sr1.policy import Policy
from megatron_sr1.prompts import templates_of
from megatron_sr1.ranks import agreed
from megatron_sr1.rollout import deal_samples
from megatron_sr1.training.batches import Batcher
from megatron_sr1.training.heldout_loss import HeldoutLoss, keep_examples
from megatron_sr1.training.losses import SftLoss
from megatron_sr1.training.step_work import take_work
from megatron_sr1.types import Prompt, Scoring, SftSample, Turn


def run_sft(config: Config, platform: Platform) -> None:
    """Trains on `data.cold_start` and exports to `<run_dir>/hf`. Continues from the newest checkpoint."""
    with open_run(config, platform, "sft") as run:
        _train(run)


def demonstrations(run: Run) -> SampleFeed:
    """Those of `data.cold_start`. Raises as `Run.feed`."""
    return run.feed("cold_start", _check_of(run))


def _check_of(run: Run) -> Check:
    """Whether a demonstration can be asked by its template, with the model's chat template, and the processor takes its
    images."""
    templates = templates_of(run.config)

    def check(sample: Prompt | SftSample) -> None:
        if isinstance(sample, SftSample):
            template = templates.of_demonstration(sample)
            run.processor.check_opening(Turn("", opens=template.opens, template=template.name))
            for image in sample.prompt.images:
                run.processor.grid(image.size)

    return check


def _train(run: Run) -> None:
    config = run.config
    with run.stage("data"):
        feed = demonstrations(run)
        num_steps = run.count_steps(feed, "train.batch_size")
    with run.stage("model"):
        policy = Policy(config, run.platform, num_optimizer_steps=num_steps, keep_reference=False)
        feed.divide(policy.replicas, partial(deal_samples, run.processor))
        batcher = Batcher(config, run.processor, policy.replicas, run.platform.device)
        heldout = _Heldout(run, policy, batcher, num_steps)
        steps = range(run.resume(policy, num_steps), num_steps)
    preflight = Preflight(run, "sft")
    preflight.machines(policy, num_steps)
    preflight.demonstrations(feed)
    preflight.close()
    run.accept(first=steps.start)
    course = replace(course_of(run, num_steps, evaluates=False), heldout_every=config.train.heldout_every)
    profiler = run.profiler(steps.start)
    heldout.before(steps.start)
    with feed, metrics_of(run, steps, course) as writer, watch_for_stop(run.platform) as stop:
        for step in steps:
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
                seconds = {**clock.seconds, "seconds/step": time.perf_counter() - start}
                measured = heldout.after(step)
                if writer is not None:
                    optimizer = {"grad_norm": result.grad_norm, "learning_rate": result.learning_rate}
                    optimizer["skipped_updates"] = float(result.skipped)
                    of_all = work.metrics(clock.seconds["seconds/train"])
                    writer.write(step, {**result.metrics, **measured, **optimizer, **feed.metrics, **of_all, **seconds})
                keys = [sample.prompt.key for sample in samples]
                run.take_bad(step, [result], policy.replicas.gather(keys) if result.skipped else [])
                run.end_step(step, feed, stop, policy, is_last=step + 1 == num_steps)
    run.export(policy)
    run.checkpoints.prune()
    run.say(f"exported to {run.export_dir}")


class _Heldout:
    """The losses on held-out demonstrations, every `train.heldout_every` steps. All methods are collective."""

    def __init__(self, run: Run, policy: Policy, batcher: Batcher, num_steps: int) -> None:
        """Raises ValueError as `open_dataset`, where there is anything to measure."""
        self._run, self._num_steps, self._every = run, num_steps, run.config.train.heldout_every
        self._loss: HeldoutLoss | None = None
        if self._every:
            config, quarantine = run.config, run.quarantine("heldout")
            dataset = open_dataset(config.data, "heldout", quarantine)
            goes_on = run.progress is not None
            run.platform.on_main(lambda: _check_same(run, dataset.fingerprint, goes_on=goes_on))
            self._loss = HeldoutLoss(
                dataset=dataset,
                quarantine=quarantine,
                check=_check_of(run),
                deal=partial(deal_samples, run.processor),
                batcher=batcher,
                policy=policy,
                num_samples=min(len(dataset), config.evaluate.max_prompts or len(dataset)),
                portion=config.train.batch_size,
                workers=config.data.workers,
                num_examples=config.evaluate.examples,
            )

    def before(self, step: int) -> None:
        """Of the policy that a run begins with, which is told. It has no step whose metrics it could be among."""
        if self._loss is not None and step == 0:
            with during(EVALUATION):
                found = self._loss.measure().metrics
            loss, accuracy = found["heldout/loss"], found["heldout/token_accuracy"]
            self._run.say(f"held out, before the first step: loss {loss:.4f}, token accuracy {100 * accuracy:.1f} %")

    def after(self, step: int) -> Mapping[str, float]:
        """Of the policy that the step leaves, where that is due."""
        due = self._every and ((step + 1) % self._every == 0 or step + 1 == self._num_steps)
        if self._loss is None or not due:
            return {}
        start = time.perf_counter()
        with during(EVALUATION):
            found = self._loss.measure()
        if self._run.platform.is_main:
            keep_examples(self._run.folder, step, found.examples)
        return {**found.metrics, "seconds/heldout": time.perf_counter() - start}


def _check_same(run: Run, fingerprint: str, *, goes_on: bool) -> None:
    """Raises ValueError where the run has measured other demonstrations: its curve would be of two sets."""
    path = run.folder / "heldout.sha256"
    known = path.read_text(encoding="utf-8").strip() if path.is_file() else fingerprint
    if goes_on and known != fingerprint:
        raise ValueError(
            f"data.heldout has other samples than those that run_dir={run.config.run_dir!r} was measured on. Set it "
            "back, or choose another run_dir."
        )
    path.write_text(fingerprint + "\n", encoding="utf-8")
