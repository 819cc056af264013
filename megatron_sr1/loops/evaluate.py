"""Greedy evaluation of both passes on held-out prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from megatron_sr1.config import Config
from megatron_sr1.data import open_dataset, read_in_order
from megatron_sr1.loops.generation import build_generator
from megatron_sr1.loops.run import Run, open_run
from megatron_sr1.loops.scoring import Rewards, rewards_of, score_groups, summarise
from megatron_sr1.objective import Preset, preset_from_config
from megatron_sr1.platform import Platform
from megatron_sr1.report import print_table, summary_rows
from megatron_sr1.rewards import faithful
from megatron_sr1.types import Generator, Prompt, RolloutGroup, Sampling, SftSample


def run_evaluate(config: Config, platform: Platform) -> None:
    """Evaluates the weights of `model.hf_dir` on `data.heldout`: a table, and `<run_dir>/eval/evaluate.json`."""
    with open_run(config, platform) as run:
        generator = build_generator(run, config.model.hf_dir)
        evaluate(run, generator, heldout_prompts(run), label="evaluate", step=0)
        if platform.is_main:
            print_table(Console(), summary_rows(run.folder))


def heldout_prompts(run: Run) -> list[Prompt]:
    """The prompts of `data.heldout`, at most `evaluate.max_prompts` of them where that is not 0."""
    config, quarantine = run.config, run.quarantine("heldout")
    dataset = open_dataset(config.data, config.data.heldout, "data.heldout", quarantine)
    return only_prompts(read_in_order(dataset, config.evaluate.max_prompts, quarantine), "data.heldout")


def only_prompts(samples: Sequence[Prompt | SftSample], key: str) -> list[Prompt]:
    """The samples, which must all be prompts.

    Raises:
        ValueError: one is a demonstration; `key` names the configuration key of the shards.
    """
    for sample in samples:
        if isinstance(sample, SftSample):
            raise ValueError(f"{key} holds the demonstration {sample.prompt.key!r}. Give shards without responses.")
    return list(samples)


def evaluate(run: Run, generator: Generator, prompts: Sequence[Prompt], *, label: str, step: int) -> list[RolloutGroup]:
    """One greedy answer per prompt and pass; writes `eval/<label>.json` and returns the answers. Collective."""
    config = run.config
    preset: Preset = preset_from_config(config.objective)
    sampling = Sampling(1, 0.0, config.rollout.max_response_tokens, config.seed, preset.template)
    groups = generator.generate(prompts, sampling, step)
    rewards = score_groups(groups, preset, run.platform.rank, run.platform.world_size, run.gather)
    if run.platform.is_main:
        folder = run.folder / "eval"
        (folder / "images").mkdir(parents=True, exist_ok=True)
        result = {
            "label": label,
            "step": step,
            "summary": {**summarise(groups, rewards), "num_prompts": len(groups)},
            "by_source": _by_source(groups, rewards),
            "examples": [_example(run, groups[index], rewards, index) for index in range(_examples(config, groups))],
        }
        (folder / f"{label}.json").write_text(json.dumps(result, indent=1) + "\n")
    return groups


def _examples(config: Config, groups: Sequence[RolloutGroup]) -> int:
    return min(config.evaluate.examples, len(groups))


def _by_source(groups: Sequence[RolloutGroup], rewards: Rewards) -> dict[str, dict[str, Any]]:
    sources = sorted({group.prompt.source for group in groups})
    result = {}
    for source in sources:
        indices = [index for index, group in enumerate(groups) if group.prompt.source == source]
        share = {name: value[indices] for name, value in rewards.items()}
        result[source] = {**summarise([groups[index] for index in indices], share), "num_prompts": len(indices)}
    return result


def _example(run: Run, group: RolloutGroup, rewards: Rewards, index: int) -> dict[str, Any]:
    pair, prompt = group.pairs[0], group.prompt
    images = []
    for number, image in enumerate(prompt.images):
        name = f"eval/images/{index:04d}_{number}.png"
        image.save(run.folder / name)
        images.append(name)
    return {
        "key": prompt.key,
        "problem": prompt.problem,
        "answer": prompt.answer,
        "images": images,
        "first": pair.first.response_text,
        "second": None if pair.second is None else pair.second.response_text,
        "description": pair.description,
        "rewards": {name: value for name, value in rewards_of(rewards, index).items() if name != "format"},
        "faithful": faithful(pair.description, prompt),
    }
