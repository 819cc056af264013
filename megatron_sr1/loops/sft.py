"""The cold start: supervised fine-tuning on both response layouts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from torch import Tensor

from megatron_sr1.config import Config
from megatron_sr1.loops.preemption import watch_for_stop
from megatron_sr1.loops.run import Run, metrics_of, open_run
from megatron_sr1.objective import sft_loss
from megatron_sr1.platform import Platform
from megatron_sr1.policy import Policy
from megatron_sr1.processor import Processor
from megatron_sr1.training.batches import Batcher, SftBatch
from megatron_sr1.training.checkpointer import Progress
from megatron_sr1.types import LogProbs, Prompt, Scoring, SftSample


def run_sft(config: Config, platform: Platform) -> None:
    """Trains on `data.cold_start` and exports to `<run_dir>/hf`. Continues from the newest checkpoint."""
    with open_run(config, platform) as run:
        _train(run)


def _train(run: Run) -> None:
    config = run.config
    feed = run.feed("cold_start")
    policy = Policy(config, run.platform, num_optimizer_steps=config.train.steps, keep_reference=False)
    batcher = Batcher(config, Processor.from_pretrained(config.model.hf_dir), policy.groups.data, run.platform.device)
    checkpoints = run.checkpointer()
    progress = run.resume(policy, feed)
    with feed, metrics_of(run, progress.step) as writer, watch_for_stop(run.platform) as stop:
        for step in range(progress.step, config.train.steps):
            start = time.perf_counter()
            taken = feed.next(config.train.batch_size)
            batch = batcher.sft(_only_demonstrations(taken.samples))
            result = policy.train_step(batch.micro_batches, _Loss(batch), Scoring())
            feed.finish(taken)
            progress = Progress(step + 1, feed.position, feed.fingerprint, config.model.hf_dir, feed.state().to_json())
            if writer is not None:
                optimizer = {"grad_norm": result.grad_norm, "learning_rate": result.learning_rate}
                writer.write(
                    step, {**result.metrics, **optimizer, **feed.metrics, "seconds/step": time.perf_counter() - start}
                )
            stopping = stop.agreed()
            if stopping or progress.step % config.train.save_every == 0 or progress.step == config.train.steps:
                checkpoints.save(policy, progress)
            if stopping:
                stop.leave(progress.step)
    run.export(policy)
    run.say(f"exported to {run.export_dir}")


def _only_demonstrations(samples: Sequence[Prompt | SftSample]) -> list[SftSample]:
    for sample in samples:
        if not isinstance(sample, SftSample):
            raise ValueError(
                f"data.cold_start holds the prompt {sample.key!r} without a response. Give demonstrations."
            )
    return list(samples)


class _Loss:
    """The loss of each micro-batch of one step."""

    def __init__(self, batch: SftBatch) -> None:
        self._batch = batch

    def __call__(self, index: int, logprobs: LogProbs) -> tuple[Tensor, Mapping[str, Tensor]]:
        return sft_loss(logprobs.logprobs, self._batch.token_weights[index])
