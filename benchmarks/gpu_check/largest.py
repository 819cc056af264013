"""Three steps of the largest recipe that fits the cards at hand, with random weights, on the quickstart's questions.

Recipes are tried from the largest down, as they are written and on these cards alone. Where no whole model fits, the
largest is taken of which at least MIN_PART of the layers do, with as many layers, of the same widths, as fit. What fits
is what --dry-run estimates; what was changed of the recipe is in the result.

Random weights answer nothing right: all rewards are 0, and the gradient is that of the KL term alone, which is 0 while
policy and reference are the same. Shapes, memory, time and the order of things are what this shows.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu_check.digits import call, made_digits, metrics
from benchmarks.gpu_check.private import REPOSITORY
from benchmarks.gpu_check.quickstart import MAX_FIRST_KL, step_faults, step_figures
from benchmarks.gpu_check.random_model import num_layers, with_layers, write_config, write_random_model
from benchmarks.gpu_check.report import Absent, Figure, Report

if TYPE_CHECKING:
    from megatron_sr1.estimate import Machine, RunPlan

STEPS = 3
MIN_PART = 0.25  # of a model's layers
GIB = 2**30
# a step that is short, with two updates; lengths of rows and of prompts stay the recipe's
SHORT = (
    *(f"train.steps={STEPS}", "train.batch_size=8", "rollout.prompts_per_step=16", "rollout.samples_per_prompt=8"),
    *("rollout.max_response_tokens=512", "rollout.max_description_tokens=256", "rollout.max_running_requests=64"),
    *("rollout.kv_cache_gib=8", "evaluate.max_prompts=8", "train.evaluate_every=0"),
    "data.max_prompt_tokens=0",  # the quickstart's shards have no lengths in their index, and none is long
)


@dataclass(frozen=True)
class Choice:
    """A recipe as it will be run."""

    recipe: Path
    tree: dict[str, Any]  # of the model's config.json
    whole_layers: int
    words: Sequence[str]  # overrides of the layout
    plan: RunPlan

    @property
    def told(self) -> dict[str, Figure]:
        """What is run, and how it differs from the recipe."""
        phase, layers = self.plan.fullest, num_layers(self.tree)
        part = "all" if layers == self.whole_layers else f"{layers} of {self.whole_layers}, same widths"
        return {
            "recipe": str(self.recipe.relative_to(REPOSITORY)),
            "layers": part,
            "changed of its layout": " ".join(self.words) or "nothing",
            "shortened": " ".join(SHORT),
            "parameters, millions": sum(stage.count.total for stage in self.plan.stages) / 1e6,
            "estimated GiB of the fullest phase": f"{phase.peak / GIB:.1f} ({phase.name})",
        }


def run(folder: Path) -> Report:
    """
    Raises:
        Absent: there is no card, or no recipe fits in part.
    """
    count = torch.cuda.device_count()
    if not count:
        raise Absent("no CUDA device")
    from megatron_sr1.platform import start_platform

    start_platform()
    from megatron_sr1.estimate import Machine

    smallest = min(torch.cuda.get_device_properties(index).total_memory for index in range(count))
    machine = Machine(smallest / GIB, count)
    choice = choose(folder / "plans", machine)
    print(choice.told, flush=True)
    torch.distributed.destroy_process_group()
    digits = made_digits(folder.parent)
    try:
        model = write_random_model(folder / "model", choice.tree, ("What is the sum of all digits?",), "cuda")
        torch.cuda.empty_cache()  # the run needs this card's memory
        # random weights earn nothing, and a preflight would refuse them: this is about memory
        words = (*choice.words, *SHORT, f"model.hf_dir={model}", "preflight.enabled=false")
        seconds = call("grpo", str(choice.recipe), digits, folder / "run", *words, on_cards=False)
        entries = metrics(folder / "run")
    finally:
        for name in ("model", "run/checkpoints", "run/hf"):  # gigabytes
            shutil.rmtree(folder / name, ignore_errors=True)
    figures = choice.told | {"seconds, start and evaluations included": round(seconds, 1)}
    return Report(figures | step_figures(entries), wrong=step_faults(entries, STEPS, MAX_FIRST_KL))


def choose(folder: Path, machine: Machine) -> Choice:
    """
    Args:
        folder: for config.json files of models with fewer layers.

    Raises:
        Absent: no recipe fits in part.
    """
    tried = [
        _Fits(folder, recipe, tree, words, machine)
        for recipe, tree in _recipes()
        for words in layouts(recipe, machine.gpus_per_node)
    ]
    choice = first_that_fits(tried)
    if choice is None:
        cards = f"{machine.gpus_per_node} cards of {machine.gpu_gib:.0f} GiB"
        raise Absent(f"by the estimate, no recipe fits {cards} with {MIN_PART:.0%} of its layers or more")
    return choice


def first_that_fits(tried: Sequence[_Fits]) -> Choice | None:
    """A whole model before all that are cut; else the first of which MIN_PART fits, with as much of it as does."""
    for fits in tried:
        if fits(fits.whole):
            return fits.choice(fits.whole)
    for fits in tried:
        lowest = math.ceil(MIN_PART * fits.whole)
        if fits(lowest):
            return fits.choice(_most(fits, lowest, fits.whole))
    return None


def layouts(recipe: Path, num_cards: int) -> Iterator[list[str]]:
    """Overrides: none where the recipe is for so many cards; then all cards as one replica, whatever it says."""
    from megatron_sr1.config import load_config

    if load_config(recipe, []).nproc == num_cards:
        yield []
    tensor = 1 << (num_cards.bit_length() - 1)  # heads divide among powers of two
    yield [
        *(f"nproc={tensor}", f"layout.tensor={tensor}", f"layout.sequence_parallel={str(tensor > 1).lower()}"),
        *("layout.pipeline=1", "layout.virtual=1", "layout.stage_layers=[]", "layout.expert=1", "layout.context=1"),
        *(f"rollout.engine_tensor={min(tensor, 4)}", "recompute.mode=full"),
    ]


def _recipes() -> list[tuple[Path, dict[str, Any]]]:
    """GRPO recipes in bf16 with their models, the largest first."""
    from megatron_sr1.config import load_config
    from megatron_sr1.policy.parameter_counts import count_model

    found = []
    for recipe in sorted((REPOSITORY / "examples" / "recipes").glob("*/grpo.yaml")):
        if recipe.parent.name == "base":
            continue
        hf_dir = REPOSITORY / load_config(recipe, []).model.hf_dir
        tree = json.loads((hf_dir / "config.json").read_text())
        found.append((count_model(str(hf_dir)).total, recipe, tree))
    found.sort(key=lambda entry: (-entry[0], entry[1]))
    return [(recipe, tree) for _, recipe, tree in found]


@dataclass(frozen=True)
class _Fits:
    """Whether a recipe's model with so many layers fits."""

    folder: Path
    recipe: Path
    tree: dict[str, Any]
    words: Sequence[str]
    machine: Machine

    @property
    def whole(self) -> int:
        return num_layers(self.tree)

    def choice(self, layers: int) -> Choice:
        return Choice(self.recipe, with_layers(self.tree, layers), self.whole, self.words, self.plan(layers))

    def plan(self, layers: int) -> RunPlan:
        from megatron_sr1.config import check_command, load_config
        from megatron_sr1.estimate import make_plan

        model = write_config(self.folder / f"{self.recipe.parent.name}_{layers}", with_layers(self.tree, layers))
        config = load_config(self.recipe, [*self.words, *SHORT, f"model.hf_dir={model}"])
        check_command("grpo", config)
        return make_plan("grpo", config, self.machine)

    def __call__(self, layers: int) -> bool:
        from megatron_sr1.config import ConfigError
        from megatron_sr1.estimate import check_fits

        try:
            check_fits(self.plan(layers))
        except ConfigError as refusal:
            print(f"{self.recipe.parent.name}, {layers} layers: {refusal}", flush=True)
            return False
        return True


def _most(fits: _Fits, low: int, high: int) -> int:
    """The largest number of layers that fits; `low` does and `high` does not."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
