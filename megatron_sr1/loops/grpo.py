"""Self-rewarding GRPO: two passes, per-stream advantages, one update.

prompts -> pairs -> rewards -> advantages -> packed rows -> optimizer steps -> weight sync -> metrics
"""

from __future__ import annotations

from pathlib import Path

from megatron_sr1.config import Config, Replay, replay_of
from megatron_sr1.data import SampleFeed, StepPrompts
from megatron_sr1.loops.evaluate import Evaluations, NoEvaluations, check_heldout, heldout_prompts
from megatron_sr1.loops.first_checks import Preflight
from megatron_sr1.loops.generation import build_generator, live_rollouts, training_feed, training_sampling
from megatron_sr1.loops.preemption import watch_for_stop
from megatron_sr1.loops.run import Run, check_verification, course_of, metrics_of, open_run
from megatron_sr1.metrics import Course
from megatron_sr1.metrics.clock import Clock
from megatron_sr1.phases import during
from megatron_sr1.platform import Platform
from megatron_sr1.policy import Policy
from megatron_sr1.rewards import RewardError
from megatron_sr1.streams import Preset, own_code, preset_of
from megatron_sr1.training.live_rollouts import LiveRollouts
from megatron_sr1.training.recorder import Recorder
from megatron_sr1.training.rollout_source import RolloutSource
from megatron_sr1.training.saved_rollouts import SavedRollouts
from megatron_sr1.training.shown_samples import SamplePicker
from megatron_sr1.training.step_metrics import step_metrics
from megatron_sr1.training.step_work import take_work
from megatron_sr1.training.token_writer import TokenWriter
from megatron_sr1.training.trainer import NoTrainer, Trainer


def run_grpo(
    config: Config, platform: Platform, *, rollouts_only: bool = False, from_rollouts: Path | None = None
) -> None:
    """Trains on `data.train`, evaluates before and after on `data.heldout`, exports to `<run_dir>/hf`.

    Continues from the newest checkpoint of the run folder, with the next prompts, to the same bits.

    Args:
        rollouts_only: the steps are generated, graded and saved, all with the weights at hand; none is trained on. The
            first of them is the next step of the run, to the bit. With dynamic sampling the prompts of the others are
            not those of the run: other weights leave other groups to be replaced.
        from_rollouts: a `rollouts` folder that the steps are trained from, to the bits of the run that saved it; no
            engine is started, so nothing is evaluated.
    """
    check_verification(config, platform)
    preset, replay = preset_of(config), replay_of(config)
    with open_run(config, platform, "grpo") as run:
        sampling = training_sampling(config, preset)
        with run.stage("data"):
            feed = training_feed(run, preset, sampling)
            heldout = heldout_prompts(run)
            check_heldout(run, heldout)
            num_steps = run.count_steps(feed, "rollout.prompts_per_step")
        updates = config.rollout.prompts_per_step // config.train.batch_size  # of a step
        length = {"num_optimizer_steps": updates * num_steps, "updates_per_step": updates}
        with run.stage("model"):
            policy = Policy(config, platform, keep_reference=preset.needs_reference, **length)
            steps = range(run.resume(policy, num_steps), num_steps)
        preflight = Preflight(run, "grpo", preset, generates=from_rollouts is None)
        preflight.machines(policy, num_steps)
        trainer = NoTrainer() if rollouts_only else _trainer(run, policy, preset, replay)
        evaluations: Evaluations | NoEvaluations = NoEvaluations()
        how = (run.processor, config.objective.cut_responses, replay)
        recorder = Recorder.of(preset, config.rollout.samples_per_prompt, *how)
        source: RolloutSource
        if from_rollouts is not None:
            source = SavedRollouts(from_rollouts, recorder, platform.ranks)
        else:
            run.say("starting the generation engines")
            policy.leave_device()
            generator = build_generator(run, policy.hf_weights, preflight.complain)
            source = live_rollouts(run, generator, sampling, recorder, refreshed=not rollouts_only)
            evaluations = evaluations if rollouts_only else Evaluations(run, generator, heldout)
        with feed, source:
            if isinstance(source, LiveRollouts):
                preflight.responses(feed, source, trainer, steps.start)
            preflight.close()
            course = course_of(run, num_steps, evaluates=isinstance(evaluations, Evaluations), saves=not rollouts_only)
            _steps(run, steps, preset, feed, policy, source, trainer, evaluations, course)
        if not rollouts_only:
            answers = evaluations.after(num_steps)
            run.export(policy)
            run.verify_export(answers)
            run.checkpoints.prune()  # the last evaluation may have found the best
            run.say(f"exported to {run.export_dir}")


def _trainer(run: Run, policy: Policy, preset: Preset, replay: Replay) -> Trainer:
    tokens = TokenWriter.of(run.folder / "rollouts", policy, preset) if run.config.track.tokens else None
    return Trainer(run.config, policy, preset, run.processor, replay, tokens)


def _steps(
    run: Run,
    steps: range,
    preset: Preset,
    feed: SampleFeed,
    policy: Policy,
    source: RolloutSource,
    trainer: Trainer | NoTrainer,
    evaluations: Evaluations | NoEvaluations,
    course: Course,
) -> None:
    """All steps that are left of the run. Collective.

    Memory changes hands twice a step: the engines fall asleep at the end of `take`, and what only training needs comes
    to the device; when the policy is trained and saved that leaves, and the engines wake with the new weights. So
    `seconds/save` and `seconds/sync` of a step are what its rollouts had to wait for.
    """
    run.accept(own_code(run.config.objective, preset.templates), steps.start)
    profiler, picker, clock = run.profiler(steps.start), SamplePicker(run.config.track.samples), Clock()
    with clock("sync"):
        source.refresh(policy.hf_weights(), version=steps.start)
    evaluations.before(steps.start)
    take_work(policy)  # of whoever has looked before
    with metrics_of(run, steps, course) as writer, watch_for_stop(run.platform) as stop:
        for step in steps:
            during.step = step
            evaluations.between(step)
            with profiler(step):
                prompts = StepPrompts(feed, run.config.rollout.prompts_per_step)
                with run.kept_before(RewardError, step, feed, policy, steps.start):
                    rollouts = source.take(prompts, step, clock)  # both passes of every sample, graded
                    run.settle_checkpoint(clock)  # written beside the engines: no fault of training loses it
                    with clock("train"):
                        results = trainer.update(rollouts)  # advantages, packed rows, optimizer steps
                prompts.finish()
                work = take_work(policy) if results else None
                if writer is not None:
                    measured = step_metrics(rollouts, preset, run.config.objective, results, clock, work)
                    writer.write(step, {**measured, **feed.metrics})
                    writer.show(step, picker.pick(rollouts))
                clock = Clock()
                with clock("save"):
                    source.settle()  # a checkpoint says that the step is done, so its rollouts must be there
                    is_bad = any(one.skipped for one in results)
                    told = (rollouts.trained_keys, rollouts.told_bad_rewards()) if is_bad else ([],)
                    run.take_bad(step, results, *told)
                    run.end_step(step, feed, stop, policy if results else None, is_last=step + 1 == steps.stop)
                if results:
                    with clock("sync"):
                        if source.needs_room:
                            policy.leave_device()
                        source.refresh(policy.hf_weights(), version=step + 1)
