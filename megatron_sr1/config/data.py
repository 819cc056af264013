"""The shards a command reads."""

from __future__ import annotations

from dataclasses import dataclass

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
    """Shards, as paths, glob patterns, folders (all in and below them), or URLs with braces
    ("https://host/train-{00000..00007}.tar").

    Every path or pattern must match at least one file. Weights make a mixture: one for each entry of the list they
    belong to, which then is a dataset of its own; without weights all entries are one dataset.
    """

    train: tuple[str, ...] = ()  # shards of prompts with answers, for grpo
    train_weights: tuple[float, ...] = ()  # of the entries of train; empty: one dataset
    cold_start: tuple[str, ...] = ()  # shards of demonstrations, for sft
    cold_start_weights: tuple[float, ...] = ()  # of the entries of cold_start; empty: one dataset
    heldout: tuple[str, ...] = ()  # shards of prompts that are evaluated on
    shuffle_window: int = 65_536  # samples shuffled together; smaller: reads stay within fewer shards
    max_prompt_tokens: int = 0  # longer prompts are left out, by the shards' index; 0: none
    max_bad_samples: int = 0  # samples that may be skipped, named in <run_dir>/quarantine/; one more stops the run
    workers: int = 2  # threads of each rank that read and decode
    prefetch_mib: int = 256  # of samples that wait to be used, of each rank; never more than a batch
    cache_dir: str = "~/.cache/megatron_sr1/shards"  # where shards behind URLs are kept
    cache_gib: float = 100.0  # the least recently used make room

    def __post_init__(self) -> None:
        check_numbers("data", self, _NUMBERS)
        for name in ("train", "cold_start"):
            weights, entries = getattr(self, f"{name}_weights"), getattr(self, name)
            require(
                not weights or len(weights) == len(entries),
                f"data.{name}_weights",
                weights,
                f"a number for each of the {len(entries)} entries of data.{name}, or empty",
                "Give one weight for each entry.",
            )
