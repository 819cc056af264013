"""The samples of a step that trackers are shown: of the groups that the main rank holds, nothing is gathered."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_sr1.config import SamplesConfig
from megatron_sr1.metrics.samples import SampleRow, png_of
from megatron_sr1.rewards import find_reward
from megatron_sr1.training.ledger import StepLedger
from megatron_sr1.training.step_rollouts import StepRollouts
from megatron_sr1.types import RolloutGroup, RolloutPair


class SamplePicker:
    """Of a run, on the rank that talks to trackers."""

    def __init__(self, settings: SamplesConfig) -> None:
        self._every, self._count = settings.every, settings.count
        self._owed = False

    def pick(self, rollouts: StepRollouts) -> list[SampleRow]:
        """Of each of some groups one response, another one from time to time; [] where none are due. Where this rank
        has no group when they are, those of the next step that it has one of are."""
        if self._every and rollouts.step % self._every == 0:
            self._owed = True
        if not self._owed or not rollouts.groups:
            return []
        self._owed = False
        groups = rollouts.groups
        count = min(self._count, len(groups))
        chosen = [groups[index * len(groups) // count] for index in range(count)]
        turn = rollouts.step // self._every
        return [_row(group, group.pairs[turn % len(group.pairs)], rollouts.ledger) for group in chosen]


def _row(group: RolloutGroup, pair: RolloutPair, ledger: StepLedger) -> SampleRow:
    prompt = group.prompt
    further = {f"{one.pass_name} {one.number + 1}": one.rollout.response_text for one in pair.further}
    return SampleRow(
        key=prompt.key,
        question=prompt.problem,
        answer=prompt.answer,
        first=pair.first.response_text,
        description=pair.description or "",
        second="" if pair.second is None else pair.second.response_text,
        further=further,
        rewards=_rewards(group, pair, ledger),
        images=tuple(png_of(image) for image in prompt.images),
    )


def _rewards(group: RolloutGroup, pair: RolloutPair, ledger: StepLedger) -> Mapping[str, float]:
    """What it has earned; of passes with several samples the mean."""
    row = ledger.number.tolist().index(group.group_id)
    place = next(place for place, other in enumerate(group.pairs) if other is pair)
    return {
        _shown(name): reward[row, place].mean().item()
        for name, reward in ledger.rewards.items()
        if not reward[row, place].isnan().any()
    }


def _shown(name: str) -> str:
    return name if name == "format" else find_reward(name).shown  # whether the layout was kept, whatever is rewarded
