"""Writes a page with its viewer: as one file where that is small, else with a folder beside it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_sr1.report.runs import ReportedRun
from megatron_sr1.report.viewer.chunks import write_run
from megatron_sr1.report.viewer.evaluations import evaluation_sets, no_blocks
from megatron_sr1.report.viewer.folder import ChunkFolder
from megatron_sr1.report.viewer.images import NoImages
from megatron_sr1.report.viewer.page import viewer_page
from megatron_sr1.report.viewer.shown import RunToShow

INSIDE_BYTES = 4 << 20  # of data and images that are in the page itself
Viewed = Callable[[ReportedRun, Path], RunToShow]  # a run, the folder of images -> what is shown of it


def viewed_evaluations(run: ReportedRun, image_folder: Path) -> RunToShow:
    """What texts alone tell of a run: its evaluations, with the images that they have kept."""
    images = NoImages("only the examples of an evaluation keep their images")
    return RunToShow(run.name, evaluation_sets(run, images, image_folder, no_blocks))


def write_page(
    title: str, sections: Sequence[str], runs: Sequence[ReportedRun], viewed: Viewed, out: Path
) -> list[str]:
    """
    Args:
        sections: of the overview.
        out: the page; its folder is made where missing.

    Returns:
        What could not be read, in sentences.

    Raises:
        ValueError: see `ChunkFolder`, and what `viewed` raises.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    folder, temporary = ChunkFolder(out), out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        told = []
        for name, run in zip(_names(runs), runs, strict=True):
            shown = replace(viewed(run, folder.image_folder), name=name)
            if shown.sets:
                told.append(write_run(shown, len(told), folder))
        inside = folder.all_bytes() <= INSIDE_BYTES
        blocks = folder.fold() if inside else ()
        name = "" if inside else folder.folder.name
        with temporary.open("w", encoding="utf-8", errors="xmlcharrefreplace") as file:
            file.writelines(viewer_page(title, sections, told, name, folder.stamp, blocks))
        if not inside:
            folder.place()
        os.replace(temporary, out)
    finally:
        folder.discard()
        temporary.unlink(missing_ok=True)
    return [f"{run['name']}, {one['title']}: {one['problem']}" for run in told for one in run["sets"] if one["problem"]]


def _names(runs: Sequence[ReportedRun]) -> list[str]:
    """Of the folders; with those above, or numbers, where two have one name."""
    counts = Counter(run.name for run in runs)
    names = [run.name if counts[run.name] == 1 else "/".join(run.path.parts[-2:]) for run in runs]
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} ({number})" for number, name in enumerate(names)]
