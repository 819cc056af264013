"""Which descriptions the judge is asked about, all of them at once, and the verdicts back in the records.

A verdict is kept in a journal the moment it is there, so a killed evaluation asks only for the others. When all are
there the records are rewritten, in their order, and the journal is removed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

from megatron_sr1.evaluation.records import Record, Verdict, read_records, replace_records
from megatron_sr1.judge import NoVerdict
from megatron_sr1.prompts import OURS, Template
from megatron_sr1.rewards import grade

Ask = Callable[[str], str]  # a question to the judge's response; raises NoVerdict
Answer = Callable[[Record, str], "Verdict | NoVerdict"]  # of a question about a record and its description
Place = tuple[str, int]  # key of the prompt, number of the sample
_QUEUED_PER_THREAD = 4


@dataclass(frozen=True)
class Judging:
    """What came of it."""

    num_asked: int
    num_missing: int  # of those asked
    last_failure: str  # why the last of them is missing; "" where none is


def judge_records(
    path: Path, ask: Ask, model: str, num_threads: int, *, rounded: bool = False, template: Template = OURS.second
) -> Judging:
    """Asks for every verdict of `model` that the records lack, and writes them into the records.

    Only whole samples count: one without a description is not asked about. A verdict that another model gave before is
    replaced. `rounded` as in `grade`; `template` is that of the second pass.

    Raises:
        ConfigError: as `Judge.ask`; verdicts that came before it are kept for the next time.
        ValueError: records or journal are damaged.
    """
    journal = path.with_suffix(".verdicts.jsonl")
    known = _read_journal(journal, model)
    open_questions = _questions(path, model, known)
    asked = missing = 0
    failure = ""
    with journal.open("a", encoding="utf-8") as file, ThreadPoolExecutor(num_threads) as pool:
        for place, outcome in _answers(
            pool,
            functools.partial(_verdict, ask, model, rounded, template),
            open_questions,
            _QUEUED_PER_THREAD * num_threads,
        ):
            asked += 1
            if isinstance(outcome, NoVerdict):
                missing, failure = missing + 1, str(outcome)
                continue
            known[place] = outcome
            file.write(json.dumps([*place, asdict(outcome)]) + "\n")
            file.flush()
    if known:
        replace_records(path, (_with_verdicts(record, known) for record in read_records(path)))
    journal.unlink()
    return Judging(asked, missing, failure)


def _questions(path: Path, model: str, known: dict[Place, Verdict]) -> Iterator[tuple[Place, Record, str]]:
    for record in read_records(path):
        for number, sample in enumerate(record.samples):
            place = (record.key, number)
            has_verdict = place in known or (sample.judge is not None and sample.judge.model == model)
            if record.described and sample.description is not None and not has_verdict:
                yield place, record, sample.description


def _answers(
    pool: ThreadPoolExecutor, answer: Answer, questions: Iterator[tuple[Place, Record, str]], queue: int
) -> Iterator[tuple[Place, Verdict | NoVerdict]]:
    """In the order they come; `queue` questions wait or are under way, so the records need not be in memory."""
    running: dict[Future[Verdict | NoVerdict], Place] = {}
    try:
        while True:
            for place, record, description in islice(questions, queue - len(running)):
                running[pool.submit(answer, record, description)] = place
            if not running:
                return
            done = wait(running, return_when=FIRST_COMPLETED).done
            for future in sorted(done, key=lambda future: future.exception() is not None):  # what is there is kept
                yield running.pop(future), future.result()
    finally:
        for future in running:
            future.cancel()


def _verdict(
    ask: Ask, model: str, rounded: bool, template: Template, record: Record, description: str
) -> Verdict | NoVerdict:
    """A response that is whole and has no answer gives none, so the description did not suffice."""
    try:
        text = ask(template.as_question(record.problem, description))
    except NoVerdict as failure:
        return failure
    answer = template.answer_of(text)
    right = answer is not None and grade(answer, record.answer, record.choices, rounded=rounded)
    return Verdict(model, text, right)


def _with_verdicts(record: Record, known: dict[Place, Verdict]) -> Record:
    samples = (
        replace(sample, judge=known.get((record.key, number), sample.judge))
        for number, sample in enumerate(record.samples)
    )
    return replace(record, samples=tuple(samples))


def _read_journal(journal: Path, model: str) -> dict[Place, Verdict]:
    if not journal.exists():
        return {}
    lines = journal.read_text(encoding="utf-8").split("\n")
    journal.write_text("".join(line + "\n" for line in lines[:-1]), encoding="utf-8")  # without a line that was cut
    known: dict[Place, Verdict] = {}
    for line in lines[:-1]:
        try:
            key, number, fields = json.loads(line)
            verdict = Verdict(**fields)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{journal} holds a damaged line ({error}). Remove the file: the judge is asked again."
            ) from error
        if verdict.model == model:
            known[key, number] = verdict
    return known
