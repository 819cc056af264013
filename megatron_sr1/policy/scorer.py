"""A model that scores: weights in a layout, log-prob passes, weights out. No optimizer, no gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor

from megatron_sr1.config import Config, check_model
from megatron_sr1.platform import GroupRanks, Platform
from megatron_sr1.platform.precision import check_precision
from megatron_sr1.policy.architecture import Architecture
from megatron_sr1.policy.build import build_chunks
from megatron_sr1.policy.groups import ParallelGroups, build_groups
from megatron_sr1.policy.layers.specs import layer_spec_name
from megatron_sr1.policy.parameter_counts import StageCount, count_chunks
from megatron_sr1.policy.read import open_tensors, read_architecture
from megatron_sr1.policy.schedule import Schedule
from megatron_sr1.policy.sharded import load_model_weights
from megatron_sr1.policy.work import Work
from megatron_sr1.types import LogProbs, MicroBatch, Scoring
from megatron_sr1.weights import export_hf_weights, kept_weights, load_hf_weights, mark_shards


class Scorer:
    """A Qwen-VL model in the layout of the configuration.

    Every rank calls every method, in the same order; micro-batches are those of this rank's data-parallel replica.
    """

    def __init__(self, config: Config, platform: Platform) -> None:
        """Loads `config.model.megatron_dir`, or `config.model.hf_dir` where that is empty.

        Raises:
            ValueError: a model class that is not supported, weights that do not fit, a layout that does not divide, a
                precision that the machine does not have.
        """
        check_model(config)
        spec = layer_spec_name(config.model.layer_spec, platform, config.precision.dtype)
        check_precision(config.precision, spec, platform)
        self.architecture: Architecture = read_architecture(config.model.hf_dir)
        self.config = config
        self.platform = platform
        self.groups: ParallelGroups = build_groups(config.layout)
        model_parallel_cuda_manual_seed(config.seed)
        self.chunks = build_chunks(self.architecture, config, platform, self.groups, platform.device)
        self._load_weights()
        self._schedule = Schedule(self.chunks, self.groups, config)
        self.work = Work(trains_vision=not {"vision", "merger"} <= set(config.model.freeze))

    def _load_weights(self) -> None:
        """From the Megatron checkpoint where one is named, else from the Hugging Face directory."""
        if self.config.model.megatron_dir:
            load_model_weights(self.chunks, self.config.model.megatron_dir)
        else:
            load_hf_weights(self.chunks, open_tensors(self.architecture), self.architecture, self.groups)
        mark_shards(self.chunks, self.architecture, self.groups)

    @property
    def replicas(self) -> GroupRanks:
        """The data-parallel replicas, each with a share of the sequences."""
        return GroupRanks(self.groups.data, self.platform.device)

    def logprobs(self, batches: Sequence[MicroBatch], scoring: Scoring) -> list[LogProbs]:
        """Scores of each micro-batch's R rows, without gradient, on every rank of the pipeline; hidden states, where a
        micro-batch keeps them, on those of the last stage alone. All micro-batches mark the top, or none does."""
        self.chunks[0].start_images(batches)
        self.work.add(batches, trains=False)
        dtype = self.chunks[-1].config.params_dtype
        num_scores = 2 + any(batch.marks_top for batch in batches)

        def collect(index: int, output: Tensor) -> tuple[Tensor, Tensor | None]:
            if not batches[index].keeps_hidden:
                return output[:num_scores], None
            return output[:num_scores].clone(), output[num_scores:].t().to(
                dtype
            )  # no view: nobody is to keep the whole output

        found = self._schedule.run(
            batches, scoring, forward_only=True, collect=collect, discard=lambda output: (output, None)
        )
        return self._from_last_stage(found, batches, num_scores) if batches else []

    def hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """All weights under their Hugging Face names, full, on every rank; all ranks iterate together."""
        bucket_bytes = self.config.rollout.sync_bucket_mib * 2**20
        return export_hf_weights(self.chunks, self.architecture, self.groups, bucket_bytes=bucket_bytes)

    def folder_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What a Hugging Face folder of the policy holds: `hf_weights`, and what the model it started from has beside
        them (`weights.kept`). All ranks iterate together."""
        yield from self.hf_weights()
        model = self.config.model
        yield from kept_weights((*filter(None, [model.megatron_dir]), model.hf_dir), self.architecture.family)

    def stage_counts(self) -> tuple[StageCount, ...]:
        """As `count_stages`, of the modules that are there: it needs no process of its own. Collective."""
        stage, per_stage = self.groups.pipeline.rank(), self.platform.world_size // self.config.layout.pipeline
        layers = tuple(len(chunk.decoder.layers) for chunk in self.chunks)
        speaks = self.platform.rank == stage * per_stage  # Megatron-Core counts ranks stage by stage
        return tuple(self.platform.ranks.gather([count_chunks(stage, layers, self.chunks)] if speaks else []))

    def _from_last_stage(
        self, found: list[tuple[Tensor, Tensor | None]], batches: Sequence[MicroBatch], num_scores: int
    ) -> list[LogProbs]:
        scores = [each for each, _ in found]
        hidden = [kept for _, kept in found] if self.groups.is_last_stage else [None] * len(batches)
        if self.groups.pipeline.size() > 1:
            sizes = [len(batch.targets) for batch in batches]
            empty = torch.empty(num_scores, sum(sizes), device=self.platform.device)
            joined = torch.cat(scores, dim=1) if self.groups.is_last_stage else empty
            torch.distributed.broadcast(joined, self.groups.last_stage_rank, group=self.groups.pipeline)
            scores = list(joined.split(sizes, dim=1))
        return [
            LogProbs(score[0], score[1], hidden=kept, is_top=score[2] > 0 if num_scores > 2 else None)
            for score, kept in zip(scores, hidden, strict=True)
        ]
