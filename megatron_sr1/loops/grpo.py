"""Self-rewarding GRPO: two passes, per-stream advantages, one update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from megatron_sr1.config import Config
from megatron_sr1.evaluation.heldout import Heldout, only_prompts
from megatron_sr1.kernels import fused_stream_loss
from megatron_sr1.loops.evaluate import evaluate, heldout_prompts
from megatron_sr1.loops.generation import Passes, build_generator, prompt_check
from megatron_sr1.loops.preemption import watch_for_stop
from megatron_sr1.loops.run import Run, metrics_of, open_run
from megatron_sr1.metrics import MetricLog
from megatron_sr1.metrics.clock import Clock
from megatron_sr1.objective import (
    Mismatch,
    Preset,
    importance_weights,
    preset_from_config,
    token_kinds,
)
from megatron_sr1.platform import Platform
from megatron_sr1.policy import Policy, StepResult
from megatron_sr1.processor import Processor
from megatron_sr1.training.batches import Batcher, StreamBatch
from megatron_sr1.training.checkpointer import Progress
from megatron_sr1.training.live_rollouts import LiveRollouts
from megatron_sr1.training.rewards import Rewards, summarise, without_leaks, write_rollouts
from megatron_sr1.training.saved_rollouts import SavedRollouts, rollouts_file
from megatron_sr1.types import Clip, Generator, LogProbs, LossInputs, RolloutGroup, Sampling, Scoring


def run_grpo(
    config: Config, platform: Platform, *, rollouts_only: bool = False, from_rollouts: Path | None = None
) -> None:
    """Trains on `data.train`, evaluates before and after on `data.heldout`, exports to `<run_dir>/hf`.

    Continues from the newest checkpoint of the run folder, with the next prompts, to the same bits.

    Args:
        rollouts_only: the steps are generated, graded and saved, all with the weights at hand; none is trained on. The
            first of them is the next step of the run, to the bit.
        from_rollouts: a `rollouts` folder that the steps are trained from, to the bits of the run that saved it; no
            engine is started, so nothing is evaluated.
    """
    with open_run(config, platform) as run:
        _train(run, rollouts_only, from_rollouts)


def _train(run: Run, rollouts_only: bool, from_rollouts: Path | None) -> None:
    config, train = run.config, run.config.train
    preset = preset_from_config(config.objective)
    feed, heldout = run.feed("train", prompt_check(config, lambda _: _passes(preset))), heldout_prompts(run)
    updates = config.rollout.prompts_per_step // train.batch_size
    keep_reference = any(s.kl_coef > 0 for s in preset.streams)
    policy = Policy(config, run.platform, num_optimizer_steps=train.steps * updates, keep_reference=keep_reference)
    trainer = _Trainer(config, policy, preset)
    generator = None
    if from_rollouts is None:
        run.say("starting the generation engines")
        generator = build_generator(run, config.model.hf_dir, policy.hf_weights)
    checkpoints = run.checkpointer()
    progress = run.resume(policy, feed)
    if generator is not None:
        generator.update_weights(policy.hf_weights(), version=progress.step)
    evaluating = generator is not None and not rollouts_only
    if evaluating and progress.step == 0:
        run.say(f"evaluating the starting point on {len(heldout)} held-out prompts")
        evaluate(run, generator, heldout, label="before", step=0)

    with (
        feed,
        metrics_of(run, progress.step) as writer,
        _rollouts(run, generator, preset, from_rollouts) as rollouts,
        watch_for_stop(run.platform) as stop,
    ):
        for step in range(progress.step, train.steps):
            # before the step, not after the last: a run that stopped or was killed in between makes it up
            if evaluating and step and train.evaluate_every and step % train.evaluate_every == 0:
                evaluate(run, generator, heldout, label=f"step-{step}", step=step)
            clock = Clock()
            batch = feed.next(config.rollout.prompts_per_step)
            prompts = only_prompts(batch.samples, "data.train")
            groups, rewards = rollouts.take(prompts, step, clock)
            if evaluating:
                generator.sleep()  # the weight sync below wakes it: once a step
            with clock("train"):
                results = [] if rollouts_only else trainer.update(groups, rewards)
            if evaluating:
                with clock("sync"):
                    generator.update_weights(policy.hf_weights(), version=step + 1)
            feed.finish(batch)
            progress = Progress(step + 1, feed.position, feed.fingerprint, config.model.hf_dir, feed.state().to_json())
            if writer is not None:
                if generator is not None:
                    write_rollouts(rollouts_file(run.folder / "rollouts", step), groups, rewards)
                writer.write(step, {**_metrics(groups, rewards, preset, results, clock), **feed.metrics})
            stopping = stop.agreed()
            due = stopping or progress.step % train.save_every == 0 or progress.step == train.steps
            if due and not rollouts_only:
                checkpoints.save(policy, progress)
            if stopping:
                stop.leave(progress.step)
    if not rollouts_only:
        _finish(run, policy, generator, heldout)


def _finish(run: Run, policy: Policy, generator: Generator | None, heldout: Heldout) -> None:
    answers = []
    if generator is not None:
        run.say(f"evaluating the trained policy on {len(heldout)} held-out prompts")
        answers = evaluate(run, generator, heldout, label="after", step=run.config.train.steps)
    run.export(policy)
    run.verify_export(answers[: run.config.evaluate.verify_export])
    run.say(f"exported to {run.export_dir}")


@contextmanager
def _rollouts(
    run: Run, generator: Generator | None, preset: Preset, from_rollouts: Path | None
) -> Iterator[LiveRollouts | SavedRollouts]:
    if generator is None:
        assert from_rollouts is not None
        yield SavedRollouts(from_rollouts, preset, run.config.rollout.samples_per_prompt)
    else:
        with LiveRollouts(generator, _sampling(run.config, preset), preset, run.gather) as live:
            yield live


def _sampling(config: Config, preset: Preset) -> Sampling:
    rollout = config.rollout
    template, second_pass = _passes(preset)
    return Sampling(
        num_samples=rollout.samples_per_prompt,
        temperature=rollout.temperature,
        max_response_tokens=rollout.max_response_tokens,
        seed=config.seed,
        template=template,
        second_pass=second_pass,
    )


def _passes(preset: Preset) -> Passes:
    """The second pass is measured even where it earns nothing."""
    return preset.template, preset.second_pass or preset.template == "see_think"


class _Trainer:
    """The optimizer steps of one rollout batch."""

    def __init__(self, config: Config, policy: Policy, preset: Preset) -> None:
        self._config = config
        self._policy = policy
        self._preset = preset
        processor = Processor.from_pretrained(config.model.hf_dir)
        self._scoring = Scoring(config.rollout.temperature, processor.media_ids)
        self._batcher = Batcher(config, processor, policy.groups.data, policy.platform.device)

    def update(self, groups: Sequence[RolloutGroup], rewards: Rewards) -> list[StepResult]:
        """One optimizer step per `train.batch_size` prompts. With several, old log-probs are taken before the first."""
        rewards = without_leaks(rewards) if self._config.objective.leak_filter else rewards
        batches = list(self._mini_batches(groups, rewards))
        old: list[list[LogProbs] | None] = [None] * len(batches)
        if len(batches) > 1:
            old = [self._policy.logprobs(batch.micro_batches, self._scoring) for batch in batches]
        results = []
        for batch, before in zip(batches, old, strict=True):
            reference = None
            if any(stream.kl_coef > 0 for stream in self._preset.streams):
                reference = self._policy.reference_logprobs(batch.micro_batches, self._scoring)
            loss = _Loss(batch, before, reference, self._preset, self._config)
            results.append(self._policy.train_step(batch.micro_batches, loss, self._scoring))
        return results

    def _mini_batches(self, groups: Sequence[RolloutGroup], rewards: Rewards) -> Iterator[StreamBatch]:
        size = self._config.train.batch_size
        samples = self._config.rollout.samples_per_prompt
        for start in range(0, len(groups), size):
            rollouts = slice(start * samples, (start + size) * samples)
            share = {name: value[rollouts] for name, value in rewards.items()}
            yield self._batcher.streams(groups[start : start + size], share, self._preset)


class _Loss:
    """The loss of each micro-batch of one optimizer step."""

    def __init__(
        self,
        batch: StreamBatch,
        old: list[LogProbs] | None,
        reference: list[LogProbs] | None,
        preset: Preset,
        config: Config,
    ) -> None:
        self._batch, self._old, self._reference, self._preset = batch, old, reference, preset
        objective = config.objective
        self._clip = Clip(objective.clip_low, objective.clip_high, objective.dual_clip)
        bounds = (objective.mismatch_low, objective.mismatch_high)
        self._mismatch = Mismatch(objective.mismatch, objective.mismatch_level, *bounds)

    def __call__(self, index: int, logprobs: LogProbs) -> tuple[Tensor, Mapping[str, Tensor]]:
        batch, trainer = self._batch, logprobs.logprobs
        old = None if self._old is None else self._old[index].logprobs
        generator, row_sequence = batch.generator_logprobs[index], batch.micro_batches[index].row_sequence
        drawing = trainer if old is None else old  # the trainer's, of the weights that drew the tokens
        weights, bounded = importance_weights(drawing, generator, row_sequence, self._mismatch)
        loss, metrics = fused_stream_loss(
            LossInputs(
                trainer_logprobs=trainer,
                old_logprobs=old,
                ref_logprobs=None if self._reference is None else self._reference[index].logprobs,
                advantages=batch.advantages[index] * weights,
                token_weights=batch.token_weights[index],
                streams=self._preset.streams,
                clip=self._clip,
            )
        )
        gap = (trainer.detach() - generator).abs()
        per_token = {"logprob_gap": gap, "entropy": logprobs.entropy}
        if self._mismatch.kind != "none":
            per_token |= {"mismatch/weight": weights, "mismatch/bounded": bounded}
        sums = {name: value.sum() / batch.num_tokens for name, value in per_token.items()}
        return loss, {**metrics, **sums, **self._gaps(index, (drawing.detach() - generator).abs())}

    def _gaps(self, index: int, gap: Tensor) -> dict[str, Tensor]:
        """Mean |log-prob gap| to the generator, by kind of token; of the weights that drew them, before any update."""
        batch = self._batch
        kinds = token_kinds(batch.image_distance[index], batch.micro_batches[index].row_offset)
        return {f"mismatch/{name}": (gap * kinds[name]).sum() / count for name, count in batch.num_of_kind.items()}


def _metrics(
    groups: Sequence[RolloutGroup],
    rewards: Rewards,
    preset: Preset,
    results: Sequence[StepResult],
    clock: Clock,
) -> dict[str, float]:
    """Of the rollouts, of the optimizer steps (their mean) and of the time."""
    log = MetricLog()
    for name, value in summarise(groups, rewards).items():
        if value is not None:
            log.add(name, value)
    for name, value in rewards.items():
        if name != "format":  # in the summary already
            log.add(f"reward/{name}", value.mean().item())
    earned = [weight * rewards[name].mean().item() for stream in preset.streams for name, weight in stream.rewards]
    log.add("reward/total", sum(earned))

    pairs = [pair for group in groups for pair in group.pairs]
    responses = {
        "first": [pair.first for pair in pairs],
        "second": [pair.second for pair in pairs if pair.second is not None],
    }
    for name, rollouts in responses.items():
        for rollout in rollouts:
            log.add(f"{name}/response_tokens", len(rollout.response_ids))
            log.add(f"{name}/longest_response_tokens", len(rollout.response_ids), "max")
            log.add(f"{name}/truncated", rollout.finish_reason == "length")
            log.add(f"seconds/{name}_pass", rollout.finished_at - rollout.queued_at)
    for pair in pairs:
        log.add("second/missing", pair.second is None)
        if pair.description is not None:
            log.add("second/description_cut", pair.description_cut)
    num_tokens = sum(len(rollout.response_ids) for rollouts in responses.values() for rollout in rollouts)
    log.add("tokens_per_second", num_tokens / clock.seconds["seconds/rollout"])

    for result in results:
        for name, value in result.metrics.items():
            log.add(name, value)
        log.add("grad_norm", result.grad_norm)
        log.add("learning_rate", result.learning_rate, "last")
    for name, value in clock.seconds.items():
        log.add(name, value)
    return log.reduce()
