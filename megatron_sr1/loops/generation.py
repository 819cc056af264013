"""One colocated generation engine per rank."""

from __future__ import annotations

from megatron_sr1.loops.run import Run
from megatron_sr1.processing import Processor
from megatron_sr1.rollout import Engine, TwoPassGenerator


def build_generator(run: Run, hf_dir: str) -> TwoPassGenerator:
    """Engines on all ranks, each with the weights of `hf_dir` and a share of the prompts. Collective."""
    rollout = run.config.rollout
    engine = Engine(
        hf_dir,
        max_model_tokens=rollout.max_model_tokens,
        max_running_requests=rollout.max_running_requests,
        kv_cache_gib=rollout.kv_cache_gib,
        max_images=rollout.max_images,
        seed=run.config.seed,
    )
    return TwoPassGenerator(
        engine,
        Processor.from_pretrained(hf_dir),
        max_description_tokens=rollout.max_description_tokens,
        rank=run.platform.rank,
        num_ranks=run.platform.world_size,
        gather=run.gather,
    )
