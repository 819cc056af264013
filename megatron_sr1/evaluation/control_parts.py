"""Answers to controls on their way into the records: a file for each rank, in the order in which answers come.

A line is {"place": [number of the record, of the sample, control], "answer": as in the record}. A kill loses the lines
that were being written; the others are not asked for again.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_sr1.evaluation.controls import Place, with_answers
from megatron_sr1.evaluation.parts import PartWriter, RecordParts
from megatron_sr1.evaluation.records import ControlAnswer, read_control, read_records, replace_records, whole_lines


def write_answer(writer: PartWriter, place: Place, answer: ControlAnswer) -> None:
    """Appends it."""
    writer.write({"place": list(place), "answer": asdict(answer)})


def read_answers(folder: Path) -> dict[Place, ControlAnswer]:
    """All that were written; for one rank, while nobody writes. What a kill has cut is cut off.

    Raises:
        ValueError: a whole line is no answer; the message names file and line.
    """
    found: dict[Place, ControlAnswer] = {}
    for path in sorted(folder.glob("*.jsonl")):
        whole = 0
        for (place, answer), end in whole_lines(path, _placed):
            found[place] = answer
            whole = end
        os.truncate(path, whole)
    return found


def merge_answers(folder: Path, records: Path) -> Collection[ControlAnswer]:
    """Writes what is in the folder into the records, and removes it. A kill meanwhile leaves one or both."""
    answers = read_answers(folder)
    if answers:
        replace_records(records, with_answers(read_records(records), answers))
    RecordParts(folder).remove()
    return answers.values()


def _placed(line: Any) -> tuple[Place, ControlAnswer]:
    index, number, name = line["place"]
    return (int(index), int(number), str(name)), read_control(line["answer"])
