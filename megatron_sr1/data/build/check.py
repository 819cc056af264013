"""Are the shards of a folder still what was built? Every byte is read again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megatron_sr1.data.build.builder import BuildReport
from megatron_sr1.data.index import INDEX_SUFFIX, IndexedSample, index_path, read_index
from megatron_sr1.data.scan import scan_shard

_READ_BYTES = 2**20


@dataclass(frozen=True)
class Checked:
    """What was looked at, and everything that is wrong, each with shard and key."""

    num_shards: int
    num_samples: int
    wrong: tuple[str, ...]


def check_shards(folder: Path, num_workers: int, advance: Callable[[int, int], None]) -> Checked:
    """Compares every shard with its index, sample by sample, and with its sha256 where a report of its build has it.

    Args:
        advance: called as (shards done, shards in all).

    Raises:
        ValueError: there is no shard, or a report is damaged.
    """
    reports = [BuildReport.read(path) for path in sorted(folder.glob("*.report.json"))]
    sums = {str(shard["name"]): str(shard["sha256"]) for report in reports for shard in report.shards}
    there = {path.name for path in folder.glob("*.tar")}
    indexed = {path.name.removesuffix(INDEX_SUFFIX) for path in folder.glob("*.tar" + INDEX_SUFFIX)}
    names = sorted(there | indexed | set(sums))
    if not names:
        raise ValueError(f"{folder} holds no *.tar. Give the folder that --out named.")
    wrong, num_samples = [], 0
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        checks = pool.map(partial(_check_shard, folder, sums), names)
        for done, (found, samples) in enumerate(checks, 1):
            wrong += found
            num_samples += samples
            advance(done, len(names))
    return Checked(len(names), num_samples, tuple(wrong))


def _check_shard(folder: Path, sums: dict[str, str], name: str) -> tuple[list[str], int]:
    path = folder / name
    if not path.is_file():
        return [f"{path}: the shard is missing."], 0
    try:
        index = read_index(index_path(path))
        found, bad = scan_shard(path, contents=True)
    except ValueError as error:
        return [str(error)], 0
    wrong = [sample.reason for sample in bad]
    if found.num_bytes != index.num_bytes:
        wrong.append(f"{path}: it has {found.num_bytes} bytes; its index says {index.num_bytes}.")
    named = {sample.key for sample in bad}
    known = {sample.key: sample for sample in index.samples if sample.key not in named}
    wrong += [_difference(path, known.pop(sample.key, None), sample) for sample in found.samples]
    wrong += [f"{path}, sample {key!r}: it is in the index, but not readable in the shard." for key in known]
    wrong = [line for line in wrong if line]
    if not wrong and name in sums and _sha256(path) != sums[name]:
        wrong.append(f"{path}: its samples are whole, but other bytes of the file (padding, headers) were changed.")
    return wrong, len(found.samples)


def _difference(path: Path, indexed: IndexedSample | None, found: IndexedSample) -> str:
    """What the shard has otherwise than its index, or ""."""
    where = f"{path}, sample {found.key!r}"
    if indexed is None:
        return f"{where}: it is not in the index."
    if indexed.checksum and indexed.checksum != found.checksum:
        return f"{where}: its checksum is not that of the index: its bytes were changed."
    # what the index alone knows, or what an index that was made without reading the data does not know
    known = replace(found, text_tokens=indexed.text_tokens, checksum=indexed.checksum)
    if indexed.image_sizes is None:
        known = replace(known, image_sizes=None)
    return "" if known == indexed else f"{where}: members, places or image sizes are not those of the index."


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()
