"""Controls of the second pass, asked when all prompts of an evaluation are answered and recorded.

`evaluation/controls.py` says which there are. Engines take them as they have room, and each answer is graded and
written at once, so that one that was interrupted goes on with what is missing. Those that the starting weights read
come last, together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from megatron_sr1.config import Config
from megatron_sr1.evaluation.control_parts import merge_answers, read_answers, write_answer
from megatron_sr1.evaluation.controls import ControlTask, ControlTasks
from megatron_sr1.evaluation.files import EvaluationFiles
from megatron_sr1.evaluation.parts import PartWriter
from megatron_sr1.evaluation.records import ControlAnswer, Response
from megatron_sr1.loops.answering import evaluation_sampling
from megatron_sr1.loops.generation import engine_ranks
from megatron_sr1.loops.run import Run
from megatron_sr1.rewards import grade
from megatron_sr1.streams import preset_of
from megatron_sr1.types import Generator, Prompt, PromptShare, RolloutGroup


def chosen_controls(config: Config, reader: str) -> tuple[str, ...]:
    """Those of `evaluate.controls` that can be asked.

    Args:
        reader: model directory of the start; "": the model that is evaluated is the start itself.
    """
    return tuple(name for name in config.evaluate.controls if name != "reference" or reader)


def ask_controls(run: Run, generator: Callable[[], Generator], files: EvaluationFiles, step: int, reader: str) -> None:
    """Asks what the records lack, and writes the answers into them; `generator` is called only if there is anything.
    Collective.

    Args:
        reader: as in `chosen_controls`.
    """
    platform, settings = run.platform, run.config.evaluate
    names = chosen_controls(run.config, reader)
    if len(names) < len(settings.controls):
        run.say(
            "evaluate.controls: reference is left out, as the model is its own start: objective.reference_dir is empty"
        )
    if not names:
        return
    answered = platform.on_main(lambda: list(read_answers(files.control_parts)))
    asked = ControlTasks(files.records, names, reader)
    if asked.num_unknown and set(names) - {"prior", "reference"}:
        run.say(
            f"{asked.num_unknown} records of an earlier release say nothing of images and metadata: shuffled, gold and "
            "other_question leave them out. --restart asks for all."
        )
    done = asked.done | set(answered)
    left = [number for number, task in enumerate(asked.tasks) if task.place not in done]
    if left:
        run.say(f"asking {len(left)} questions of controls: {', '.join(names)}")
        _answer(run, generator, files.control_parts, asked, left, step, reader)
    missing = platform.on_main(lambda: _merge(files))
    if missing:
        run.say(f"{missing} questions of controls do not fit: the engine's limit, or rollout.max_description_tokens")


def _merge(files: EvaluationFiles) -> int:
    """How many of the answers say that what was to be asked does not fit."""
    answers = merge_answers(files.control_parts, files.records)
    return sum(answer.response is None for answer in answers)


def _answer(
    run: Run,
    generator: Callable[[], Generator],
    folder: Path,
    asked: ControlTasks,
    left: Sequence[int],
    step: int,
    reader: str,
) -> None:
    """Collective."""
    preset, keys, engines = preset_of(run.config), [task.key for task in asked.tasks], engine_ranks(run)
    sampling = replace(evaluation_sampling(run.config, preset), num_samples=1, later=())
    by_start = {number for number in left if asked.tasks[number].place[2] == "reference"}
    with ExitStack() as stack:
        writer = stack.enter_context(PartWriter(folder, f"{run.platform.ranks.rank:05d}"))
        answers = _Answers(run, asked, writer, reader)
        for weights in ("policy", "reference"):
            places = [number for number in left if (number in by_start) == (weights == "reference")]
            if places:
                shares = [places[rank :: engines.num_ranks] for rank in range(engines.num_ranks)]
                share = PromptShare(keys, {}, shares, answers.read)
                generator().stream(share, replace(sampling, reader=weights), step, answers.take)
    run.platform.wait_for_all()  # all files are closed


class _Answers:
    """Plans, grades and writes what this rank's engine is asked."""

    def __init__(self, run: Run, asked: ControlTasks, writer: PartWriter, reader: str) -> None:
        self._asked, self._writer, self._reader = asked, writer, reader
        self._planner, self._rounded = run.planner, run.config.evaluate.rounded_decimals
        self._preset = preset_of(run.config)

    def read(self, number: int) -> Prompt | None:
        """What a task asks; None, and written so, where it does not fit."""
        task = self._asked.tasks[number]
        prompt = self._asked.prompt(task)
        longer = prompt.given is not None and self._planner.cut(prompt.given) != prompt.given
        too_long = task.place[2] == "gold" and longer  # a description was cut, and may be another text at its end
        if too_long or self._planner.refusals(prompt, self._preset.passes.of(prompt)):
            write_answer(self._writer, task.place, self._open(task))
            return None
        return prompt

    def take(self, group: RolloutGroup) -> None:
        """Grades an answer."""
        task, prompt, rollout = self._asked.tasks[group.group_id], group.prompt, group.pairs[0].first
        template = self._preset.asked.plain if prompt.given is None else self._preset.asked.second
        answer = template.answer_of(rollout.response_text)
        right = answer is not None and grade(answer, prompt.answer, prompt.choices, rounded=self._rounded)
        response = Response(rollout.response_text, len(rollout.response_ids), rollout.finish_reason)
        write_answer(self._writer, task.place, replace(self._open(task), response=response, right=right))

    def _open(self, task: ControlTask) -> ControlAnswer:
        return replace(self._asked.answer(task), reader=self._reader if task.place[2] == "reference" else "")
