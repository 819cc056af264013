"""Writes samples as WebDataset shards."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from pathlib import Path

from megatron_sr1.data.index import index_path
from megatron_sr1.data.schema import encode_sample
from megatron_sr1.types import Prompt, SftSample

MTIME = 0  # seconds; fixed, so that the same samples give the same bytes


def write_shards(samples: Iterable[Prompt | SftSample], out_dir: Path, name: str, samples_per_shard: int) -> list[Path]:
    """Writes `out_dir/name-00000.tar`, `name-00001.tar` ... and returns their paths.

    The shards are written under temporary names and renamed at the end: an interrupted call leaves the shards of an
    earlier one as they were. A complete one replaces all of them, also where it writes fewer. Same samples, same bytes.

    Raises:
        ValueError: no samples, a repeated key, a sample that breaks the schema, samples_per_shard below 1.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard={samples_per_shard} must be 1 or more.")
    out_dir.mkdir(parents=True, exist_ok=True)
    temporary: list[Path] = []
    try:
        _write_temporary(samples, out_dir, name, samples_per_shard, temporary)
        final = [out_dir / f"{name}-{number:05d}.tar" for number in range(len(temporary))]
        for source, target in zip(temporary, final, strict=True):
            index_path(target).unlink(missing_ok=True)  # it speaks of the shard that is replaced
            os.replace(source, target)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    for stale in sorted(set(out_dir.glob(f"{name}-[0-9][0-9][0-9][0-9][0-9].tar")) - set(final)):
        index_path(stale).unlink(missing_ok=True)
        stale.unlink()
    return final


def _write_temporary(
    samples: Iterable[Prompt | SftSample], out_dir: Path, name: str, samples_per_shard: int, paths: list[Path]
) -> None:
    """Appends each path to `paths` before it creates the file, so that the caller can remove it."""
    from webdataset.writer import TarWriter  # here, because it imports torch, which readers of shards do not need

    seen: set[str] = set()
    remaining = iter(samples)
    while shard := list(itertools.islice(remaining, samples_per_shard)):
        paths.append(out_dir / f".{name}-{len(paths):05d}.{os.getpid()}.tmp")
        with open(paths[-1], "wb") as file, TarWriter(file, encoder=False, compress=False, mtime=MTIME) as writer:
            for sample in shard:
                key, members = encode_sample(sample)
                if key in seen:
                    raise ValueError(f"key {key!r} names two samples of {name!r}. Give every sample its own key.")
                seen.add(key)
                writer.write({"__key__": key} | members)
    if not paths:
        raise ValueError(f"there are no samples to write to {name!r}. Give at least one.")
