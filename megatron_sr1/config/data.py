"""The data a command reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_sr1.config.rules import COUNT, COUNT_OR_NONE, Range, check_numbers, require

_WEIGHT = Range(0, 1e9, above=True)
_NUMBERS = {
    "train_weights": _WEIGHT,
    "cold_start_weights": _WEIGHT,
    "shuffle_window": COUNT,
    "max_prompt_tokens": COUNT_OR_NONE,
    "max_bad_samples": COUNT_OR_NONE,
    "workers": Range(1, 1024),
    "prefetch_mib": Range(1, 10**7),
    "cache_gib": Range(0, 1e7, above=True),
}


@dataclass(frozen=True)
class DataConfig:
    """Files of samples: shards (.tar), Parquet, JSON Lines, JSON, or folders of Hugging Face data sets, in any mixture.

    Each entry of a list is a path, a glob pattern, a folder (all shards in and below it, or one split of a data set:
    "folder:split"), or a URL with braces ("https://host/train-{00000..00007}.tar", s3://, gs://, hf://). Of Parquet and
    JSON shards are built once, in `cache_dir`.

    Every path or pattern must match at least one file. Weights make a mixture: one for each entry of the list they
    belong to, which then is a dataset of its own; without weights all entries are one dataset.
    """

    train: tuple[str, ...] = ()  # prompts with answers, for grpo
    train_weights: tuple[float, ...] = ()  # of the entries of train; empty: one dataset
    # of the entries of train that are Parquet or JSON: {column: field}, as tools/build_shards.py --rename takes them,
    # for example {question: problem, solution: answer}; null leaves a column out; empty: columns have the fields' names
    train_columns: dict[str, Any] = field(default_factory=dict)
    cold_start: tuple[str, ...] = ()  # demonstrations, for sft
    cold_start_weights: tuple[float, ...] = ()  # of the entries of cold_start; empty: one dataset
    cold_start_columns: dict[str, Any] = field(default_factory=dict)  # as train_columns
    heldout: tuple[str, ...] = ()  # prompts that are evaluated on
    heldout_columns: dict[str, Any] = field(default_factory=dict)  # as train_columns
    shuffle_window: int = 65_536  # samples shuffled together; smaller: reads stay within fewer shards
    max_prompt_tokens: int = 0  # longer prompts are left out, by the shards' index; 0: none
    max_bad_samples: int = 0  # samples that may be skipped, named in <run_dir>/quarantine/; one more stops the run
    workers: int = 2  # threads of each rank that decode, and as many that read
    prefetch_mib: int = 256  # of samples that wait to be used, of each rank; never more than a batch
    # where shards behind URLs are kept, and in its folder `built` those of Parquet and JSON, until you remove them
    cache_dir: str = "~/.cache/megatron_sr1/shards"
    cache_gib: float = 100.0  # of shards behind URLs; the least recently used make room

    def __post_init__(self) -> None:
        check_numbers("data", self, _NUMBERS)
        require(
            bool(self.cache_dir.strip()), "data.cache_dir", self.cache_dir, "a folder", "Name one, or leave it out."
        )
        for name in ("train", "cold_start"):
            weights, entries = getattr(self, f"{name}_weights"), getattr(self, name)
            require(
                not weights or len(weights) == len(entries),
                f"data.{name}_weights",
                weights,
                f"a number for each of the {len(entries)} entries of data.{name}, or empty",
                "Give one weight for each entry.",
            )
        for name in ("train", "cold_start", "heldout"):
            for column, to in getattr(self, f"{name}_columns").items():
                require(
                    isinstance(column, str) and column != "" and isinstance(to, str | None),
                    f"data.{name}_columns",
                    {column: to},
                    "names of columns with names of fields, both text, or null for none",
                    f"Write data.{name}_columns: {{question: problem}}; numbers and true in quotes.",
                )
