"""The index of a shard, wherever the shard is: from the file beside it, or from the shard itself."""

from __future__ import annotations

from pathlib import Path

from megatron_sr1.data.index import INDEX_SUFFIX, IndexedSample, ShardIndex, index_path, parse_index, read_index
from megatron_sr1.data.quarantine import BadSample
from megatron_sr1.data.remote import ShardCache
from megatron_sr1.data.scan import scan_shard
from megatron_sr1.data.urls import beside, is_url, shard_name, shown


def load_index(shard: str, cache: ShardCache | None) -> tuple[ShardIndex, list[BadSample]]:
    """Returns the index and what cannot be used of the shard.

    Raises:
        ValueError: the shard is missing, its index is damaged or belongs to another shard, or a URL lacks a cache.
    """
    if is_url(shard):
        if cache is None:
            raise ValueError(f"{shown(shard)} is a URL, and there is no cache for it. Set data.cache_dir.")
        return _of_url(shard, cache)
    path = Path(shard)
    if not index_path(path).is_file():
        return scan_shard(path)
    index = read_index(index_path(path))
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        raise ValueError(f"{path}: the shard is missing ({error}), but its index is there. Restore it.") from error
    if num_bytes > index.num_bytes:
        raise ValueError(
            f"{path} has {num_bytes} bytes, and its index speaks of {index.num_bytes}: it is the index of another "
            f"shard. Build it again, or remove {index_path(path).name}."
        )
    return index, [_cut(path, sample.key, num_bytes) for sample in index.samples if _end(sample) > num_bytes]


def _end(sample: IndexedSample) -> int:
    return max(offset + size for offset, size in zip(sample.offsets, sample.sizes, strict=True))


def _cut(path: Path, key: str, num_bytes: int) -> BadSample:
    reason = f"{path}, sample {key!r}: the shard is truncated to {num_bytes} bytes. Restore the shard."
    return BadSample(path.name, key, reason)


def _of_url(url: str, cache: ShardCache) -> tuple[ShardIndex, list[BadSample]]:
    index_url = beside(url, INDEX_SUFFIX)
    data = cache.read_index(index_url)
    cache.check(url)
    if data:
        return parse_index(data, shown(index_url)), []
    index, bad = scan_shard(cache.fetch(url))
    # messages of the scan name the copy
    return index, [BadSample(shard_name(url), item.key, f"{shown(url)}: {item.reason}") for item in bad]
