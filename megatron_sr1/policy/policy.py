"""The trained policy: one optimizer step, a frozen reference, states to save."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from megatron_sr1.config import Config
from megatron_sr1.phases import during
from megatron_sr1.platform import Platform
from megatron_sr1.policy.frozen import check_shares
from megatron_sr1.policy.gradients import wrap_chunks, zero_gradients
from megatron_sr1.policy.offload import Offload, optimizer_tensors
from megatron_sr1.policy.optimizer import (
    build_optimizer,
    gradient_norm,
    inner_optimizers,
    learning_rate,
    load_optimizer_state,
    num_stepped,
)
from megatron_sr1.policy.optimizer_state import sharded_optimizer_state
from megatron_sr1.policy.schedule import Schedule
from megatron_sr1.policy.scorer import Scorer
from megatron_sr1.policy.sharded import load_sharded_weights, sharded_weights
from megatron_sr1.types import LogProbs, LossFn, MicroBatch, Scoring


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports, the same on every rank."""

    metrics: dict[str, float]  # the loss function's metrics, added over micro-batches and data-parallel ranks
    grad_norm: float
    learning_rate: float
    skipped: bool = False  # the gradient was not finite: weights and moments are what they were
    culprits: tuple[tuple[str, int], ...] = ()  # of a skipped step: key and number of samples whose log-probs are not


class Policy(Scorer):
    """A scorer that is trained: with an optimizer and, where wanted, a frozen reference."""

    def __init__(
        self,
        config: Config,
        platform: Platform,
        *,
        num_optimizer_steps: int,
        keep_reference: bool,
        updates_per_step: int = 1,
    ) -> None:
        """See `Scorer` for what it loads and raises.

        Args:
            num_optimizer_steps: of the whole run.
            updates_per_step: optimizer steps of a step of the run.

        Raises:
            ConfigError: `model.freeze` leaves a rank nothing to train.
        """
        super().__init__(config, platform)
        self._updates_per_step = updates_per_step
        self.model = wrap_chunks(self.chunks, config.layout, self.groups)
        self.optimizer, self.scheduler = build_optimizer(
            config.optimizer, config.precision, self.model, num_optimizer_steps, config.layout.distributed_optimizer
        )
        if config.model.freeze:
            shares: list[list[int]] = [[]] * platform.world_size
            torch.distributed.all_gather_object(shares, num_stepped(self.optimizer))
            check_shares(config.model.freeze, shares, "rank")
        self._schedule = Schedule(self.model, self.groups, config)
        # what is frozen is its own reference
        self._reference = [p.detach().clone() for p in self._trained_parameters()] if keep_reference else None
        self._offload = Offload(config.offload, platform.device)

    def leave_device(self) -> None:
        """Gives the device memory of what only training needs, as `config.offload` says, until `return_to_device`. The
        weights stay: `logprobs` and `hf_weights` go on."""
        wrapped: list[Any] = self.model  # whose `buffers` are Megatron's, not torch's
        buffers = [buffer for chunk in wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        weights = [parameter.data for parameter in self._parameters()]
        self._offload.leave(
            gradients=[buffer.grad_data for buffer in buffers],
            optimizer=optimizer_tensors(inner_optimizers(self.optimizer)),
            reference=self._reference or (),
            kept=weights,
        )

    def return_to_device(self) -> None:
        """Everything is where it was, to the bit; gradients are zero."""
        self._offload.come_back()

    def _parameters(self) -> Iterator[torch.nn.Parameter]:
        for chunk in self.chunks:
            yield from chunk.parameters()

    def _trained_parameters(self) -> Iterator[torch.nn.Parameter]:
        return (parameter for parameter in self._parameters() if parameter.requires_grad)

    def reference_logprobs(self, batches: Sequence[MicroBatch], scoring: Scoring) -> list[LogProbs]:
        """`logprobs` under the weights the policy started from."""
        with during("reference"), self._reference_weights():
            return self.logprobs(batches, scoring)

    def train_step(self, batches: Sequence[MicroBatch], loss_fn: LossFn, scoring: Scoring) -> StepResult:
        """Forward and backward of all micro-batches, gradient clipping, one optimizer step; none where the gradient is
        not finite, on every rank. The schedule counts it either way, as a run that goes on from a checkpoint does."""
        self._must_be_here()
        zero_gradients(self.model)
        self.chunks[0].start_images(batches)
        self.work.add(batches, trains=True)
        self.optimizer.zero_grad()
        no_tokens = torch.zeros((), dtype=torch.int)  # the schedule's own normalisation, which is not used

        def collect(index: int, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            loss, metrics = loss_fn(index, LogProbs(output[0], output[1], output[2:]))
            return loss, no_tokens, {name: value.detach() for name, value in metrics.items()}

        def discard(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            return output.sum(), no_tokens, {}

        reported = self._schedule.run(batches, scoring, forward_only=False, collect=collect, discard=discard)
        metrics = self._add_metrics(reported)
        rate = learning_rate(self.optimizer)
        grad_norm = gradient_norm(self.optimizer)
        is_finite = math.isfinite(grad_norm)
        if is_finite:
            self.optimizer.step()
        self.scheduler.step(increment=1)
        return StepResult(metrics, grad_norm, rate, skipped=not is_finite)

    def sharded_state(self, *, loading: bool) -> dict[str, Any]:
        """Model and optimizer as Megatron-Core's distributed checkpointing takes them: any layout can load
        what any other saved."""
        self._must_be_here()
        precision = self.config.precision
        scales = precision.dtype == "fp8" and precision.fp8_recipe == "delayed"  # the others compute theirs each step
        model = sharded_weights(self.chunks, extra_state=scales)
        # a stack of layers must be whole, and frozen ones have no state
        named = sharded_weights(self.chunks, by_layer=True) if self.config.model.freeze else model
        return {
            "model": model,
            "optimizer": sharded_optimizer_state(self.optimizer, named, loading=loading),
            "distributed_optimizer": self.config.layout.distributed_optimizer,
        }

    def load_state(self, state: dict[str, Any], step: int) -> None:
        """Takes what was loaded into `sharded_state(loading=True)`: weights and moments. Learning rates, their schedule
        and all other settings of the optimizer are those of the configuration, as if it had always been this one.

        Args:
            step: of the run's steps, how many are done.
        """
        self._must_be_here()
        load_sharded_weights(self.chunks, state["model"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.scheduler.step(increment=step * self._updates_per_step)

    def _must_be_here(self) -> None:
        if self._offload.is_away:
            raise RuntimeError("the trainer's state has left the device: call return_to_device() first")

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
        self._must_be_here()
        self._exchange_weights()
        try:
            yield
        finally:
            self._exchange_weights()

    @torch.no_grad()
    def _exchange_weights(self) -> None:
        """Swaps trained and reference values in place, one parameter at a time."""
        assert self._reference is not None
        for parameter, other in zip(self._trained_parameters(), self._reference, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(other)
            other.copy_(kept)
