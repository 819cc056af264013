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
from megatron_sr1.rewards import RewardError, Ungraded, Vectors
from megatron_sr1.rewards.reading import with_readings
from megatron_sr1.rewards.workers import Graders
from megatron_sr1.streams import Preset
from megatron_sr1.training.live_groups import live_groups, training_places
from megatron_sr1.training.rollout_files import Share, remove_step, rollouts_file
from megatron_sr1.training.rollout_writer import RolloutWriter
from megatron_sr1.training.step_rewards import join_rewards, scored_rewards
from megatron_sr1.training.step_rollouts import StepRollouts
from megatron_sr1.types import Generator, NamedTensors, OnQuestion, Prompt, Ranks, RolloutGroup, Sampling

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

    def __init__(self, preset: Preset, objective: ObjectiveConfig) -> None:
        self._preset, self._objective = preset, objective
        self._groups: list[RolloutGroup] = []
        self._shares: dict[int, Vectors | Ungraded] = {}
        self._holders: dict[int, int] = {}  # by number: the first rank that has graded it

    @property
    def num_prompts(self) -> int:
        return len(self._groups)

    @property
    def skipped(self) -> dict[int, str]:
        """By number: why a group could not be graded."""
        shares = sorted(self._shares.items())
        return {number: share.reason for number, share in shares if isinstance(share, Ungraded)}

    def add(
        self, groups: Sequence[RolloutGroup], shares: Sequence[tuple[int, Sequence[tuple[int, Vectors | Ungraded]]]]
    ) -> None:
        """Those of a round, whose numbers go on from the last, and what each rank has graded."""
        self._groups += groups
        for rank, graded in shares:
            self._shares |= dict(graded)
            for number, _ in graded:
                self._holders.setdefault(number, rank)

    def share_of(self, rank: int) -> Share | None:
        """What a rank writes: the groups that it has graded; None where others have."""
        writers = sorted(set(self._holders.values()))
        if rank not in writers:
            return None
        own = {number for number, holder in self._holders.items() if holder == rank}
        return Share(own, writers.index(rank), len(writers))

    def num_alive(self) -> int:
        """Of the graded groups."""
        return sum(self._alive()) if len(self.skipped) < len(self._groups) else 0

    def chosen(self, count: int, rounds: int | None) -> StepRollouts:
        """Everything, and which groups are the training batch of `count` prompts. Some group is graded."""
        groups = self._graded()
        numbers = [group.group_id for group in groups]
        places = training_places(numbers, self._alive() if rounds is not None else [True] * len(groups), count)
        return StepRollouts(groups, join_rewards(self._vectors(), self._preset), places, self.skipped, rounds)

    def _alive(self) -> list[bool]:
        rewards = join_rewards(self._vectors(), self._preset)
        return live_groups(self._graded(), rewards, self._preset, self._objective)[1].tolist()

    def _graded(self) -> list[RolloutGroup]:
        return [group for group in self._groups if not isinstance(self._shares[group.group_id], Ungraded)]

    def _vectors(self) -> list[tuple[int, Vectors]]:
        return [(number, share) for number, share in self._shares.items() if not isinstance(share, Ungraded)]


class LiveRollouts:
    """Implements `RolloutSource` on a generator. Its worker processes live as long as its `with` block."""

    needs_room = True

    def __init__(
        self,
        generator: Generator,
        sampling: Sampling,
        preset: Preset,
        rewards: RewardsConfig,
        ranks: Ranks,
        folder: Path,
        *,
        refreshed: bool = True,
        objective: ObjectiveConfig | None = None,
        rounds: int = 0,
    ) -> None:
        """
        Args:
            ranks: all ranks of the job; each writes the groups that it has graded.
            folder: of the files of all steps.
            refreshed: weights come after every step, and until then the engines give their memory to the trainer.
            objective: which groups are alive, see `live_groups`; None: the default.
            rounds: of further prompts in place of dead groups, at most.
        """
        self._generator = generator
        self._sampling = sampling
        self._preset = preset
        self._ranks = ranks
        self._folder = folder
        self._refreshed = refreshed
        self._objective = objective or ObjectiveConfig()
        self._rounds = rounds
        self._skips = rewards.on_error == "skip_group"
        self._graders = Graders(
            scored_rewards(preset),
            rewards.seconds,
            rewards.workers,
            judge=rewards.judge.endpoint if rewards.judge.url else None,
            reads=any(later.reader == "endpoint" for later in preset.passes.later),
            fails_fast=not self._skips,
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
        """All groups and all rewards on every rank, without those groups that could not be graded and are skipped.
        Collective.

        Each group is graded once, beside the engine that made it, so no two ranks can disagree about an answer, nor
        about what is drawn further. `seconds/reward` is what grading takes beyond the end of generation.

        Raises:
            RewardError: on every rank, of the first group that could not be graded; the engines sleep by then.
        """
        drawn, rounds = _Drawn(self._preset, self._objective), 0
        if self._ranks.rank == 0:
            remove_step(rollouts_file(self._folder, step))  # before any rank writes: all meet in between
        self._answer(prompts.first, drawn, step, clock)
        while rounds < self._rounds and (self._skips or not drawn.skipped):
            missing = len(prompts.first) - drawn.num_alive()
            with clock("rollout"):
                more = prompts.more(missing) if missing > 0 else []
            if not more:
                break
            rounds += 1
            self._answer(more, drawn, step, clock)
        if self._refreshed:
            self._generator.sleep()
        reasons = list(drawn.skipped.values())
        if reasons and not self._skips:
            raise RewardError(_joined(reasons))
        if len(reasons) == drawn.num_prompts:
            raise RewardError(f"no group of step {step} could be graded. {_joined(reasons)}")
        chosen = drawn.chosen(len(prompts.first), rounds if self._rounds else None)
        if self._ranks.rank == 0:
            for reason in reasons:
                logger.warning("a group is skipped: %s", reason)
        share = drawn.share_of(self._ranks.rank)
        if share is not None:
            self._writer.write(rollouts_file(self._folder, step), chosen, len(prompts.first), share)
        return chosen

    def settle(self) -> None:
        """Waits until what this rank writes of the last step is on disk. Raises OSError where it cannot be written."""
        self._writer.settle()

    def _answer(self, prompts: Sequence[Prompt], drawn: _Drawn, step: int, clock: Clock) -> None:
        """A round: its groups, numbered on from the last, and their rewards. Collective."""
        start, ask = drawn.num_prompts, self._graders.ask
        takers = _numbered(self._graders.submit, start), None if ask is None else _asked(ask, start)
        early = self._graders.ask_early
        sooner = {} if early is None else {"on_first": _numbered(early, start)}
        with clock("rollout"):
            groups = self._generator.generate(prompts, self._sampling, step, *takers, **sooner)
        groups = [replace(group, group_id=start + group.group_id) for group in groups]
        with clock("reward"):
            shares = self._ranks.gather([(self._ranks.rank, self._graders.collect())])
            if ask is not None:
                groups = with_readings(groups, self._ranks.gather(self._graders.readings()))
        drawn.add(groups, shares)

    def refresh(self, weights: NamedTensors, version: int) -> None:
        """Streams the weights into the engines, and wakes them where they sleep. Collective."""
        self._generator.update_weights(weights, version)
