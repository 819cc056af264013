"""A step's rollouts from the engines, graded while they are made, and kept in a file.

With dynamic sampling (DAPO, arXiv 2503.14476, sec. 3.2) further prompts are drawn in rounds, each for as many as are
missing, until every prompt of the batch has a group that is alive (`live_groups.py`) or the rounds are used up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from megatron_sr1.config import ObjectiveConfig, RewardsConfig
from megatron_sr1.data import StepPrompts
from megatron_sr1.metrics.clock import Clock
from megatron_sr1.printable import printable
from megatron_sr1.ranks import Exchange
from megatron_sr1.rewards import RewardError, Ungraded, Vectors, for_prompt
from megatron_sr1.rewards.reading import with_readings
from megatron_sr1.rewards.workers import Graders
from megatron_sr1.training.live_groups import live_groups, training_places
from megatron_sr1.training.recorder import GroupTracks, Recorder
from megatron_sr1.training.rollout_files import remove_step, rollouts_file
from megatron_sr1.training.rollout_writer import RolloutWriter
from megatron_sr1.training.step_rewards import sample_rewards, scored_rewards
from megatron_sr1.training.step_rollouts import StepRollouts
from megatron_sr1.training.token_files import remove_tokens
from megatron_sr1.types import Generator, NamedTensors, OnQuestion, Prompt, PromptShare, RolloutGroup, Sampling

logger = logging.getLogger(__name__)


def _joined(reasons: Sequence[str]) -> str:
    more = f" ({len(reasons) - 1} groups more failed.)" if len(reasons) > 1 else ""
    return f"{reasons[0]}{more}"


def _numbered(take: Callable[[RolloutGroup], None], start: int) -> Callable[[RolloutGroup], None]:
    return lambda group: take(replace(group, group_id=start + group.group_id))


def _asked(ask: OnQuestion, start: int) -> OnQuestion:
    return lambda group, sample, text, reading: ask(start + group, sample, text, reading)


class _Drawn:
    """What a step has drawn so far."""

    def __init__(self, recorder: Recorder, objective: ObjectiveConfig, ranks: Exchange) -> None:
        self._recorder, self._objective, self._ranks = recorder, objective, ranks
        self._ledger = recorder.none()
        self.num_prompts = 0
        self._groups: list[RolloutGroup] = []  # graded, of this rank
        self._tracks: dict[int, GroupTracks] = {}
        self.skipped: dict[int, str] = {}  # by number: why a group could not be graded

    def add(
        self, num_prompts: int, groups: Sequence[RolloutGroup], graded: Sequence[tuple[int, Vectors | Ungraded]]
    ) -> None:
        """Those of a round, whose numbers go on from the last: the groups of this rank, and their rewards by number.
        Collective."""
        failed = [(number, found.reason) for number, found in graded if isinstance(found, Ungraded)]
        self.skipped |= sorted(self._ranks.gather(failed))
        vectors = {number: found for number, found in graded if not isinstance(found, Ungraded)}
        own = [group for group in groups if group.group_id in vectors]
        rewards = [sample_rewards(vectors[group.group_id], self._recorder.preset) for group in own]
        ledger, tracks = self._recorder.record(own, rewards, self._ranks)
        self._ledger = self._ledger.joined(ledger)
        self.num_prompts += num_prompts
        self._groups += own
        self._tracks |= tracks

    def num_alive(self) -> int:
        """Of the graded groups."""
        return sum(self._alive()) if self._ledger.num_groups else 0

    def chosen(self, prompts: StepPrompts, rounds: int | None, step: int) -> StepRollouts:
        """Everything, and which groups are the training batch. Some group is graded."""
        count = len(prompts.first.keys)
        numbers = self._ledger.number.tolist()
        places = training_places(numbers, self._alive() if rounds is not None else [True] * len(numbers), count)
        held = (self._groups, self._tracks)
        return StepRollouts(self._ledger, prompts, places, *held, self.skipped, rounds, step)

    def _alive(self) -> list[bool]:
        return live_groups(self._ledger, self._recorder.preset, self._objective)[1].tolist()


class LiveRollouts:
    """Implements `RolloutSource` on a generator. Its worker processes live as long as its `with` block."""

    needs_room = True

    def __init__(
        self,
        generator: Generator,
        sampling: Sampling,
        recorder: Recorder,
        rewards: RewardsConfig,
        ranks: Exchange,
        folder: Path,
        *,
        refreshed: bool = True,
        objective: ObjectiveConfig | None = None,
        rounds: int = 0,
    ) -> None:
        """
        Args:
            ranks: all ranks of the job; each writes the groups that it holds.
            folder: of the files of all steps.
            refreshed: weights come after every step, and until then the engines give their memory to the trainer.
            objective: which groups are alive, see `live_groups`; None: the default.
            rounds: of further prompts in place of dead groups, at most.
        """
        self._generator = generator
        self._sampling = sampling
        self._recorder = recorder
        self._ranks = ranks
        self._folder = folder
        self._refreshed = refreshed
        self._objective = objective or ObjectiveConfig()
        self._rounds = rounds
        self._skips = rewards.on_error == "skip_group"
        preset = recorder.preset
        self._graders = Graders(
            scored_rewards(preset),
            rewards.seconds,
            rewards.workers,
            judge=rewards.judge.endpoint if rewards.judge.url else None,
            reads=any(later.reader == "endpoint" for later in preset.passes.later),
            fails_fast=not self._skips,
            finite=self._skips,  # else the step is skipped, see `bad_steps.py`
            asked=preset.asked,
        )
        self._writer = RolloutWriter(preset.asked, preset.passes.later)

    def __enter__(self) -> LiveRollouts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._graders.close()
        self._writer.close()

    def take(self, prompts: StepPrompts, step: int, clock: Clock) -> StepRollouts:
        """The ledger of all groups on every rank, without those that could not be graded and are skipped. Collective.

        Each group is graded once, beside the engine that made it, so no two ranks can disagree about an answer, nor
        about what is drawn further. `seconds/reward` is what grading takes beyond the end of generation, and the
        exchange of ledgers.

        Raises:
            RewardError: on every rank, of the first group that could not be graded; the engines sleep by then.
        """
        drawn = _Drawn(self._recorder, self._objective, self._ranks)
        if self._ranks.rank == 0:
            remove_step(rollouts_file(self._folder, step))  # before any rank writes: all meet in between
            remove_tokens(self._folder, step)
        try:
            rounds = self._draw(prompts, drawn, step, clock)
        except RewardError:  # of a user's function of spans
            self._sleep()
            raise
        self._sleep()
        chosen = self._chosen(drawn, prompts, rounds if self._rounds else None, step)
        if self._ranks.rank == 0:
            for reason in drawn.skipped.values():
                logger.warning("a group is skipped: %s", printable(reason))
        if chosen.groups:
            self._writer.write(rollouts_file(self._folder, step), chosen, len(prompts.first.keys), self._ranks.rank)
        return chosen

    def look(self, prompts: StepPrompts, step: int) -> StepRollouts:
        """What a step would draw of these prompts, in one round: nothing is written. The engines stay awake.
        Collective; raises as `take`, and where a reward is not finite."""
        drawn = _Drawn(self._recorder, self._objective, self._ranks)
        self._answer(prompts.first, drawn, step, Clock())
        chosen = self._chosen(drawn, prompts, None, step)
        bad = chosen.told_bad_rewards()
        if bad:
            raise RewardError(f"{bad[0]}. Its step would be skipped")
        return chosen

    def pixel_differences(self, prompts: Sequence[Prompt]) -> list[str]:
        """What trainer and engines see otherwise of this engine's prompts, on any engine. Collective."""
        return self._generator.pixel_differences(prompts, self._sampling)

    def grade(self, groups: Sequence[RolloutGroup], names: Sequence[str]) -> dict[int, Vectors | Ungraded]:
        """By group_id, the named rewards of groups that no engine made, as the graders give them."""
        for group in groups:
            self._graders.submit(group, for_prompt(names, bool(group.prompt.images)))
        return dict(self._graders.collect())

    def _chosen(self, drawn: _Drawn, prompts: StepPrompts, rounds: int | None, step: int) -> StepRollouts:
        """Raises RewardError where a group that must be graded could not be."""
        reasons = list(drawn.skipped.values())
        if reasons and not self._skips:
            raise RewardError(_joined(reasons))
        if len(reasons) == drawn.num_prompts:
            raise RewardError(f"no group of step {step + 1} could be graded. {_joined(reasons)}")
        return drawn.chosen(prompts, rounds, step)

    def sleep(self) -> None:
        """The engines give their memory to the trainer until `refresh`, whether or not they do so in every step."""
        self._generator.sleep()

    def _sleep(self) -> None:
        if self._refreshed:
            self._generator.sleep()

    def _draw(self, prompts: StepPrompts, drawn: _Drawn, step: int, clock: Clock) -> int:
        """All rounds; returns how many were drawn beyond the first. Collective."""
        rounds = 0
        self._answer(prompts.first, drawn, step, clock)
        while rounds < self._rounds and (self._skips or not drawn.skipped):
            missing = len(prompts.first.keys) - drawn.num_alive()
            with clock("rollout"):
                more = prompts.more(missing) if missing > 0 else None
            if more is None or not more.keys:
                break
            rounds += 1
            self._answer(more, drawn, step, clock)
        return rounds

    def settle(self) -> None:
        """Waits until what this rank writes of the last step is on disk. Raises OSError where it cannot be written."""
        self._writer.settle()

    def _answer(self, prompts: PromptShare, drawn: _Drawn, step: int, clock: Clock) -> None:
        """A round: its groups, numbered on from the last, and their rewards. Collective."""
        start, ask = drawn.num_prompts, self._graders.ask
        takers = _numbered(self._graders.submit, start), None if ask is None else _asked(ask, start)
        early = self._graders.ask_early
        sooner = {} if early is None else {"on_first": _numbered(early, start)}
        with clock("rollout"):
            groups = self._generator.generate(prompts, self._sampling, step, *takers, **sooner)
        groups = [replace(group, group_id=start + group.group_id) for group in groups]
        with clock("reward"):
            graded = self._graders.collect()
            drawn.add(len(prompts.keys), with_readings(groups, self._graders.readings()), graded)

    def refresh(self, weights: NamedTensors, version: int) -> None:
        """Streams the weights into the engines, and wakes them where they sleep. Collective."""
        self._generator.update_weights(weights, version)
