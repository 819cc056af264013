"""Builds shards: samples in the order of their source, each shard as full as its limit in bytes allows.

What comes out is a pure function of the input and the options; neither the number of workers nor an interruption
changes a byte.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_sr1.data.build.assembler import Assembler, Cut
from megatron_sr1.data.build.journal import Journal, JournalEntry, replace_text
from megatron_sr1.data.build.samples import TextRules
from megatron_sr1.data.build.workers import built_chunks
from megatron_sr1.data.sources.source import Chunk, Problem, Source

RULES = 5  # counts how often other samples have been made of the same input; a build is finished by the same rules


@dataclass(frozen=True)
class BuildOptions:
    """Where shards go. `settings`: everything else that decides what is built, as JSON; kept in the report."""

    out_dir: Path
    name: str  # of the shards: <name>-00000.tar
    max_shard_bytes: int
    num_workers: int  # 0: this process alone
    settings: Mapping[str, Any]
    keep_duplicates: bool = False

    def cut(self, tokenizer: str) -> Cut:
        """The part that decides where shards end."""
        return Cut(self.name, self.max_shard_bytes, self.keep_duplicates, tokenizer)


@dataclass(frozen=True)
class BuildReport:
    """What was built. The problems themselves are in <name>.problems.jsonl."""

    plan: Mapping[str, Any]
    num_samples: int
    left_out: Mapping[str, int]  # samples by the kind of their problem
    fingerprint: str  # of the data set, as `ShardDataset.fingerprint`
    shards: tuple[Mapping[str, Any], ...]  # {name, num_samples, num_bytes, sha256, fingerprint}
    images_per_sample: Mapping[str, int] = field(default_factory=dict)  # samples by their number of images
    changed: Mapping[str, int] = field(default_factory=dict)  # samples by what of them is not as it was found
    reasons: Mapping[str, str] = field(default_factory=dict)  # the first one of each kind in `left_out`

    @classmethod
    def read(cls, path: Path) -> BuildReport:
        """Raises ValueError where the file is damaged."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: it is no report of a build ({error}). Build the shards again.") from error


def report_path(out_dir: Path, name: str) -> Path:
    """Where the report lies; a build without it is not complete."""
    return out_dir / f"{name}.report.json"


def problems_path(out_dir: Path, name: str) -> Path:
    """One JSON object {where, key, kind, reason} a line for every sample that was left out."""
    return out_dir / f"{name}.problems.jsonl"


def build_shards(
    source: Source, rules: TextRules, options: BuildOptions, advance: Callable[[int, int], None]
) -> tuple[BuildReport, bool]:
    """Builds, or finishes, `<name>-*.tar` with their indices, `<name>.report.json` and `<name>.problems.jsonl`.

    Args:
        advance: called as (rows done, rows in all) while the build goes on.

    Returns:
        The report, and whether there was anything to do.

    Raises:
        ValueError: a damaged input file, an output folder with shards of another build, no sample is left.
    """
    plan, journal = _plan(source, options), Journal(options.out_dir, options.name)
    done = _complete(plan, options)
    if done is not None:
        journal.remove()  # where it was killed while it did so
        return done, False
    chunks = list(source.chunks())
    options.out_dir.mkdir(parents=True, exist_ok=True)
    _refuse_other_shards(journal, options)
    with journal.open(plan) as records:
        assembler = Assembler(journal, options.cut(rules.tokenizer), records)
        _assemble(assembler, source, rules, chunks, options.num_workers, advance)
        problems = [problem for record in records for problem in record.problems] + assembler.problems
        text = "".join(json.dumps(asdict(problem)) + "\n" for problem in problems)
        replace_text(problems_path(options.out_dir, options.name), text)
        if not records:
            journal.remove()
            raise ValueError(
                f"no sample is left of {sum(chunk.num_rows for chunk in chunks)}: "
                f"{problems_path(options.out_dir, options.name)} says why."
                + (f" The first one: {problems[0].where}: {problems[0].reason}." if problems else "")
            )
        journal.publish(records)
        report = _report(plan, records, problems)
        replace_text(report_path(options.out_dir, options.name), json.dumps(asdict(report), indent=1) + "\n")
        journal.remove()
    return report, True


def _plan(source: Source, options: BuildOptions) -> dict[str, Any]:
    """What decides the bytes: the options, and names, sizes and times of the input files."""
    files = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in source.files]
    return {
        **options.settings,
        "rules": RULES,
        "name": options.name,
        "max_shard_bytes": options.max_shard_bytes,
        "keep_duplicates": options.keep_duplicates,
        "files": files,
    }


def whole_report(out_dir: Path, name: str) -> BuildReport | None:
    """The report of the build in a folder, if all its shards are there; None: it is not complete.

    Raises:
        ValueError: as `BuildReport.read`.
    """
    path = report_path(out_dir, name)
    if not path.is_file():
        return None
    report = BuildReport.read(path)
    shards = [(out_dir / shard["name"], shard["num_bytes"]) for shard in report.shards]
    return report if all(file.is_file() and file.stat().st_size == num_bytes for file, num_bytes in shards) else None


def _complete(plan: Mapping[str, Any], options: BuildOptions) -> BuildReport | None:
    """The report of just this build, if all its shards are there."""
    report = whole_report(options.out_dir, options.name)
    return report if report is not None and report.plan == plan else None


def _refuse_other_shards(journal: Journal, options: BuildOptions) -> None:
    """Raises ValueError where shards of this name are there that no unfinished build explains."""
    found = sorted(options.out_dir.glob(f"{options.name}-*.tar"))
    if found and not journal.folder.is_dir():
        raise ValueError(
            f"{options.out_dir} holds {len(found)} shards {options.name}-*.tar of another build. Remove them, or give "
            "another --out or --name."
        )


def _assemble(
    assembler: Assembler,
    source: Source,
    rules: TextRules,
    chunks: Sequence[Chunk],
    num_workers: int,
    advance: Callable[[int, int], None],
) -> None:
    """Feeds everything that comes after the finished shards."""
    total, (first, skipped) = sum(chunk.num_rows for chunk in chunks), assembler.position
    rows = sum(chunk.num_rows for chunk in chunks[:first])
    advance(rows, total)
    for number, items in enumerate(built_chunks(source, rules, chunks[first:], num_workers), first):
        for item in range(skipped, len(items)):
            assembler.add(items[item], (number, item))
        skipped = 0
        rows += chunks[number].num_rows
        advance(rows, total)
    assembler.finish((len(chunks), 0))


def _report(plan: Mapping[str, Any], records: Sequence[JournalEntry], problems: Sequence[Problem]) -> BuildReport:
    shards = [
        {
            "name": record.shard,
            "num_samples": len(record.keys),
            "num_bytes": record.num_bytes,
            "sha256": record.sha256,
            "fingerprint": record.fingerprint,
        }
        for record in records
    ]
    digest = hashlib.sha256("".join(f"{r.shard}\0{r.fingerprint}\n" for r in records).encode())
    left_out = dict(sorted(Counter(problem.kind for problem in problems).items()))
    images, changed = Counter[str](), Counter[str]()
    for record in records:
        images.update(record.images)
        changed.update(record.changes)
    return BuildReport(
        plan=plan,
        num_samples=sum(len(record.keys) for record in records),
        left_out=left_out,
        fingerprint=digest.hexdigest(),
        shards=tuple(shards),
        images_per_sample=dict(sorted(images.items(), key=lambda count: int(count[0]))),
        changed=dict(sorted(changed.items())),
        reasons={problem.kind: f"{problem.where}: {problem.reason}" for problem in reversed(problems)},
    )
