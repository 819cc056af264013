"""Self-rewarding GRPO: two passes, per-stream advantages, one update."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from megatron_sr1.checkpoint import Progress
from megatron_sr1.config import Config
from megatron_sr1.data import SampleStream, ShardDataset, expand_shards
from megatron_sr1.loops.batches import Batcher, StreamBatch
from megatron_sr1.loops.evaluate import evaluate, heldout_prompts, only_prompts
from megatron_sr1.loops.generation import build_generator
from megatron_sr1.loops.run import Run, metrics_of, open_run
from megatron_sr1.loops.scoring import Rewards, score_groups, summarise, without_leaks, write_rollouts
from megatron_sr1.metrics import MetricLog
from megatron_sr1.objective import Preset, preset_from_config, stream_loss
from megatron_sr1.platform import Platform
from megatron_sr1.policy import Policy, StepResult
from megatron_sr1.processing import Processor
from megatron_sr1.types import Clip, LogProbs, LossInputs, RolloutGroup, Sampling, Scoring


def run_grpo(config: Config, platform: Platform) -> None:
    """Trains on `data.train`, evaluates before and after on `data.heldout`, exports to `<run_dir>/hf`.

    Continues from the newest checkpoint of the run folder, with the next prompts, to the same bits.
    """
    with open_run(config, platform) as run:
        _train(run)


def _train(run: Run) -> None:
    config, train = run.config, run.config.train
    preset = preset_from_config(config.objective)
    dataset = ShardDataset(expand_shards(config.data.train, "data.train"))
    stream, heldout = SampleStream(dataset, config.seed), heldout_prompts(config)
    updates = config.rollout.prompts_per_step // train.batch_size
    keep_reference = any(s.kl_coef > 0 for s in preset.streams)
    policy = Policy(config, run.platform, num_optimizer_steps=train.steps * updates, keep_reference=keep_reference)
    trainer = _Trainer(config, policy, preset)
    run.say("starting the generation engines")
    generator = build_generator(run, config.model.hf_dir)
    checkpoints = run.checkpointer()
    source = (dataset.fingerprint, config.model.hf_dir)
    progress = checkpoints.restore(policy, *source) or Progress(0, 0, *source)
    if progress.step:
        run.say(f"continuing after step {progress.step}")
    generator.update_weights(policy.hf_weights(), version=progress.step)
    if progress.step == 0:
        run.say(f"evaluating the starting point on {len(heldout)} held-out prompts")
        evaluate(run, generator, heldout, label="before", step=0)

    with metrics_of(run, progress.step) as writer:
        for step in range(progress.step, train.steps):
            clock = _Clock()
            prompts = only_prompts(stream.take(progress.position, config.rollout.prompts_per_step), "data.train")
            with clock("rollout"):
                groups = generator.generate(prompts, _sampling(config, preset), step)
            with clock("reward"):
                rewards = score_groups(groups, preset, run.platform.rank, run.platform.world_size, run.gather)
            with clock("train"):
                results = trainer.update(groups, rewards)
            with clock("sync"):
                generator.update_weights(policy.hf_weights(), version=step + 1)
            progress = Progress(step + 1, progress.position + len(prompts), *source)
            if writer is not None:
                write_rollouts(run.folder / "rollouts" / f"step_{step:06d}.jsonl", groups, rewards)
                writer.write(step, _metrics(groups, rewards, preset, results, clock))
            if progress.step % train.save_every == 0 or progress.step == train.steps:
                checkpoints.save(policy, progress)
            if train.evaluate_every and progress.step % train.evaluate_every == 0 and progress.step < train.steps:
                evaluate(run, generator, heldout, label=f"step-{progress.step}", step=progress.step)
    run.say(f"evaluating the trained policy on {len(heldout)} held-out prompts")
    answers = evaluate(run, generator, heldout, label="after", step=progress.step)
    run.export(policy)
    run.verify_export(answers[: config.evaluate.verify_export])
    run.say(f"exported to {run.export_dir}")


def _sampling(config: Config, preset: Preset) -> Sampling:
    rollout = config.rollout
    return Sampling(
        num_samples=rollout.samples_per_prompt,
        temperature=rollout.temperature,
        max_response_tokens=rollout.max_response_tokens,
        seed=config.seed,
        template=preset.template,
        second_pass=preset.second_pass or preset.template == "see_think",  # measured even where it earns nothing
    )


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

    def __call__(self, index: int, logprobs: LogProbs) -> tuple[Tensor, Mapping[str, Tensor]]:
        loss, metrics = stream_loss(
            LossInputs(
                trainer_logprobs=logprobs.logprobs,
                old_logprobs=None if self._old is None else self._old[index].logprobs,
                ref_logprobs=None if self._reference is None else self._reference[index].logprobs,
                advantages=self._batch.advantages[index],
                token_weights=self._batch.token_weights[index],
                streams=self._preset.streams,
                clip=self._clip,
            )
        )
        gap = (logprobs.logprobs.detach() - self._batch.generator_logprobs[index]).abs()
        per_token = {"logprob_gap": gap, "entropy": logprobs.entropy}
        return loss, {**metrics, **{name: value.sum() / self._batch.num_tokens for name, value in per_token.items()}}


def _metrics(
    groups: Sequence[RolloutGroup],
    rewards: Rewards,
    preset: Preset,
    results: Sequence[StepResult],
    clock: _Clock,
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


class _Clock:
    """Seconds spent in each part of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[f"seconds/{part}"] = time.perf_counter() - start
