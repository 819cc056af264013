"""From the `data` section of the configuration to datasets and streams."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from megatron_sr1.config import DataConfig
from megatron_sr1.data.patterns import expand_shards
from megatron_sr1.data.quarantine import Quarantine
from megatron_sr1.data.remote import ShardCache
from megatron_sr1.data.shards import ShardDataset
from megatron_sr1.data.stream import SampleStream, VisualTokens


def open_dataset(config: DataConfig, patterns: Sequence[str], key: str, quarantine: Quarantine) -> ShardDataset:
    """All shards of some patterns; `key` names where the patterns come from.

    Raises:
        ValueError: as `expand_shards` and `ShardDataset`.
    """
    cache = ShardCache(Path(config.cache_dir).expanduser(), int(config.cache_gib * 2**30))
    return ShardDataset(expand_shards(patterns, key), quarantine=quarantine, cache=cache)


def open_stream(
    config: DataConfig,
    name: Literal["train", "cold_start"],
    seed: int,
    quarantine: Quarantine,
    visual_tokens: VisualTokens,
    engine_tokens: int = 0,
) -> SampleStream:
    """The stream over `data.<name>`: one dataset, or, with `data.<name>_weights`, a mixture of its entries.

    Args:
        engine_tokens: the longest prompt that an engine takes. Without data.max_prompt_tokens it is the limit, wherever
            an index has lengths; 0: there is no engine.

    Raises:
        ValueError: as `open_dataset` and `SampleStream`.
    """
    patterns, weights = {
        "train": (config.train, config.train_weights),
        "cold_start": (config.cold_start, config.cold_start_weights),
    }[name]
    parts = [[pattern] for pattern in patterns] if weights else [patterns]
    return SampleStream(
        [open_dataset(config, part, f"data.{name}", quarantine) for part in parts],
        seed,
        weights=weights,
        window=config.shuffle_window,
        max_prompt_tokens=config.max_prompt_tokens or engine_tokens,
        needs_lengths=config.max_prompt_tokens > 0,
        visual_tokens=visual_tokens,
    )
