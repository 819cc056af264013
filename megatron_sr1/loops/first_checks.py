"""The order of the checks before a first step, for a run and for `megatron-sr1 preflight`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from megatron_sr1.config import Command, Config
from megatron_sr1.data import SampleFeed, StepPrompts
from megatron_sr1.loops.run import Run
from megatron_sr1.policy import Policy
from megatron_sr1.preflight import (
    LOGPROBS,
    Row,
    canary_row,
    check_rows,
    demonstrations_row,
    disk_rows,
    earning_rows,
    fact_rows,
    failed,
    gold_groups,
    gold_rows,
    has_passed,
    is_first_here,
    keep_rows,
    known_rewards,
    logprob_row,
    measure_rank,
    memory_rows,
    not_checked,
    pixels_row,
    samples_row,
    unearned,
    write_speed,
)
from megatron_sr1.prompts import templates_of
from megatron_sr1.rewards import RewardError
from megatron_sr1.streams import Preset
from megatron_sr1.training.live_rollouts import LiveRollouts
from megatron_sr1.training.step_rollouts import StepRollouts
from megatron_sr1.training.trainer import NoTrainer, Trainer
from megatron_sr1.types import SftSample


class Checks:
    """Rows in the order of the checks, on the main rank; the others have none. All methods are collective."""

    def __init__(
        self, run: Run, command: Command, config: Config, preset: Preset | None = None, *, generates: bool = True
    ) -> None:
        """
        Args:
            config: of the run, whose folder may be another than that of `run`, which alone is written to.
            preset: of a grpo run.
            generates: engines are started; else nobody is asked, and less memory is needed than is planned.
        """
        self._run, self._config, self._preset, self._generates = run, config, preset, generates
        self._command: Command = command
        self.rows: list[Row] = []
        self.all_made = False

    @property
    def failed(self) -> bool:
        """Whether one of the rows has. Collective."""
        return self._run.platform.ranks.any(bool(failed(self.rows)))

    def engines_have_room(self) -> bool:
        """Whether the machines have the shared memory that engines map; else there is a row more. An engine without is
        no error that could be told, but SIGBUS to the rank, which would take all rows with it. Collective."""
        lacks = self._run.platform.ranks.any(any(row.name == "shared memory" for row in failed(self.rows)))
        if lacks:
            self._add(not_checked("engines", "none is started without shared memory"))
        return not lacks

    def end(self) -> None:
        """Checks that are not made have not passed, and that is a row."""
        if not self.all_made:
            self._add(Row("further checks", "fail", "not made: what has ended the command is told outside this table"))

    def machines(self, policy: Policy, num_steps: int) -> None:
        """The machines that the ranks are on, when the policy is there and no engine yet.

        Args:
            num_steps: of the whole run.
        """
        platform, config = self._run.platform, self._config
        asks = self._preset is not None and self._preset.asks_endpoint and self._generates
        facts = platform.ranks.send_to_main([measure_rank(platform, config, asks_endpoint=asks)])
        written = platform.ranks.send_to_main([write_speed(config.run_dir)] if is_first_here(platform) else [])
        counts = policy.stage_counts()
        if platform.is_main:
            self.rows += fact_rows(facts, config)
            planned = memory_rows(self._command, config, counts, facts)
            self.rows += planned if self._generates else [_no_worse_than_warned(row) for row in planned]
            self.rows += disk_rows(config, counts, written, num_steps)

    def engines(self, complaints: Sequence[str]) -> None:
        """`complaints`: of this rank's, see `canary_complaints`."""
        self._add(canary_row(self._run.platform.ranks.gather(list(complaints))))

    def responses(self, feed: SampleFeed, source: LiveRollouts, trainer: Trainer | NoTrainer, first: int) -> None:
        """What the engines make of the next prompts, and the trainer of that. The prompts come again; the engines sleep
        at the end, and whoever goes on gives them weights first.

        Args:
            first: the step that the run begins or goes on with.
        """
        assert self._preset is not None
        ranks, config = self._run.platform.ranks, self._config
        prompts = StepPrompts(feed, config.preflight.prompts, taken=False)
        self._add(samples_row(len(prompts.keys), prompts.bad))
        if not prompts.keys:
            return
        differences = source.pixel_differences(list(prompts.first.own.values()))
        self._add(pixels_row(len(prompts.keys), differences))
        self._gold(prompts, source, self._preset)
        if differences:  # the engines would refuse to answer
            return
        try:
            rollouts = source.look(prompts, first)
        except RewardError as error:  # on every rank
            self._add(Row("responses", "fail", str(error)))
            return
        self._add(*earning_rows(rollouts, self._preset, config, ranks))
        source.sleep()
        self._add(self._logprobs(trainer, rollouts))

    def _logprobs(self, trainer: Trainer | NoTrainer, rollouts: StepRollouts) -> Row:
        precision = self._config.precision
        if isinstance(trainer, NoTrainer):
            return not_checked(LOGPROBS, "nothing is trained")
        if precision.dtype == "fp8" and precision.fp8_recipe == "delayed":  # the first step compares, too
            return not_checked(LOGPROBS, "a pass would move the scales that precision.fp8_recipe=delayed begins with")
        return logprob_row(trainer.compare(rollouts), trainer.most_gap)

    def demonstrations(self, feed: SampleFeed) -> None:
        """The next samples of a cold start."""
        batch, bad = feed.look(self._config.preflight.prompts)
        own = {place: sample for place, sample in batch.own.items() if isinstance(sample, SftSample)}
        row = demonstrations_row(len(batch.keys), own, templates_of(self._config), self._run.platform.ranks)
        self._add(samples_row(len(batch.keys), bad), row)

    def _gold(self, prompts: StepPrompts, source: LiveRollouts, preset: Preset) -> None:
        ranks = self._run.platform.ranks
        holds = ranks.rank % self._config.rollout.engine_tensor == 0  # the ranks of an engine have the same prompts
        groups = gold_groups(prompts.first.own if holds else {}, preset, self._run.planner)
        found = ranks.gather(unearned(groups, source.grade(groups, known_rewards(preset)), preset))
        self._add(*gold_rows(len(prompts.keys), found, preset))

    def _add(self, *rows: Row) -> None:
        self.rows += rows if self._run.platform.is_main else ()


