"""The process groups of a layout: the only file that asks Megatron-Core's global state for groups."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch.distributed
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from megatron_sr1.config import LayoutConfig
from megatron_sr1.platform.megatron_private import created_groups


@dataclass(frozen=True)
class ParallelGroups:
    """This rank's groups. `collection` is what Megatron-Core's modules take."""

    tensor: ProcessGroup
    pipeline: ProcessGroup
    context: ProcessGroup
    data: ProcessGroup  # replicas; each holds a share of the sequences
    tensor_context: ProcessGroup  # the ranks that share the rows of a pipeline stage
    expert: ProcessGroup
    collection: ProcessGroupCollection

    @property
    def replicas(self) -> ProcessGroup:
        """The ranks that hold the same weights, but for experts: data-parallel and context-parallel ones."""
        return self.collection.dp_cp

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline.rank() == self.pipeline.size() - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last pipeline stage of this rank's pipeline."""
        return torch.distributed.get_process_group_ranks(self.pipeline)[-1]


def build_groups(layout: LayoutConfig) -> ParallelGroups:
    """Splits the ranks of the default process group; every rank calls it. An earlier split is destroyed first: what was
    built on it can no longer communicate."""
    if parallel_state.model_parallel_is_initialized():
        _destroy_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=1,  # an expert is small: it is whole on a rank
        create_gloo_process_groups=False,  # the groups built anyway serve every collective
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return ParallelGroups(groups.tp, groups.pp, groups.cp, groups.dp, groups.tp_cp, groups.ep, groups)


def _destroy_groups() -> None:
    """Megatron-Core forgets its groups but leaves them to torch.distributed, with their threads and connections."""
    for group in created_groups():
        with suppress(ValueError):  # it went with the default group that it was split from
            torch.distributed.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
