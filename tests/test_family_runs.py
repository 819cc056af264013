"""Whole runs on handwritten digits of the families that other tests train in parts: cold start, self-rewarded GRPO,
evaluation, export."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_sr1.data import write_shards
from megatron_sr1.digits import make_demonstrations, make_prompts
from megatron_sr1.digits.tiny_families import create_plain
from megatron_sr1.evaluation import read_records
from megatron_sr1.prompts import SHIPPED
from megatron_sr1.types import SftSample
from tests.commands import REPOSITORY, run_forked
from tests.model_zoo import publish_experts

GAP = 1e-3  # nats a token, between trainer and engine
THINKING = ("thinking", "thinking_reasoner", "thinking_cot")
# As the chat templates of thinking models do: the answer's turn begins with the tag and a line break.
BEGINS, OPENS = "<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"


@dataclass(frozen=True)
class Case:
    """A family, the layout of its two ranks, and what is asked for beside the quickstart's settings."""

    family: str
    overrides: tuple[str, ...]
    thinks: bool = False

    @property
    def templates(self) -> tuple[str, ...]:
        names = ("template", "second_template", "plain_template")
        return tuple(f"objective.{name}={value}" for name, value in zip(names, THINKING, strict=True)) * self.thinks


CASES = {
    "recurrent": Case("qwen3_5", ("layout.tensor=2",), thinks=True),
    "mixture": Case("qwen3_vl_moe", ("layout.tensor=1", "layout.expert=2")),
}


def as_thinking(sample: SftSample) -> SftSample:
    """The same demonstration for a model whose prompt ends inside the block: it thinks, then describes."""
    found = re.fullmatch(r"(<description>.*</description> )?<think> (.*</think> )(.*)", sample.response)
    assert found is not None, sample.response
    described, thought, answer = found.groups()
    template = THINKING[0] if described else THINKING[1]
    return replace(sample, template=template, response=f"{thought}{described or ''}{answer}")


def build(folder: Path, case: Case, num_prompts: int, num_demonstrations: int) -> None:
    """Data and an untrained model, whose tokenizer has seen what it will be asked."""
    demonstrations = make_demonstrations(num_demonstrations, seed=1)
    if case.thinks:
        demonstrations = [as_thinking(sample) for sample in demonstrations]
    write_shards(demonstrations, folder / "data", "cold_start", 1000)
    for part, number in (("train", num_prompts), ("heldout", 64)):
        write_shards(make_prompts(part, number, 1), folder / "data", part, 1000)
    texts = [
        text
        for sample in demonstrations[:1000]
        for text in (
            SHIPPED.by_name[sample.template].user_text(sample.prompt.problem, 0, sample.description),
            sample.response,
        )
    ]
    create_plain(folder / "base", case.family, texts, seed=1)
    if case.thinks:
        chat = folder / "base" / "chat_template.jinja"
        assert chat.read_text().count(BEGINS) == 1
        chat.write_text(chat.read_text().replace(BEGINS, OPENS))


def run(folder: Path, command: str, name: str, *overrides: str, model: str = "base") -> list[dict[str, float]]:
    """A command with the quickstart's settings; its metrics, a step each."""
    data, config = folder / "data", "sft" if command == "sft" else "grpo"
    words = [
        *("-m", "megatron_sr1.cli", command, str(REPOSITORY / f"examples/quickstart/{config}.yaml")),
        *(f"run_dir={folder / name}", f"model.hf_dir={folder / model}"),
        *(f"data.{part}=[{data}/{part}-*.tar]" for part in ("train", "heldout", "cold_start")),
        *overrides,
    ]
    num_ranks = 1 if "nproc=1" in overrides else 2
    run_forked(words, num_ranks)
    metrics = folder / name / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()] if command != "evaluate" else []


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_family_learns_digits(name: str, tmp_path: Path) -> None:
    """Twenty steps from a cold start: the reward rises, with the generator's log-probs all the way."""
    case = CASES[name]
    build(tmp_path, case, num_prompts=700, num_demonstrations=8000)
    learnt = run(tmp_path, "sft", "sft", "nproc=1", "layout.tensor=1", *case.templates)
    assert len(learnt) == 180 and learnt[-1]["loss/sft/nll"] < 0.2, learnt[-1]
    steps = run(tmp_path, "grpo", "grpo", "train.steps=20", *case.overrides, *case.templates, model="sft/hf")
    assert len(steps) == 20
    assert max(step["logprob_gap"] for step in steps) < GAP
    assert max(step["second/missing"] for step in steps) < 0.2, "there are second passes"
    if name == "mixture":  # of a step's only update: the routers are those that chose
        assert all(step["router/agreement"] == 1.0 for step in steps)
    first, last = (statistics.fmean(step["reward/total"] for step in part) for part in (steps[:5], steps[-5:]))
    assert last > first > 0.5, f"{first} in the first steps, {last} in the last"


# ---------------------------------------------------------------- a short one
REWARD = """
def odd(pair, prompt):
    ids = pair.first.response_ids
    return sum(number % 2 for number in ids) / len(ids)
"""


def test_a_recurrent_mixture_is_trained_as_its_engine_routed(tmp_path: Path) -> None:
    """Two steps without a cold start, paid for odd tokens: all kinds of weights move, and the export answers."""
    case = Case("qwen3_5_moe", ("layout.tensor=1", "layout.expert=2"))
    build(tmp_path, case, num_prompts=8, num_demonstrations=40)
    file = tmp_path / "odd.py"
    file.write_text(REWARD)
    streams = f"objective.streams=[{{name: odd, rewards: {{'{file}:odd': 1.0}}}}]"
    sizes = ("rollout.prompts_per_step=4", "train.batch_size=4", "rollout.max_response_tokens=16")
    checks = ("evaluate.verify_export=8", "preflight.enabled=false", "objective.router_replay=generator")
    steps = run(
        *(tmp_path, "grpo", "grpo", "train.steps=2", "objective.preset=null", streams, *sizes, *checks),
        *case.overrides,
    )
    assert [step["groups/dead"] for step in steps] == [0.0, 0.0]
    assert max(step["logprob_gap"] for step in steps) < GAP and min(step["router/agreement"] for step in steps) > 0.99
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "grpo/hf"))
    assert before.keys() == after.keys()
    moved = {name for name in before if not before[name].equal(after[name])}
    parts = ("A_log", "dt_bias", "conv1d.weight", "experts.down_proj", "shared_expert_gate.weight", "mlp.gate.weight")
    assert {part for part in parts if any(name.endswith(part) for name in moved)} == set(parts)


def test_a_mixture_answers_alike_from_either_layout_of_its_experts(tmp_path: Path) -> None:
    """vLLM reads a folder whose experts lie as published; one that transformers saved is streamed to it, turned."""
    build(tmp_path, CASES["mixture"], num_prompts=4, num_demonstrations=40)
    shutil.copytree(tmp_path / "base", tmp_path / "published")
    publish_experts(tmp_path / "published")
    found = {}
    for model in ("base", "published"):
        sizes = ("evaluate.max_prompts=4", "rollout.max_response_tokens=16", "nproc=1", "layout.tensor=1")
        run(tmp_path, "evaluate", f"of_{model}", *sizes, model=model)
        records = read_records(tmp_path / f"of_{model}" / "eval" / "evaluate.jsonl")
        found[model] = [(record.key, record.samples[0].first.text) for record in records]
    assert len(found["base"]) == 4 and len({text for _, text in found["base"]}) > 1
    assert found["base"] == found["published"]
