"""The trained policy: log-prob passes, one optimizer step, weights out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor

from megatron_sr1.config import Config, check_model
from megatron_sr1.convert import export_hf_weights, load_hf_weights
from megatron_sr1.platform import Platform
from megatron_sr1.policy.architecture import Architecture, read_architecture, transformer_config
from megatron_sr1.policy.groups import ParallelGroups, build_groups
from megatron_sr1.policy.model import QwenVLModel
from megatron_sr1.policy.optimizer import build_optimizer, load_optimizer_state
from megatron_sr1.types import LogProbs, LossFn, MicroBatch, Scoring

CHECKPOINT_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports, the same on every rank."""

    metrics: dict[str, float]  # the loss function's metrics, added over micro-batches and data-parallel ranks
    grad_norm: float
    learning_rate: float


class Policy:
    """A Qwen-VL policy in the layout of the configuration, with optimizer and frozen reference.

    Every rank calls every method, in the same order; micro-batches are those of this rank's data-parallel replica.
    """

    def __init__(self, config: Config, platform: Platform, *, num_optimizer_steps: int, keep_reference: bool) -> None:
        """Loads `config.model.hf_dir`.

        Raises:
            ValueError: a model class that is not supported, weights that do not fit, a layout that does not divide.
        """
        check_model(config)
        self.architecture: Architecture = read_architecture(config.model.hf_dir)
        self.config = config
        self.platform = platform
        self.groups: ParallelGroups = build_groups(config.layout)
        model_parallel_cuda_manual_seed(config.seed)
        megatron_config = transformer_config(self.architecture, config.layout, platform.on_cpu)
        self.stage = QwenVLModel(
            self.architecture,
            megatron_config,
            self.groups,
            max_position=config.model.max_position,
            train_vision=config.model.train_vision,
        ).to(platform.device)
        load_hf_weights(self.stage, config.model.hf_dir, self.architecture, self.groups.tensor)
        self.model = DistributedDataParallel(
            megatron_config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=config.layout.distributed_optimizer
            ),
            self.stage,
            pg_collection=self.groups.collection,
        )
        megatron_config.finalize_model_grads_func = _add_gradients
        megatron_config.no_sync_func = self.model.no_sync
        self.optimizer, self.scheduler = build_optimizer(
            config.optimizer, self.model, num_optimizer_steps, config.layout.distributed_optimizer
        )
        self._reference = [p.detach().clone() for p in self.stage.parameters()] if keep_reference else None

    def logprobs(self, batches: Sequence[MicroBatch], scoring: Scoring) -> list[LogProbs]:
        """Scores of each micro-batch's R rows, without gradient, on every rank of the pipeline."""
        scores = self._run(batches, scoring, forward_only=True, collect=lambda _, output: output)
        return self._from_last_stage(scores, batches)

    def reference_logprobs(self, batches: Sequence[MicroBatch], scoring: Scoring) -> list[LogProbs]:
        """The same under the weights the policy started from."""
        with self._reference_weights():
            return self.logprobs(batches, scoring)

    def train_step(self, batches: Sequence[MicroBatch], loss_fn: LossFn, scoring: Scoring) -> StepResult:
        """Forward and backward of all micro-batches, gradient clipping, one optimizer step.

        Raises:
            FloatingPointError: the gradient norm is not finite. The weights are spoilt then; what was saved is not.
        """
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()

        def collect(index: int, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            loss, metrics = loss_fn(index, LogProbs(output[0], output[1]))
            return loss, torch.ones((), dtype=torch.int), {name: value.detach() for name, value in metrics.items()}

        reported = self._run(batches, scoring, forward_only=False, collect=collect)
        metrics = self._add_metrics(reported)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        _, grad_norm, _ = self.optimizer.step()
        if not torch.isfinite(torch.as_tensor(grad_norm)):
            raise FloatingPointError(
                f"the gradient norm is {grad_norm}. Look at the last rollouts, lower optimizer.lr, and run the command "
                "again: it continues from the newest checkpoint."
            )
        self.scheduler.step(increment=1)
        return StepResult(metrics, float(grad_norm), learning_rate)

    def hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """All weights under their Hugging Face names, full, on every rank; all ranks iterate together."""
        return export_hf_weights(self.stage, self.architecture, self.groups.tensor, self.groups.pipeline)

    def sharded_state(self, *, loading: bool) -> dict[str, Any]:
        """Model, optimizer and schedule as Megatron-Core's distributed checkpointing takes them: any layout can load
        what any other saved."""
        model = self.stage.sharded_state_dict()
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=loading, metadata=CHECKPOINT_FORMAT)
        return {"model": model, "optimizer": optimizer, "scheduler": self.scheduler.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes what was loaded into `sharded_state(loading=True)`."""
        self.stage.load_state_dict(state["model"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])

    def _run(
        self,
        batches: Sequence[MicroBatch],
        scoring: Scoring,
        *,
        forward_only: bool,
        collect: Callable[[int, Tensor], Any],
    ) -> list[Any]:
        """Megatron's schedule over the micro-batches. `collect(index, output)` sees the last stage's outputs."""

        def forward_step(
            batch_iterator: Iterator[tuple[int, MicroBatch]], model: torch.nn.Module
        ) -> tuple[Tensor, Any]:
            index, batch = next(batch_iterator)
            output = model(batch, scoring)
            return output, (lambda out, non_loss_data=False: collect(index, out))

        schedule = get_forward_backward_func()
        with torch.set_grad_enabled(not forward_only):
            return schedule(
                forward_step_func=forward_step,
                data_iterator=enumerate(batches),
                model=self.model,
                num_microbatches=len(batches),
                seq_length=max(len(batch.input_ids) for batch in batches),
                micro_batch_size=1,
                forward_only=forward_only,
                collect_non_loss_data=forward_only,
            )

    def _from_last_stage(self, scores: list[Tensor], batches: Sequence[MicroBatch]) -> list[LogProbs]:
        if self.groups.pipeline.size() > 1:
            sizes = [len(batch.targets) for batch in batches]
            empty = torch.empty(2, sum(sizes), device=self.platform.device)
            joined = torch.cat(scores, dim=1) if self.groups.is_last_stage else empty
            torch.distributed.broadcast(joined, self.groups.last_stage_rank, group=self.groups.pipeline)
            scores = list(joined.split(sizes, dim=1))
        return [LogProbs(score[0], score[1]) for score in scores]

    def _add_metrics(self, reported: list[Mapping[str, Tensor]]) -> dict[str, float]:
        names = [sorted(reported[0]) if self.groups.is_last_stage else None]
        if self.groups.pipeline.size() > 1:
            torch.distributed.broadcast_object_list(names, self.groups.last_stage_rank, group=self.groups.pipeline)
        total = torch.zeros(len(names[0]), dtype=torch.float64, device=self.platform.device)
        for metrics in reported:
            total += torch.stack([metrics[name].double() for name in names[0]])
        torch.distributed.all_reduce(total, group=self.groups.data)
        torch.distributed.broadcast(total, self.groups.last_stage_rank, group=self.groups.pipeline)
        return dict(zip(names[0], total.tolist(), strict=True))

    @contextmanager
    def _reference_weights(self) -> Iterator[None]:
        if self._reference is None:
            raise ValueError("this policy keeps no reference: every KL coefficient is 0, so none should be asked for")
        self._exchange_weights()
        try:
            yield
        finally:
            self._exchange_weights()

    @torch.no_grad()
    def _exchange_weights(self) -> None:
        """Swaps trained and reference values in place, one parameter at a time."""
        for parameter, other in zip(self.stage.parameters(), self._reference, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(other)
            other.copy_(kept)


def _add_gradients(model: list[torch.nn.Module], num_tokens: Tensor | None, **options: Any) -> None:
    """Megatron's reduction without its division by a token count: losses carry their own global denominators."""
    finalize_model_grads(model, num_tokens=None, **options)
