"""How many parameters each rank of a layout holds, from the modules that a run would build, made without memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_sr1.config import Config, LayoutConfig, ModelConfig, TrainConfig, check_model
from megatron_sr1.platform.fake_ranks import fake_ranks
from megatron_sr1.policy.build import build_chunks
from megatron_sr1.policy.groups import build_groups
from megatron_sr1.policy.read import read_architecture


@dataclass(frozen=True)
class StageCount:
    """One rank of a pipeline stage; the other ranks of the stage hold as many."""

    stage: int
    layers: tuple[int, ...]  # of each chunk
    language: int  # parameters
    vision: int
    experts: int  # of `language`, those of routed experts: other ranks share their optimizer state
    linear: int  # of `language`, the weights of the layers' matrix products, which fp8 casts
    largest: int  # the parameter that has most

    @property
    def total(self) -> int:
        return self.language + self.vision


def count_stages(hf_dir: str, layout: LayoutConfig, num_ranks: int) -> tuple[StageCount, ...]:
    """A rank of every pipeline stage, in order. A tied head counts on the last stage too where that is not the first,
    for it is a copy there; the vocabulary counts with its padding to equal shards.

    Args:
        hf_dir: a model directory of which only config.json is read.
        num_ranks: of the whole run.

    Raises:
        ConfigError: the layout does not fit the model or `num_ranks`.
        ValueError: a model class that is not supported.
    """
    config = Config(
        model=ModelConfig(hf_dir=hf_dir, layer_spec="torch"),
        layout=layout,
        nproc=num_ranks,
        train=TrainConfig(batch_size=num_ranks),
    )
    check_model(config)
    ranks_per_stage = num_ranks // layout.pipeline  # Megatron-Core counts ranks stage by stage
    return tuple(_count_rank(config, stage, stage * ranks_per_stage) for stage in range(layout.pipeline))


def count_model(hf_dir: str) -> StageCount:
    """The whole model on one rank: what its checkpoint holds."""
    return count_stages(hf_dir, LayoutConfig(), num_ranks=1)[0]


def _count_rank(config: Config, stage: int, rank: int) -> StageCount:
    with fake_ranks(rank, config.nproc) as platform:
        groups = build_groups(config.layout)
        assert groups.pipeline.rank() == stage, (groups.pipeline.rank(), stage)
        chunks = build_chunks(read_architecture(config.model.hf_dir), config, platform, groups, torch.device("meta"))
        layers = tuple(len(chunk.decoder.layers) for chunk in chunks)
        sizes = [(name, weight.numel()) for chunk in chunks for name, weight in chunk.named_parameters()]
    vision = sum(size for name, size in sizes if name.startswith("vision."))
    experts = sum(size for name, size in sizes if ".experts." in name)
    layers_of_decoder = [(name, size) for name, size in sizes if name.startswith("decoder.layers.")]
    linear = sum(size for name, size in layers_of_decoder if ".linear_" in name and name.endswith(".weight"))
    language, largest = sum(size for _, size in sizes) - vision, max(size for _, size in sizes)
    return StageCount(stage, layers, language, vision, experts, linear, largest)


def count_table(hf_dir: str, layout: LayoutConfig, num_ranks: int) -> str:
    """The counts of a layout and of the whole model, as text for a terminal.

    Raises:
        ConfigError, ValueError: as `count_stages`.
    """
    lines = [f"{'':>8} {'layers':>12} {'language':>16} {'vision':>14} {'total':>16}"]
    stages = count_stages(hf_dir, layout, num_ranks)
    for name, count in [*((f"stage {x.stage}", x) for x in stages), ("model", count_model(hf_dir))]:
        layers = " + ".join(map(str, count.layers))
        lines.append(f"{name:>8} {layers:>12} {count.language:>16,} {count.vision:>14,} {count.total:>16,}")
    return "\n".join(lines)
