"""A step of a run out of its `rollouts` folder alone: no data set is opened, no image read.

A file has the question, the answer, all ids and texts, and the rewards that were measured. It has no images, of which
the ids of a prompt tell how many there were, and no metadata: what looks at these cannot be asked again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_sr1.ahead import Later
from megatron_sr1.processor import Processor
from megatron_sr1.ranks import ALONE
from megatron_sr1.rewards import find_reward, for_prompt, score_group
from megatron_sr1.streams import Preset
from megatron_sr1.training.recorder import Recorder
from megatron_sr1.training.rollout_files import TORN, file_lines, rollouts_file, step_files, steps_in
from megatron_sr1.training.rollout_reader import read_rollouts
from megatron_sr1.training.step_rewards import all_rewards, reward_of
from megatron_sr1.training.step_rollouts import StepRollouts
from megatron_sr1.types import CutResponses, ImageRef, Prompt, RolloutGroup

OF_TEXT = ("fmt", "fmt_cot", "fmt_vis")  # look at nothing but texts and their templates
_NEEDED = {"group_id", "key", "problem", "answer", "rewards", "first"}


class SavedPrompts:
    """Implements `types.DrawnPrompts`: of a group that was skipped not even the key is known."""

    def __init__(self, known: Mapping[int, Prompt], count: int) -> None:
        self._known = known
        self.keys = [known[number].key if number in known else "" for number in range(count)]

    def read(self, number: int) -> Prompt:
        """See `types.DrawnPrompts`; its images cannot be decoded."""
        return self._known[number]

    def images(self, number: int, sizes: Sequence[tuple[int, int]]) -> tuple[Any, ...]:
        """See `types.DrawnPrompts`."""
        return self.read(number).images


@dataclass(frozen=True)
class SavedStep:
    """What the files of a step say by themselves."""

    path: Path  # see `rollouts_file`
    prompts: SavedPrompts
    num_prompts: int  # that the step began with
    num_samples: int  # K
    rewards: frozenset[str]  # that were measured of every sample

    @classmethod
    def read(cls, folder: Path, step: int, image_token_id: int) -> SavedStep:
        """
        Raises:
            ValueError: there is no such step, none of its groups could be graded, or a file is damaged.
        """
        path = rollouts_file(folder, step)
        if path not in (there := steps_in(folder)):
            known = f"It has {', '.join(str(int(one.stem[5:])) for one in there)}" if there else "It has none"
            raise ValueError(
                f"{folder} has no rollouts of step {step}. {known}: name one of these, or the run that has the step."
            )
        lines = [line for file in step_files(path) for line in file_lines(file)]
        samples = [line for line in lines if "sample" in line]
        skipped = [line for line in lines if "skipped" in line]
        if not samples:
            why = f": {skipped[0]['skipped']}" if skipped else ""
            raise ValueError(f"{path}: none of its {len(skipped)} groups could be graded{why}. Choose another step.")
        for line in samples:
            if not line.keys() >= _NEEDED:
                raise ValueError(f"{path}: a sample lacks {sorted(_NEEDED - line.keys())[0]!r}. {TORN}")
        prompts = {line["group_id"]: _prompt(line, image_token_id) for line in samples}
        further = next((line.get("further_prompts", 0) for line in lines if "rounds" in line), 0)
        count = len(prompts) + len(skipped)
        if type(further) is not int or not 0 <= further < count:
            raise ValueError(f"{path}: further_prompts={further!r} is more, or other, than it holds. {TORN}")
        return cls(
            path,
            SavedPrompts(prompts, count),
            count - further,
            Counter(line["group_id"] for line in samples).most_common(1)[0][1],
            frozenset.intersection(*(frozenset(line["rewards"]) for line in samples)),
        )

    def missing(self, preset: Preset) -> tuple[str, ...]:
        """Rewards that the objective looks at and the step does not have."""
        return tuple(name for name in all_rewards(preset) if name not in self.rewards)

    def recorded(self, preset: Preset, processor: Processor, cut: CutResponses) -> StepRollouts:
        """As an objective sees the step; rewards that it does not have are graded again where texts alone tell.

        Raises:
            ValueError: it was asked by other templates or lacks a pass; a reward is missing that looks at more than
                texts; a file is damaged.
        """
        missing = self.missing(preset)
        names = [name for name in all_rewards(preset) if name not in missing]
        made_by = (preset.asked, preset.passes.later)
        read = read_rollouts(self.path, lambda further: self.prompts, self.num_samples, names, *made_by)
        for name in missing:
            if name.partition("@")[0] not in OF_TEXT:
                raise ValueError(_unmeasured(self.path, name))
        pairs = zip(read.rewards, read.groups, strict=True)
        rewards = [{**own, **{name: _graded(name, group, preset) for name in missing}} for own, group in pairs]
        for group in read.groups:
            _check_texts(self.path, group, processor)
        recorder = Recorder.of(preset, self.num_samples, processor, cut)
        ledger, tracks = recorder.record(read.groups, rewards, ALONE)
        return StepRollouts(ledger, read.prompts, read.places, read.groups, tracks, read.skipped, read.rounds)


def _prompt(line: Mapping[str, Any], image_token_id: int) -> Prompt:
    """With as many images as its ids hold runs of image tokens: images never touch each other."""
    ids = [*line["first"]["prompt_ids"], -1]
    count = sum(here == image_token_id != after for here, after in pairwise(ids))
    images: tuple[Any, ...] = tuple(ImageRef((0, 0), Later(_no_image)) for _ in range(count))
    return Prompt(line["key"], line["problem"], line["answer"], images)


def _no_image() -> Any:
    raise ValueError("saved rollouts have no images.")


def _graded(name: str, group: RolloutGroup, preset: Preset) -> Tensor:
    """[K], or [K, m]."""
    (asked,) = for_prompt([name], bool(group.prompt.images))
    vectors = score_group(group, [asked], asked=preset.asked.of(group.prompt))
    return reward_of(name, [vector[asked] for vector in vectors], preset)


def _unmeasured(path: Path, name: str) -> str:
    asks = "judge" in find_reward(name).needs
    why = "it asks a judge" if asks else "saved rollouts have neither images nor metadata, which it may look at"
    return (
        f"{path} has no reward {name!r}, and it cannot be graded now: {why}. Leave the reward out, or draw the step "
        "with this objective: megatron-sr1 grpo CONFIG --rollouts-only."
    )


def _check_texts(path: Path, group: RolloutGroup, processor: Processor) -> None:
    """Whether the tokenizer is the run's: segments are looked for in texts, and credited by ids."""
    first = group.pairs[0].first
    if not processor.decode(first.response_ids).startswith(first.response_text):
        raise ValueError(
            f"{path}, {first.rollout_id}: the tokenizer of model.hf_dir reads its ids as another text. Give the run's "
            "config.yaml the model that the run began with."
        )
