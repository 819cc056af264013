"""How many parameters each rank of a layout holds, from the modules that a run would build, made without memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from megatron_sr1.config import Config, LayoutConfig, ModelConfig, TrainConfig, check_model
from megatron_sr1.platform.fake_ranks import fake_ranks
from megatron_sr1.policy.architecture import Architecture
from megatron_sr1.policy.build import build_chunks
from megatron_sr1.policy.groups import build_groups
from megatron_sr1.policy.read import read_architecture
from megatron_sr1.weights.frozen import MERGERS


@dataclass(frozen=True)
class StageCount:
    """One rank of a pipeline stage; the other ranks of the stage hold as many."""

    stage: int
    layers: tuple[int, ...]  # of each chunk
    language: int  # parameters
    vision: int
    experts: int  # of `language`, those of routed experts: other ranks share their optimizer state
    linear: int  # of `language`, the weights of the layers' matrix products, which fp8 casts
    largest: int  # the trained parameter that has most
    trained: int  # of all, those that model.freeze leaves to be trained; they alone have gradients and optimizer state
    trained_experts: int  # of `experts`
    trained_tower: int  # of `vision`, without mergers
    trained_mergers: int  # of `vision`

    @property
    def total(self) -> int:
        return self.language + self.vision


def count_stages(
    hf_dir: str, layout: LayoutConfig, num_ranks: int, freeze: tuple[str, ...] = ()
) -> tuple[StageCount, ...]:
    """A rank of every pipeline stage, in order. A tied head counts on the last stage too where that is not the first,
    for it is a copy there; the vocabulary counts with its padding to equal shards.

    Args:
        hf_dir: a model directory of which only config.json is read.
        num_ranks: of the whole run.
        freeze: see `ModelConfig`.

    Raises:
        ConfigError: the layout does not fit the model or `num_ranks`; `freeze` names what is not there, or everything.
        ValueError: a model class that is not supported.
    """
    described = Path(hf_dir) / "config.json"
    text = described.read_bytes() if described.is_file() else b""
    return _counted(hf_dir, text, layout, num_ranks, freeze)


@lru_cache(maxsize=256)  # a search for a layout asks for the same parts of many
def _counted(
    hf_dir: str, config_json: bytes, layout: LayoutConfig, num_ranks: int, freeze: tuple[str, ...]
) -> tuple[StageCount, ...]:
    """`config_json`: what the folder's now says; a model that was put in its place is another."""
    config = Config(
        model=ModelConfig(hf_dir=hf_dir, layer_spec="torch", freeze=freeze),
        layout=layout,
        nproc=num_ranks,
        train=TrainConfig(batch_size=num_ranks),
    )
    check_model(config)
    architecture = read_architecture(hf_dir)
    counts: list[StageCount] = []
    counted: dict[Any, StageCount] = {}  # by what a stage holds: of many, most hold the same
    for stage in range(layout.pipeline):
        held = _held(architecture, layout, stage)
        if freeze or held not in counted:  # freeze may name single layers
            counted[held] = _count_rank(config, architecture, stage)
        counts.append(replace(counted[held], stage=stage))
    return tuple(counts)


def _held(architecture: Architecture, layout: LayoutConfig, stage: int) -> tuple[Any, ...]:
    """The kinds of layers in each chunk of a stage, and what only its ends hold."""
    kinds = list(zip(architecture.linear_layers, architecture.moe_layers, strict=True))
    sizes = layout.stage_layers or [len(kinds) // layout.num_chunks] * layout.num_chunks
    ends = list(accumulate(sizes))
    chunks = range(stage, layout.num_chunks, layout.pipeline)
    return (stage == 0, stage == layout.pipeline - 1, *(tuple(kinds[ends[i] - sizes[i] : ends[i]]) for i in chunks))


def count_model(hf_dir: str) -> StageCount:
    """The whole model on one rank: what its checkpoint holds."""
    return count_stages(hf_dir, LayoutConfig(), num_ranks=1)[0]


def _count_rank(config: Config, architecture: Architecture, stage: int) -> StageCount:
    rank = stage * (config.nproc // config.layout.pipeline)  # Megatron-Core counts ranks stage by stage
    with fake_ranks(rank, config.nproc) as platform:
        groups = build_groups(config.layout)
        assert groups.pipeline.rank() == stage, (groups.pipeline.rank(), stage)
        chunks = build_chunks(architecture, config, platform, groups, torch.device("meta"))
        layers = tuple(len(chunk.decoder.layers) for chunk in chunks)
        return count_chunks(stage, layers, chunks)


def count_chunks(stage: int, layers: tuple[int, ...], chunks: Sequence[torch.nn.Module]) -> StageCount:
    """The parameters of a rank's chunks."""
    named = [(name, weight) for chunk in chunks for name, weight in chunk.named_parameters()]
    every = [(name, weight.numel()) for name, weight in named]
    trained = [(name, weight.numel()) for name, weight in named if weight.requires_grad]
    vision, mergers = _of(trained, "vision."), _of(trained, *MERGERS)
    linear = [entry for entry in every if ".linear_" in entry[0] and entry[0].endswith(".weight")]
    return StageCount(
        stage,
        layers,
        language=sum(size for _, size in every) - _of(every, "vision."),
        vision=_of(every, "vision."),
        experts=_experts(every),
        linear=_of(linear, "decoder.layers."),
        largest=max((size for _, size in trained), default=0),
        trained=sum(size for _, size in trained),
        trained_experts=_experts(trained),
        trained_tower=vision - mergers,
        trained_mergers=mergers,
    )


def _of(sizes: Iterable[tuple[str, int]], *prefixes: str) -> int:
    return sum(size for name, size in sizes if name.startswith(prefixes))


def _experts(sizes: Iterable[tuple[str, int]]) -> int:
    return sum(size for name, size in sizes if ".experts." in name)


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
