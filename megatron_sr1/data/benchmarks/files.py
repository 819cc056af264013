"""The files of a benchmark in a copy of what its authors publish."""

from __future__ import annotations

import glob
from pathlib import Path

from megatron_sr1.data.benchmarks.benchmark import Benchmark
from megatron_sr1.data.benchmarks.labels import LabelledRows, LabelledSource, find_labels
from megatron_sr1.data.patterns import matching
from megatron_sr1.data.sources.json_files import JsonSource
from megatron_sr1.data.sources.json_lines import JsonlSource
from megatron_sr1.data.sources.parquet import ParquetSource
from megatron_sr1.data.sources.source import Source

LAYOUTS = (".parquet", ".jsonl", ".json")  # where a folder has several, the first one counts


def open_benchmark(benchmark: Benchmark, path: str, split: str | None, images: str | None) -> Source:
    """The rows of one split.

    Args:
        path: a file, a pattern, or a folder: of this set, or of a repository of several sets, see `Benchmark.folder`.
        split: that file names begin with (`test-00000-of-00001.parquet`), a file's whole name, or that of a folder;
            None: `Benchmark.split`. It says nothing where `path` is a file or a pattern.
        images: where the paths in JSON files begin; None: beside the file.

    Raises:
        ValueError: no file of the split is there, or `images` is given for Parquet, whose images are inside; several
            files may hold the answers.
    """
    pattern, suffix = _find(benchmark, path, split or benchmark.split)
    if suffix == ".parquet":
        if images is not None:
            raise ValueError(f"--images {images}: the Parquet files of {path} hold their images. Leave it out.")
        return ParquetSource(pattern, benchmark)  # pyright: ignore[reportReturnType]  # a cached property is a property
    kind = JsonlSource if suffix == ".jsonl" else JsonSource
    source: Source = kind(pattern, benchmark, images)  # pyright: ignore[reportAssignmentType]
    labels = find_labels(benchmark.labels, source.files) if benchmark.labels else None
    if labels is None:
        return source
    questions: Source = kind(pattern, LabelledRows(benchmark, labels), images)  # pyright: ignore[reportAssignmentType]
    return LabelledSource(questions, labels)


def _find(benchmark: Benchmark, path: str, split: str | None) -> tuple[str, str]:
    """A path or pattern of files of one layout, and their suffix."""
    there = matching(path)
    root = Path(there[0] if len(there) == 1 else path)
    if not root.is_dir():
        found = tuple(there)
        suffixes = {Path(name).suffix for name in found}
        if len(suffixes) != 1 or not suffixes <= set(LAYOUTS):
            raise ValueError(
                f"{path}: {len(found)} files with the endings {sorted(suffixes)} are there; needed are files that end "
                f"with one of {', '.join(LAYOUTS)}. Correct --input."
            )
        return path, suffixes.pop()
    if benchmark.folder and (root / benchmark.folder).is_dir():
        root = root / benchmark.folder
    names = ("*",) if split is None else (split, f"{split}[-.]*", f"{split}/*")
    for suffix in LAYOUTS:
        for name in names:
            pattern = f"{glob.escape(str(root))}/**/{name}"
            if any(Path(found).suffix == suffix for found in glob.iglob(pattern, recursive=True)):
                return pattern, suffix
    of_split = f" of the split {split!r}" if split else ""
    raise ValueError(
        f"{root} holds no file{of_split} of {benchmark.dataset} that ends with {', '.join(LAYOUTS)}. Give the folder "
        "it was downloaded to, another --split, or the file itself."
    )
