"""The source of some files, by the name of their format."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_sr1.data.sources.columns import Columns
from megatron_sr1.data.sources.conversations import LlavaSource
from megatron_sr1.data.sources.json_files import JsonSource
from megatron_sr1.data.sources.json_lines import JsonlSource
from megatron_sr1.data.sources.parquet import ParquetSource
from megatron_sr1.data.sources.source import Format, Source
from megatron_sr1.data.sources.webdataset import WebDatasetSource

WITH_IMAGE_FOLDER: tuple[Format, ...] = ("jsonl", "json", "llava")  # whose rows name files of images


def open_source(kind: Format, path: str, rename: Mapping[str, str], images: str | None = None) -> Source:
    """
    Args:
        path: a file, a folder or a pattern.
        rename: {column: field}, see `Columns`.
        images: where the paths of images begin, of formats WITH_IMAGE_FOLDER; None: beside the file.
    """
    columns = Columns(rename)
    match kind:
        case "parquet":
            return ParquetSource(path, columns)
        case "jsonl":
            return JsonlSource(path, columns, images)
        case "json":
            return JsonSource(path, columns, images)
        case "llava":
            return LlavaSource(path, images)
        case "webdataset":
            return WebDatasetSource(path, columns)
