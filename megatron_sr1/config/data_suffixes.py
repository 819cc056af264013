"""How files of data are called: those that are read as they are, and those that shards are built of."""

from __future__ import annotations

SHARD_SUFFIX = ".tar"
PARQUET_SUFFIXES = (".parquet", ".arrow")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
JSON_SUFFIX = ".json"
DATA_SUFFIXES = (SHARD_SUFFIX, *PARQUET_SUFFIXES, *JSONL_SUFFIXES, JSON_SUFFIX)
