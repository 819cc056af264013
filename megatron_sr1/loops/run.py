"""A run folder and what every loop does with it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from rich.console import Console

from megatron_sr1.config import (
    Command,
    Config,
    changes_of,
    check_batched_tokens,
    check_epochs,
    check_resume,
    dump_config,
    model_fingerprint,
    pixel_limits,
)
from megatron_sr1.config.length import LENGTH_FILE, epoch_steps
from megatron_sr1.config.mistakes import EXPECTED_ERRORS, FULL, one_line
from megatron_sr1.config.rules import require
from megatron_sr1.convert.greedy import compare_greedy
from megatron_sr1.data import Check, Quarantine, SampleFeed, StreamState, open_stream
from megatron_sr1.evaluation.best import best_step, measured
from megatron_sr1.file_lock import lock_file
from megatron_sr1.import_path import keep_code
from megatron_sr1.loops.preemption import StopRequest
from megatron_sr1.metrics import Course, JsonlSink, MetricsWriter, Pace, SpikeSink, StatusFile, StatusSink, Trackers
from megatron_sr1.metrics.clock import Clock
from megatron_sr1.metrics.progress import draws
from megatron_sr1.phases import during
from megatron_sr1.platform import Platform, watched_rank
from megatron_sr1.platform.machine import machine_words
from megatron_sr1.platform.precision import shares_prefixes
from megatron_sr1.platform.profiling import StepProfiler, check_profiler
from megatron_sr1.policy import Policy, StepResult
from megatron_sr1.preflight.versions import shown_versions
from megatron_sr1.printable import printable
from megatron_sr1.processor import Processor
from megatron_sr1.prompts import templates_of
from megatron_sr1.report.starts import note_start
from megatron_sr1.rollout import Limits, Planner
from megatron_sr1.training.bad_steps import BadSteps
from megatron_sr1.training.checkpointer import Checkpointer, HfSource, Progress
from megatron_sr1.types import NamedTensors, RolloutGroup
from megatron_sr1.weights import write_hf_dir

_LONGEST_VERIFICATION = timedelta(hours=12)  # transformers on one rank's CPU, whatever the model's size
_LET_GO_SECONDS = 60.0  # for a checkpoint of a rank that has failed


@dataclass(frozen=True)
class Run:
    """One command's run: its configuration, its place among the ranks, its folder."""

    config: Config
    platform: Platform
    status: StatusFile | None = None  # of the main rank, where the command is a run

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @cached_property
    def processor(self) -> Processor:
        """Of the model the run starts from, with the run's pixel limits.

        Raises:
            ValueError: see `Processor.from_pretrained`.
        """
        model = self.config.model
        return Processor.from_pretrained(
            model.hf_dir,
            pixels=pixel_limits(model),
            num_threads=self.config.data.workers,
            system_prompt=model.system_prompt,
        )

    @cached_property
    def planner(self) -> Planner:
        """Of the passes of prompts, within the limits of the run's engines."""
        rollout = self.config.rollout
        limits = Limits(rollout.max_response_tokens, rollout.max_model_tokens, rollout.max_description_tokens)
        return Planner(self.processor, limits, templates_of(self.config))

    @property
    def export_dir(self) -> Path:
        """Where the trained policy goes in Hugging Face format."""
        return self.folder / "hf"

    @cached_property
    def _fingerprint(self) -> str:
        return model_fingerprint(self.config)

    @cached_property
    def checkpoints(self) -> Checkpointer:
        train = self.config.train
        return Checkpointer(
            self.folder / "checkpoints",
            train.keep_checkpoints,
            self.platform,
            keep_every=train.keep_every,
            best=self._best_step,
            in_background=train.async_save,
        )

    @cached_property
    def bad_steps(self) -> BadSteps:
        """Collective."""
        so_far = 0 if self.progress is None else self.progress.bad_steps
        most, writes = self.config.train.max_bad_steps, self.platform.is_main
        return BadSteps(most, so_far, self.folder, self.say, writes=writes)

    def take_bad(
        self, step: int, results: Sequence[StepResult], batch: Sequence[str], rewards: Sequence[str] = ()
    ) -> None:
        """Counts a step whose gradient is not finite, see `BadSteps.take`. Collective.

        Raises:
            ValueError: there are too many in a row; the checkpoint that is being written is finished.
        """
        try:
            self.bad_steps.take(step, results, batch, rewards)
        except ValueError:
            self.checkpoints.settle()
            raise

    def _best_step(self, steps: Sequence[int]) -> int | None:
        train = self.config.train
        if not train.keep_best:
            return None
        return best_step(measured(self.folder, train.keep_best), train.keep_best_mode, steps)

    def quarantine(self, name: str) -> Quarantine:
        """For the bad samples of `data.<name>`; the main rank keeps the file."""
        file = self.folder / "quarantine" / f"{name}.jsonl"
        return Quarantine(self.config.data.max_bad_samples, file if self.platform.is_main else None)

    def feed(self, name: Literal["train", "cold_start"], check: Check | None = None) -> SampleFeed:
        """The samples of `data.<name>`, all of every batch on every rank; those that `check` raises for are bad ones.

        Raises:
            ValueError: shards are missing or damaged, or have no index where one is needed; more images in a training
                prompt than rollout.max_images.
        """
        data, quarantine, rollout = self.config.data, self.quarantine(name), self.config.rollout
        engine_tokens = rollout.max_model_tokens - rollout.max_response_tokens if name == "train" else 0
        visual_tokens = self.processor.num_visual_tokens
        stream = open_stream(data, name, self.config.seed, quarantine, visual_tokens, engine_tokens)
        if name == "train":
            stream.check_images(rollout.max_images, "data.train")
        if stream.num_left_out:
            limit = data.max_prompt_tokens or engine_tokens
            self.say(f"data.{name}: {stream.num_left_out} samples are left out, whose prompts are over {limit} tokens")
        ahead = {"workers": data.workers, "prefetch_bytes": data.prefetch_mib << 20}
        feed = SampleFeed(stream, quarantine, **ahead, ranks=self.platform.ranks, check=check)
        if self.progress is not None:
            feed.restore(StreamState.from_json(self.progress.stream))
        return feed

    @cached_property
    def progress(self) -> Progress | None:
        """Where the run goes on; None: it begins. Collective.

        Raises:
            ValueError: the folder holds another run, see `check_resume`; no checkpoint can be read.
        """
        self.platform.on_main(lambda: check_resume(self.config))  # it reads pieces of the weights
        return self.checkpoints.newest()

    def count_steps(self, feed: SampleFeed, size_key: Literal["train.batch_size", "rollout.prompts_per_step"]) -> int:
        """The steps of the whole run: train.steps, or what train.epochs comes to. Collective.

        Args:
            feed: of what is trained on.
            size_key: whose value is the samples of a step.

        Raises:
            ConfigError: see `check_epochs`.
        """
        train, samples = self.config.train, feed.num_samples
        if train.steps is not None:
            return train.steps
        assert train.epochs is not None, "one of the two is there"
        size = self.config.rollout.prompts_per_step if size_key == "rollout.prompts_per_step" else train.batch_size
        num_steps = epoch_steps(train.epochs, samples, size)
        self.platform.on_main(lambda: check_epochs(self.config, num_steps, size_key))
        if self.status is not None:  # the main rank of a run; what `preflight --json` prints is JSON alone
            self.say(f"train.epochs={train.epochs:g} of {samples} samples, {size_key}={size}: {num_steps} steps")
            self.status.note(steps=num_steps)
        return num_steps

    def resume(self, policy: Policy, num_steps: int) -> int:
        """Loads the newest checkpoint into the policy, and says where this machine cannot do what is asked.

        Args:
            num_steps: of the whole run.

        Returns:
            The step to go on with.

        Raises:
            ValueError: the checkpoint belongs to another kind of optimizer, or is broken.
        """
        if self.config.train.shared_prefix and not shares_prefixes(self.config, on_cpu=self.platform.on_cpu):
            self.say("train.shared_prefix: every sequence has its own prompt, because attention in fp32 has no kernel")
        if self.progress is not None:
            self.checkpoints.restore(policy, self.progress)
            step, samples = self.progress.step, self.progress.position
            path = self.checkpoints.path(step)
            self.say(f"continuing after step {step} of {num_steps}, {samples} samples of the data, from {path}")
            if self.status is not None:
                self.status.note(done=step, going_on=step)
        return 0 if self.progress is None else self.progress.step

    def accept(self, code: Mapping[str, Callable[..., Any]] = MappingProxyType({}), first: int | None = None) -> None:
        """Writes config.yaml, once nothing is left to be refused, and the code of the user's own. A config.yaml that
        says otherwise is kept as config.0.yaml and so on, and the changes are said. starts.jsonl gets a line.

        Args:
            code: functions that the run is trained with, by import path.
            first: the step that is made first; None: none is.
        """
        if not self.platform.is_main:
            return
        path, text = self.folder / "config.yaml", dump_config(self.config)
        changes = changes_of(self.config)
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            number = sum(1 for _ in self.folder.glob("config.*.yaml"))
            path.rename(self.folder / f"config.{number}.yaml")
            for change in changes:
                self.say(f"changed since the last start: {change} ({change.rule})")
        path.write_text(text, encoding="utf-8")
        machine = {"ranks": self.platform.world_size, "versions": shown_versions(), **machine_words()}
        if first is not None and (metrics := self.folder / "metrics.jsonl").is_file():
            JsonlSink(metrics, first).close()  # until this start has redone them, later steps are no start's
        note_start(self.folder, text, first, machine)
        for name in keep_code(self.folder / "code", code):
            self.say(f"changed since the last start: the code of {name} (takes effect)")

    def end_step(self, step: int, feed: SampleFeed, stop: StopRequest, policy: Policy | None, *, is_last: bool) -> None:
        """Saves the policy where that is due, and leaves where the run is asked to. Collective.

        Args:
            policy: None: the step has not changed it, so there is nothing to save.
            is_last: it is the run's last step.

        Raises:
            SystemExit: the run is asked to stop.
            ValueError: a checkpoint could not be written.
        """
        train, num_done = self.config.train, step + 1
        stopping = stop.agreed()
        evaluates = bool(train.evaluate_every) and num_done % train.evaluate_every == 0
        if policy is not None and (stopping or is_last or num_done % train.save_every == 0):
            self._save(num_done, feed, policy)
        # an evaluation may be long, and what goes wrong in it shall not cost a checkpoint that is written
        self.checkpoints.settle(wait=stopping or is_last or evaluates)
        if stopping:
            stop.leave(num_done)

    def settle_checkpoint(self, clock: Clock) -> None:
        """Finishes a checkpoint that is written by now. Collective. Raises ValueError where it could not be written."""
        if self.checkpoints.is_writing:
            with clock("save"):
                self.checkpoints.settle(wait=False)

    @contextmanager
    def kept_before(
        self, kind: type[Exception], step: int, feed: SampleFeed, policy: Policy, first: int
    ) -> Iterator[None]:
        """Saves the policy as it is before `step` where its `with` raises a `kind`, as it must on every rank and before
        the policy is changed: the same command does the step again. Collective.

        Args:
            first: the step that the run began or went on with, before which nothing is lost.
        """
        try:
            yield
        except kind:
            self.checkpoints.settle()
            if step > first and step != self.checkpoints.last:
                policy.return_to_device()
                self._save(step, feed, policy)
                self.checkpoints.settle()
                self.say(f"saved after step {step}; the same command continues from here")
            raise

    @contextmanager
    def finished_alone(self) -> Iterator[None]:
        """Finishes the checkpoint that is being written where its `with` ends by a mistake or Ctrl-C, and this rank is
        the only one: of several, the others may be at something else."""
        try:
            yield
        except (*EXPECTED_ERRORS, KeyboardInterrupt):
            if self.platform.world_size == 1 and self.checkpoints.is_writing:
                try:
                    self.checkpoints.settle()
                except ValueError as error:  # what has ended the run comes first
                    self.say(one_line(error))
            raise

    def _save(self, num_done: int, feed: SampleFeed, policy: Policy) -> None:
        model = self.config.model.megatron_dir or self.config.model.hf_dir
        fingerprint = self._fingerprint if self.platform.is_main else ""  # who writes it reads for it
        limits = pixel_limits(self.config.model)
        pixels = {} if limits is None else asdict(limits)
        place = (num_done, feed.position, feed.fingerprint, model, feed.state().to_json(), fingerprint, pixels)
        hf = HfSource(self.config.model.hf_dir, limits) if self.config.train.save_hf else None
        self.checkpoints.save(policy, Progress(*place, bad_steps=self.bad_steps.in_a_row), hf)

    def say(self, text: str) -> None:
        """Tells whoever watches what the run is at. Of others' text nothing moves the cursor."""
        if self.platform.is_main:
            print(printable(text), flush=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Something of the start, or between steps: when it has ended, its time is said."""
        start = time.perf_counter()
        with during(name), self._turning(name):
            yield
        during.detail = ""
        self.say_stage(name, time.perf_counter() - start)

    def say_stage(self, name: str, seconds: float) -> None:
        """What has ended, where the command is a run."""
        if self.status is not None:
            self.status.stage(name, seconds)
            self.say(f"{name}: {seconds:.1f} s")

    def _turning(self, name: str) -> AbstractContextManager[object]:
        """Where a terminal shows that something goes on; during the steps another line does."""
        console = Console()
        turns = self.status is not None and during.step is None and len(during.open) == 1 and draws(console)
        return console.status(name) if turns else nullcontext()

    def profiler(self, first: int) -> StepProfiler:
        """Of this rank.

        Args:
            first: the step that the run begins or goes on with.
        """
        settings = self.config.profile
        done = [step for step in settings.steps if step < first]
        if done:
            self.say(f"profile.steps: {done} are done already, nothing will be seen of them")
        return StepProfiler(settings, self.platform, self.folder, self.say)

    def note(self, detail: str) -> None:
        """How far the run is with the stage that it is at, for whoever watches."""
        during.detail = detail

    def export(self, policy: Policy) -> None:
        """Writes the policy's weights, with the starting model's configuration and processor files, in which the image
        processor has the run's pixel limits. Collective."""
        with self.stage("export"):
            weights = _moving(policy.folder_weights())
            if self.platform.is_main:
                model = self.config.model
                write_hf_dir(weights, model.hf_dir, self.export_dir, pixels=pixel_limits(model))
            else:
                for _ in weights:
                    pass
        self.platform.ranks.meet()

    def verify_export(self, answers: Sequence[RolloutGroup]) -> None:
        """Compares transformers' greedy answers on the export with the main rank's `answers`; writes `export.json`. No
        answers, no comparison: it loads the whole model on the main rank. Collective.

        Raises:
            ValueError: an answer differs; the message names its key and both texts.
        """
        if not self.platform.ranks.any(bool(answers)):
            return

        def compare() -> None:
            compare_greedy(str(self.export_dir), answers)
            report = {"identical_greedy_answers": len(answers), "keys": [group.prompt.key for group in answers]}
            (self.folder / "export.json").write_text(json.dumps(report, indent=1) + "\n")

        self.platform.on_main(compare, longest=_LONGEST_VERIFICATION)


def check_verification(config: Config, platform: Platform) -> None:
    """
    Raises:
        ConfigError: the export is to be verified where engines answer in bf16: transformers in fp32 on the CPU would
            give other answers to the same weights.
    """
    require(
        platform.on_cpu or not config.evaluate.verify_export,
        "evaluate.verify_export",
        config.evaluate.verify_export,
        "0 on an accelerator: its engines answer in bf16, and transformers on the CPU in fp32",
        "Set it to 0; megatron-sr1 convert verify compares the weights.",
    )


@contextmanager
def open_run(config: Config, platform: Platform, command: Command) -> Iterator[Run]:
    """Makes the folder and keeps other processes out while the run lasts.
    Collective: either every rank gets the run or none does.

    Args:
        command: that the run is of.

    Raises:
        ValueError: another process is at work in the folder; see `check_profiler` and `check_batched_tokens`.
        OSError: it cannot be written to; where that is full, the error names it.
    """
    run = Run(config, platform)
    with ExitStack() as stack:
        check_profiler(config.profile, platform)
        if command != "sft":
            check_batched_tokens(config.rollout, on_cpu=platform.on_cpu)
        stack.callback(lambda: run.checkpoints.let_go(_LET_GO_SECONDS))  # last of all: nobody waits for this rank
        stack.enter_context(watched(run, run.folder))
        if not platform.ranks.any(platform.is_main and _lock(run.folder, stack)):
            raise ValueError(
                f"run_dir={config.run_dir!r} is in use by another process. Wait for it, stop it, or choose "
                "another run_dir."
            )
        if platform.is_main:
            steps = 0 if command == "evaluate" else config.train.steps or 0  # epochs: not known yet
            run = replace(run, status=stack.enter_context(StatusFile(run.folder, command, steps)))
            run.say_stage("ranks", time.time() - during.began)
        try:
            with run.finished_alone():
                yield run
        except OSError as error:
            if error.errno in FULL and error.filename is None:  # a write does not know its file
                raise OSError(error.errno, error.strerror, config.run_dir) from error
            raise


def _moving(weights: NamedTensors) -> NamedTensors:
    """The same; each is a step forward."""
    for named in weights:
        yield named
        during.moved()


def watched(run: Run, folder: Path) -> AbstractContextManager[object]:
    """Ends this rank where it, or the next, hangs; what it was at is in the folder then."""
    config = run.config
    settings, judge = config.watchdog, config.rewards.judge.url
    if not settings.enabled:
        return nullcontext()
    limits = settings.seconds(config.timeout_minutes, math.inf if judge else config.rewards.seconds)
    others = (run.platform.rank, run.platform.world_size)
    return watched_rank(during, limits, 60 * settings.other, settings.silent_seconds, folder, *others)


def _lock(folder: Path, stack: ExitStack) -> bool:
    """Whether the folder is this process's until `stack` closes."""
    folder.mkdir(parents=True, exist_ok=True)
    return stack.enter_context(lock_file(folder / ".lock"))


def course_of(run: Run, num_steps: int, *, evaluates: bool, saves: bool = True) -> Course:
    """What the steps of a run are followed and interrupted by."""
    train = run.config.train
    every = train.evaluate_every if evaluates else 0
    return Course(num_steps, train.save_every if saves else 0, every, evaluates_after=evaluates)


@contextmanager
def metrics_of(run: Run, steps: range, course: Course) -> Iterator[MetricsWriter | None]:
    """The metrics writer on the main rank, None on the others.

    Args:
        steps: those that are left of the run, whose length is noted where only its data says it.
    """
    if not run.platform.is_main:
        yield None
        return
    if run.config.train.steps is None:
        (run.folder / LENGTH_FILE).write_text(json.dumps({"steps": steps.stop}) + "\n", encoding="utf-8")
    spikes = SpikeSink(run.folder, steps.start, run.config.optimizer.clip_grad, run.say)
    with Trackers(run.config) as trackers:
        pace = Pace(course)  # when trackers are open, which takes its time
        status = () if run.status is None else (StatusSink(run.status, pace, steps.start),)
        how = {"further": (spikes, *status, trackers), "pace": pace, "samples": trackers}
        with MetricsWriter(run.folder, steps.start, steps.stop, **how) as writer:
            yield writer
