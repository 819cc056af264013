"""What a node's ranks hold in host memory.

offload     optimizer state and reference, pinned, once a first rollout has sent them there (config.offload)
checkpoint  each rank's share of it, from when it is taken until it is written (state.py); with train.save_hf also
            whole files of the weights, which go to ranks in turn
images      decoded, of the prompts that a rank's engine answers, as if every round of dynamic sampling replaced all,
            and of those that its replica trains, shared by the ranks of a stage: as if half of the longest sequence
            were visual tokens
patches     of the last images, which wait between an engine's use and the trainer's
read ahead  data.prefetch_mib a rank
processes   interpreter, libraries, CUDA's own, worker threads: taken as given, not derived
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from megatron_sr1.config import Config, typical_tokens
from megatron_sr1.estimate.engine import engine_parameters
from megatron_sr1.estimate.machine import GIB, Machine
from megatron_sr1.estimate.saved import WholeCount
from megatron_sr1.estimate.state import TrainerState, copied_bytes, weight_bytes
from megatron_sr1.policy.architecture import Architecture
from megatron_sr1.policy.parameter_counts import StageCount
from megatron_sr1.processor import KEPT_PATCHES

PROCESS_GIB = 8.0
HF_FILE_BYTES = 5_000_000_000  # of a file of weights, as weights/hf_shards.py makes them


def host_bytes(
    config: Config,
    machine: Machine,
    model: Architecture,
    states: Sequence[TrainerState],
    counts: Sequence[StageCount],
    *,
    generates: bool,
    whole: WholeCount | None = None,
) -> Mapping[str, float]:
    """Named bytes of the node that holds most.

    Args:
        states, counts: of a rank of every pipeline stage; none where nothing is trained.
        whole: see `engine_parameters`.
    """
    ranks = min(config.nproc, machine.gpus_per_node)
    found: dict[str, float] = {}
    if states and generates:
        names = [name for name in ("optimizer", "reference") if getattr(config.offload, name) is not False]
        found["offload"] = ranks * max(sum(getattr(state, name) for name in names) for state in states)
    if counts:
        copies, further = zip(*(copied_bytes(count, config) for count in counts), strict=True)
        found["checkpoint"] = ranks * max(copies) + max(further)
        if config.train.save_hf:
            all_files = weight_bytes(config) * engine_parameters(config.model.hf_dir, model, 1, whole)
            files = math.ceil(all_files / HF_FILE_BYTES)
            rounds = math.ceil(files / config.nproc)
            found["checkpoint"] += min(all_files, ranks * rounds * HF_FILE_BYTES)
    if generates:
        vision = model.hf.vision_config
        token_pixels = (vision.patch_size * vision.spatial_merge_size) ** 2
        first, _ = typical_tokens(config.rollout)
        answered = (1 + config.rollout.dynamic_sampling) * config.rollout.engine_tensor / config.nproc
        trained = 1 / (config.data_ranks * config.layout.tensor * config.layout.context)
        prompts = config.rollout.prompts_per_step * (answered + trained)
        found["images"] = ranks * prompts * first * 3 * token_pixels
        found["patches"] = ranks * KEPT_PATCHES * 3 * vision.temporal_patch_size * vision.patch_size**2
    found["read ahead"] = ranks * (config.data.prefetch_mib << 20)
    found["processes"] = ranks * PROCESS_GIB * GIB
    return found
