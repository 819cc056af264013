"""The answers of an evaluation: engines take prompts as they have room, and each group is graded and written to its
engine's file as soon as it is complete. Nobody waits for another engine before the end.

A pass that reads what was said of another image waits for all first passes, and one of the starting weights until the
engine has them: with such a pass the prompts come in rounds of `evaluate.chunk_prompts`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing

from megatron_sr1.config import Config
from megatron_sr1.evaluation import read_records, record_of, replace_lines
from megatron_sr1.evaluation.files import EvaluationFiles
from megatron_sr1.evaluation.heldout import Heldout
from megatron_sr1.evaluation.parts import PartWriter, RecordParts
from megatron_sr1.evaluation.records import Material
from megatron_sr1.import_path import is_import_path
from megatron_sr1.loops.control_material import material_of
from megatron_sr1.loops.generation import engine_ranks
from megatron_sr1.loops.run import Run
from megatron_sr1.rewards import (
    REWARDS,
    RewardError,
    Ungraded,
    Value,
    Vectors,
    find_reward,
    mean_of,
    own_rewards,
    score_or_tell,
)
from megatron_sr1.rewards.judged import JudgedRewards
from megatron_sr1.rewards.reading import EndpointReadings
from megatron_sr1.rewards.workers import Graders
from megatron_sr1.streams import Preset, preset_of
from megatron_sr1.types import SECOND, Generator, OnQuestion, Prompt, RolloutGroup, Sampling

_WAITING = 64  # groups that are graded or wait for it
_THREADS = 4  # that grade; also of what waits for an endpoint


def evaluation_sampling(config: Config, preset: Preset) -> Sampling:
    """How the responses of an evaluation are drawn."""
    settings, longest = config.evaluate, config.rollout.max_response_tokens
    return Sampling(settings.samples, settings.temperature, longest, config.seed, *preset.passes)


def answer(
    run: Run,
    generator: Callable[[], Generator],
    heldout: Heldout,
    files: EvaluationFiles,
    made_of: str,
    step: int,
    recorded: Sequence[int] = (),
    in_parts: Sequence[int] = (),
) -> list[RolloutGroup]:
    """Answers and records all prompts but the answered ones; `generator` is called only if there are any. Collective.

    Args:
        recorded, in_parts: numbers of the samples whose records are there: in the file, and in parts.

    Returns:
        On the main rank the answers to the first `evaluate.verify_export` prompts; [] on the others.

    Raises:
        ValueError: nothing could be read.
        RewardError: a group could not be graded; on the rank that has it, or on all.
    """
    config, ranks, parts = run.config, run.platform.ranks, RecordParts(files.parts)
    sampling = evaluation_sampling(config, preset_of(config))
    waits = any(later.context == "other_description" or later.reader == "reference" for later in sampling.later)
    answered, first = {*recorded, *in_parts}, []
    with ExitStack() as stack:
        grading: Grading | None = None
        for prompts in heldout.rounds(answered, config.evaluate.chunk_prompts if waits else 0):
            if grading is None:
                run.platform.on_main(lambda: _take_over(files, recorded))
                writer = stack.enter_context(PartWriter(files.parts, f"{engine_ranks(run).rank:05d}"))
                grading = stack.enter_context(closing(Grading(run, writer, made_of, len(answered), len(heldout))))
            generator().stream(prompts, sampling, step, grading.take, grading.ask)
            failed = grading.settle()
            run.platform.wait_for_all()  # engines may have graded for long
            failed = ranks.gather(failed)
            if failed:
                raise RewardError(failed[0])
        taken: set[int] = set()
        if grading is not None:
            first, taken = grading.first, grading.taken
    if grading is None and not answered:
        raise ValueError("data.heldout holds no sample that can be read, so there is nothing to evaluate.")
    # all files are closed when all have come here
    count = len(answered) + sum(ranks.gather([len(taken - answered)]))
    merged = run.platform.on_main(lambda: _finish(files, parts, config.evaluate.chunk_prompts, count, len(recorded)))
    if merged:
        run.say(f"answered {count} of {len(heldout)} prompts")
    found = ranks.send_to_main(first)
    return sorted(found, key=lambda group: group.group_id)[: config.evaluate.verify_export]


def _take_over(files: EvaluationFiles, recorded: Sequence[int]) -> None:
    """Makes a part of records that an earlier release has left unfinished."""
    if recorded:
        with PartWriter(files.parts, "records") as writer:
            for index, record in zip(recorded, read_records(files.records), strict=True):
                writer.add(index, record)


def _finish(files: EvaluationFiles, parts: RecordParts, chunk: int, count: int, num_recorded: int) -> bool:
    """Makes the file of records of its parts, of which there must be so many; whether it was not there already."""
    if count > num_recorded:
        lines = parts.merged(chunk)
        if len(lines) != count:
            raise ValueError(
                f"{parts.folder} holds {len(lines)} records of {count} that were answered. Run the command again: it "
                "answers what is missing."
            )
        replace_lines(files.records, lines)
    parts.remove()
    return count > num_recorded


class Grading:
    """Grades the groups of this rank and writes their records, by threads, while the engine goes on."""

    def __init__(self, run: Run, writer: PartWriter, made_of: str, num_before: int, num_prompts: int) -> None:
        """
        Args:
            num_before, num_prompts: answered already, and in all, for those who watch.
        """
        config = run.config
        self._run, self._writer, self._made_of, self._settings = run, writer, made_of, config.evaluate
        self._preset = preset = preset_of(config)
        users = [name for name in preset.rewards if is_import_path(name)]
        plain = [name for name in users if find_reward(name).later == SECOND.name]  # without images: no other pass
        self._users = (users, plain)
        later, judge = preset.passes.later, config.rewards.judge
        self._second_pass = SECOND.name in {one.name for one in later}
        self._further = [f"acc_vis@{one.name}" for one in later if one.name != SECOND.name]
        endpoint = judge.endpoint if judge.url else None
        self._judged = self._readings = self._graders = None
        if endpoint is not None and any(one.reader == "endpoint" for one in later):
            self._judged = JudgedRewards(endpoint, fails_fast=True)
            self._readings = EndpointReadings(self._judged, preset.asked)
        if users:  # only these need processes that can be ended
            limits = (config.rewards.seconds, config.rewards.workers)
            how = {"rounded": self._settings.rounded_decimals, "asked": preset.asked}
            self._graders = Graders(users, *limits, judge=endpoint, **how)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="grading")
        self._recording: list[Future[None]] = []
        self._failure: str | None = None
        self._num_engines, self._num_taken = engine_ranks(run).num_ranks, 0
        self._num_before, self._num_prompts = num_before, num_prompts
        self.taken: set[int] = set()  # numbers of the samples
        self.first: list[RolloutGroup] = []  # of its own, the first `evaluate.verify_export`

    def close(self) -> None:
        """What waits is dropped."""
        for made in (self._judged, self._graders):
            if made is not None:
                made.close()
        self._threads.shutdown(cancel_futures=True)

    @property
    def ask(self) -> OnQuestion | None:
        """Takes the questions of passes that an endpoint reads; None where there are none."""
        return None if self._readings is None else self._readings.ask

    def take(self, group: RolloutGroup) -> None:
        """Queues a complete group.

        Raises:
            RewardError: an earlier one could not be graded.
            OSError: an earlier one could not be written.
        """
        if len(self._recording) >= _WAITING:  # what grades cannot keep up: the engine waits, rather than memory grows
            wait(self._recording, return_when=FIRST_COMPLETED)
        done = [future for future in self._recording if future.done()]
        for future in done:
            future.result()
        if self._failure is not None:
            raise RewardError(self._failure)
        self._recording = [future for future in self._recording if future not in done]
        self._recording.append(self._threads.submit(self._record, group))
        kept = sorted([*self.first, group], key=lambda one: one.group_id)
        self.first = kept[: self._settings.verify_export]
        self.taken.add(group.group_id)
        self._num_taken += 1
        self._run.note(f"{self._count} of {self._num_prompts} prompts")
        if self._num_taken % max(1, self._settings.chunk_prompts // self._num_engines) == 0:
            self._tell()

    def settle(self) -> list[str]:
        """Waits until everything is written; why a group could not be graded, where one could not."""
        recording, self._recording = self._recording, []
        for future in recording:
            future.result()
        return [] if self._failure is None else [self._failure]

    @property
    def _count(self) -> int:
        """Prompts that are answered, about, as other engines are as far as this one."""
        return min(self._num_prompts, self._num_before + self._num_taken * self._num_engines)

    def _tell(self) -> None:
        count = self._count
        if count < self._num_prompts:
            about = "" if self._num_engines == 1 else "about "
            self._run.say(f"answered {about}{count} of {self._num_prompts} prompts")

    def _record(self, group: RolloutGroup) -> None:
        whole = group if self._readings is None else self._readings.attached(group)
        graded = whole if isinstance(whole, Ungraded) else self._graded(whole)
        if isinstance(graded, Ungraded):
            self._failure = self._failure or graded.reason
            return
        assert not isinstance(whole, Ungraded)
        template, second = self._preset.asked.of(group.prompt).first, {"second_pass": self._second_pass}
        material = self._material(group.prompt)
        record = record_of(
            whole, template, _shown(graded), self._made_of, ends_chunk=False, material=material, **second
        )
        self._writer.add(group.group_id, record)
        if self._readings is not None:
            self._readings.forget(group.group_id)

    def _material(self, prompt: Prompt) -> Material | None:
        """For controls; None where there is no second pass."""
        settings = self._settings
        if not (prompt.images and self._preset.described and self._second_pass):
            return None
        return material_of(prompt, settings.gold_field, settings.other_questions)

    def _graded(self, group: RolloutGroup) -> Vectors | Ungraded:
        """By our rewards, whatever is trained on, and by those of the user's own that are."""
        asked, with_images = self._preset.asked.of(group.prompt), bool(group.prompt.images)
        own = own_rewards(asked.first.describes is not None)
        names = (*own, *self._further) if with_images else own
        if self._graders is None:
            return score_or_tell(group, names, rounded=self._settings.rounded_decimals, asked=asked)
        users, plain = self._users
        self._graders.submit(group, (*names, *(users if with_images else plain)))
        return self._graders.take(group.group_id)


def _shown(vectors: Vectors) -> list[dict[str, float]]:
    def number(name: str, value: Value) -> float:
        return value[0] if isinstance(value, tuple) and value and name in REWARDS else mean_of(value)

    return [{find_reward(name).shown: number(name, value) for name, value in vector.items()} for vector in vectors]