class Preflight:
    """The first phase of a run, unless `preflight.enabled` is false. All methods are collective."""

    def __init__(self, run: Run, command: Command, preset: Preset | None = None, *, generates: bool = True) -> None:
        """See `Checks`."""
        self._run, self._seconds = run, 0.0
        self._file = run.folder / "preflight.json"
        self._checks = Checks(run, command, run.config, preset, generates=generates)
        self._enabled = run.config.preflight.enabled
        self._complaints: list[str] = []  # of this rank's engine
        self._whole = False

    def complain(self, text: str) -> None:
        """Takes what is wrong with this rank's engine. Raises RuntimeError where no row will tell it."""
        if not self._enabled:
            raise RuntimeError(text)
        self._complaints.append(text)

    def machines(self, policy: Policy, num_steps: int) -> None:
        """See `Checks.machines`. Raises ValueError where one fails, before an engine is started."""
        if self._enabled:
            with self._timed():
                self._checks.machines(policy, num_steps)
            if self._checks.failed:
                self.close()

    def responses(self, feed: SampleFeed, source: LiveRollouts, trainer: Trainer | NoTrainer, first: int) -> None:
        """See `Checks.engines` and `Checks.responses`; the second not again where a run goes on whose preflight has
        passed."""
        if self._enabled:
            with self._timed():
                self._checks.engines(self._complaints)
                if self._looks():
                    self._checks.responses(feed, source, trainer, first)
                    self._whole = not isinstance(trainer, NoTrainer)  # which compares no log-probs

    def demonstrations(self, feed: SampleFeed) -> None:
        """See `Checks.demonstrations`; as for `responses`."""
        if self._enabled and self._looks():
            with self._timed():
                self._checks.demonstrations(feed)

    def close(self) -> None:
        """Says what is wrong, and keeps it all in the run folder.

        Raises:
            ValueError: a check failed; on every rank.
        """
        if not self._enabled:
            return
        run, rows = self._run, self._checks.rows
        if run.platform.is_main:
            keep_rows(self._file, run.config, rows, whole=self._whole)
        for row in rows:
            if row.verdict != "pass":
                run.say(f"preflight, {row.verdict}: {row}")
        run.platform.on_main(lambda: check_rows(rows))
        passed = sum(row.verdict == "pass" for row in rows)
        run.say(f"preflight: {passed} of {len(rows)} checks passed in {self._seconds:.1f} s")

    def _looks(self) -> bool:
        """Whether samples are looked at."""
        platform, config = self._run.platform, self._run.config
        if not config.preflight.prompts:
            return False
        again = self._run.progress is not None
        known = again and platform.ranks.any(platform.is_main and has_passed(self._file, config))
        self._whole = not known
        return self._whole

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start


def _no_worse_than_warned(row: Row) -> Row:
    return replace(row, verdict="warn") if row.verdict == "fail" else row
