"""What an evaluation leaves in `<run_dir>/eval`, and the summary that the report reads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sr1.config import EvaluateConfig
from megatron_sr1.config.rules import require
from megatron_sr1.evaluation import Identity, Record, read_records, summarise_records
from megatron_sr1.evaluation.heldout import Heldout
from megatron_sr1.evaluation.parts import RecordParts
from megatron_sr1.evaluation.summary import Numbers
from megatron_sr1.types import Prompt


@dataclass(frozen=True)
class EvaluationFiles:
    """The files of one evaluation of a run."""

    run_folder: Path
    label: str

    @property
    def summary(self) -> Path:
        return self.run_folder / "eval" / f"{self.label}.json"

    @property
    def records(self) -> Path:
        return self.run_folder / "eval" / f"{self.label}.jsonl"

    @property
    def identity(self) -> Path:
        """In a folder of its own: every other JSON file in `eval` is an evaluation."""
        return self.run_folder / "eval" / "identity" / f"{self.label}.json"

    @property
    def parts(self) -> Path:
        """The folder of what is not finished, see `parts.py`."""
        return self.run_folder / "eval" / "parts" / self.label

    @property
    def control_parts(self) -> Path:
        """The folder of answers to controls that are not in the records yet, see `control_parts.py`."""
        return self.run_folder / "eval" / "parts" / f"{self.label}.controls"

    def remove(self) -> None:
        """All of them, and the verdicts and answers that are not in the records yet."""
        for folder in (self.parts, self.control_parts):
            RecordParts(folder).remove()
        for path in (self.summary, self.records, self.records.with_suffix(".verdicts.jsonl"), self.identity):
            path.unlink(missing_ok=True)


def check_measured(files: EvaluationFiles, metric: str) -> None:
    """Raises ConfigError where an evaluation has no such number; the message names those it has."""
    numbers = json.loads(files.summary.read_text(encoding="utf-8"))["summary"]
    known = sorted(name for name, value in numbers.items() if isinstance(value, int | float))
    require(
        metric in known,
        "train.keep_best",
        metric,
        "a number of the run's evaluations",
        f"On data.heldout they measure {', '.join(known)}.",
    )


def write_summary(
    files: EvaluationFiles, identity: Identity, heldout: Heldout, settings: EvaluateConfig, step: int
) -> tuple[Numbers, Mapping[str, Numbers]]:
    """Writes `eval/<label>.json` from the records and returns its numbers, overall and by source."""
    judge = settings.judge_model if settings.judge_url else ""
    summary, by_source = summarise_records(read_records(files.records), judge, settings.controls)
    prompts = heldout.first(settings.examples)
    (files.run_folder / "eval" / "images").mkdir(parents=True, exist_ok=True)
    shown = enumerate(zip(prompts, read_records(files.records), strict=False))
    result = {
        "label": files.label,
        "step": step,
        "summary": summary,
        "by_source": by_source,
        "judge": judge or None,
        "controls": list(settings.controls),
        "made_of": dict(identity),
        "examples": [_example(files.run_folder, index, *pair) for index, pair in shown],
    }
    temporary = files.summary.with_name(f".{files.summary.name}.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, files.summary)
    return summary, by_source


def _example(run_folder: Path, index: int, prompt: Prompt, record: Record) -> dict[str, Any]:
    """The first sample of a prompt; its images go to `eval/images`."""
    assert prompt.key == record.key
    sample, images = record.samples[0], []
    for number, image in enumerate(prompt.images):
        name = f"eval/images/{index:04d}_{number}.png"
        image.save(run_folder / name)
        images.append(name)
    return {
        "key": record.key,
        "problem": record.problem,
        "answer": record.answer,
        "images": images,
        "first": sample.first.text,
        "second": None if sample.second is None else sample.second.text,
        "description": sample.description,
        "rewards": dict(sample.rewards),
        "faithful": sample.faithful,
    }
