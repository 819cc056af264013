"""What a run does by its own templates: planning, second passes, rewards in processes, segments, demonstrations,
evaluation. One layout in everything: other tags, an answer in a block of its own, images behind the question."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sr1.config import Config, ConfigError, load_config
from megatron_sr1.evaluation import digest_of, record_of, replace_records
from megatron_sr1.evaluation.files import EvaluationFiles
from megatron_sr1.evaluation.records import Material, read_records
from megatron_sr1.evaluation.summary import summarise_records
from megatron_sr1.evaluation.verdicts import judge_records
from megatron_sr1.loops.controls import ask_controls
from megatron_sr1.loops.evaluate import _identity
from megatron_sr1.processor import Processor
from megatron_sr1.prompts import COT, OURS, SEE_THINK, templates_of
from megatron_sr1.ranks import ALONE
from megatron_sr1.rewards import Reward, own_rewards, score_group
from megatron_sr1.rewards.workers import Graders
from megatron_sr1.rollout.plan import Limits, Planner
from megatron_sr1.rollout.two_pass import TwoPassGenerator
from megatron_sr1.streams import Preset, preset_of, segments_of
from megatron_sr1.training.batches import Batcher
from megatron_sr1.training.rollout_files import read_text, rollouts_file, step_files, write_rollouts
from megatron_sr1.training.rollout_reader import read_rollouts
from megatron_sr1.training.segments import Response, response_masks
from megatron_sr1.training.step_rewards import scored_rewards
from megatron_sr1.types import (
    SECOND,
    Passes,
    Prompt,
    PromptShare,
    RewardStream,
    Rollout,
    RolloutGroup,
    RolloutPair,
    Sampling,
    SftSample,
)
from tests.control_cases import OnThreads
from tests.data_cases import picture
from tests.evaluation_cases import append_records
from tests.scripted_engine import IMAGE, Letters, ScriptedEngine, prompt
from tests.step_cases import Listed, rollouts_of

YAML = """
objective: {preset: perception_credit, template: look, second_template: read, plain_template: plain, streams: [
  {name: visual, tokens: visual reasoning}]}
templates:
  look:
    prompt: "Q: {problem}{images} Look."
    system: Look well.
    tags: [visual reasoning, think]
    describes: visual reasoning
    answer: {tag: answer}
  read: {prompt: "S: {description} Q: {problem}", tags: [think], answer: {json: final}}
  plain: {extends: look, describes: null, tags: [think], answer: last_line}
"""
FIRST = "<visual reasoning> 3 and 7 </visual reasoning> <think> sum </think> <answer> 10 </answer>"
AGAIN = '<think> 3 + 7 </think> {"final": "10"}'
PLAIN = "<think> 3 + 7 </think>\n10"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(YAML)
    return load_config(path, [])


@pytest.fixture(scope="module")
def preset(config: Config) -> Preset:
    return preset_of(config)


def rollout(text: str) -> Rollout:
    return Rollout("0/p/0/first", (1, 2), (3, 4), text, (-0.1, -0.2), "stop", 0)


def pairs(first: str = FIRST, second: str = AGAIN) -> tuple[RolloutPair, ...]:
    return (RolloutPair(0, rollout(first), rollout(second), "3 and 7"),)


def group(*, images: int = 1, **texts: str) -> RolloutGroup:
    return RolloutGroup(images, Prompt(f"p{images}", "3 + 7?", "10", (picture(0),) * images), pairs(**texts))


# ---------------------------------------------------------------- generation
def test_both_passes_are_asked_by_the_templates(config: Config, preset: Preset) -> None:
    engine = ScriptedEngine(lambda request_id: FIRST)
    planner = Planner(Letters(), Limits(90, 1000, 50), templates_of(config))  # type: ignore[arg-type]
    sampling = Sampling(1, 1.0, 90, 1, *preset.passes)
    found = TwoPassGenerator(engine, planner).generate(PromptShare.whole([prompt("a"), prompt("b", 0)]), sampling, 0)
    shown = chr(IMAGE) * 3
    assert engine.prompts == {
        "0/0/first": f"[Look well.]Q: How many?{shown} Look.",
        "0/0/second": "S: 3 and 7 Q: How many?",
        "1/0/first": "[Look well.]Q: How many? Look.",
    }
    assert [pair.description for each in found for pair in each.pairs] == ["3 and 7", None]
    assert preset.passes == Passes("look", (SECOND,), "read", "plain")


def test_ours_do_not_see_the_layout_of_others() -> None:
    engine = ScriptedEngine(lambda request_id: FIRST)
    planner = Planner(Letters(), Limits(90, 1000, 50))  # type: ignore[arg-type]
    (found,) = TwoPassGenerator(engine, planner).generate(PromptShare.whole([prompt("a")]), Sampling(1, 1.0, 90, 1), 0)
    assert found.pairs[0].description is None and found.pairs[0].second is None


# ---------------------------------------------------------------- rewards
def test_rewards_grade_by_the_templates_in_their_processes(preset: Preset) -> None:
    """Also where the group comes without its images, which tell by what it was asked."""
    plainly = replace(group(images=0), pairs=(RolloutPair(0, rollout(PLAIN), None, None),))
    with closing(Graders(scored_rewards(preset), num_workers=1, asked=preset.asked)) as graders:
        for each in (group(), plainly, replace(group(first=PLAIN, second=FIRST), group_id=2)):
            graders.submit(each)
        graded = dict(graders.collect())
    right = {"acc": 1.0, "acc_vis": 1.0, "fmt": 1.0, "fmt_vis": 1.0, "leak": 0.0}
    assert graded[1] == [right]
    assert graded[0] == [{"acc": 1.0, "acc_vis": 0.0, "fmt_cot": 1.0, "fmt_vis": 0.0, "leak": 0.0}]
    assert graded[2] == [dict.fromkeys(right, 0.0)]


def test_a_judge_is_asked_by_the_second_template(preset: Preset) -> None:
    asked: list[str] = []
    ask = lambda text: asked.append(text) or '{"final": 10}'  # noqa: E731
    made = group()
    assert score_group(made, ["acc_judge"], ask=ask, asked=preset.asked.of(made.prompt)) == [{"acc_judge": 1.0}]
    assert asked == ["S: 3 and 7 Q: 3 + 7?"]
    told = replace(preset.asked.second, system="Read well.")
    assert told.as_question("q", "d") == "Read well.\n\nS: d Q: q"


def test_a_reward_of_ones_own_reads_by_the_templates(preset: Preset, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from megatron_sr1.rewards import Reward\n"
        "def f(pair, prompt, asked):\n    return float(asked.first.answer_of(pair.first.response_text))\n"
        "ten = Reward(f, needs=('templates',))\nno = Reward(f)\n"
    )
    assert score_group(group(), [f"{file}:ten"], asked=preset.asked) == [{f"{file}:ten": 10.0}]
    with pytest.raises(ValueError, match=r"takes 3 arguments, but with needs=\(\) it is given 2"):
        score_group(group(), [f"{file}:no"])
    with pytest.raises(ValueError, match="is given no templates"):
        Reward(lambda group: [1.0], needs=("group", "templates"))


# ---------------------------------------------------------------- segments
def test_segments_follow_the_template_in_use(preset: Preset, tiny_model_dir: str) -> None:
    assert segments_of(preset.asked.first) == (
        *("response", "visual reasoning", "think", "answer", "reasoning", "rest"),
    )
    assert segments_of(preset.asked.second) == ("response", "think", "answer", "rest")
    processor = Processor.from_pretrained(tiny_model_dir)

    def marked(text: str, tokens: str, asked: Any = preset.asked) -> str:
        ids = processor.response_ids(text)
        stream = RewardStream("s", "first", tokens, (("acc", 1.0),))
        response = Response("first", 0, replace(rollout(text), response_ids=ids), group().prompt, asked.first)
        (mask,) = response_masks(processor, response, (stream,))
        return processor.decode([token for token, chosen in zip(ids, mask, strict=True) if chosen]).strip()

    assert marked(FIRST, "visual reasoning") == "<visual reasoning> 3 and 7 </visual reasoning>"
    assert marked(FIRST, "answer") == "<answer> 10 </answer>"
    assert marked(FIRST, "reasoning").startswith("<think> sum </think>")
    assert marked(FIRST, "answer", OURS) == "" and marked(FIRST, "description", OURS) == ""
    plain = replace(preset.asked, first=preset.asked.plain)
    assert marked(PLAIN, "answer", plain) == "10" and marked(PLAIN, "visual reasoning", plain) == ""
    opened = replace(COT, opens="<think>")
    assert marked("a </think> \\boxed{1}", "think", replace(OURS, first=opened)) == "a </think>"


def test_a_tag_that_is_called_as_a_segment_is_none() -> None:
    words = {"extends": "see_think", "tags": ["description", "reasoning"]}
    for tokens in ("reasoning", "description"):
        objective = {"template": "mine", "preset": None}
        streams = [{"name": "s", "tokens": tokens, "rewards": {"acc": 1.0}}]
        made = Config(templates={"mine": words})
        made = replace(made, objective=replace(made.objective, streams=streams, **objective))
        if tokens == "description":
            assert preset_of(made).streams[0].tokens == "description"
            continue
        with pytest.raises(
            ValueError, match=r"tokens='reasoning' is no segment of the first pass\. It has response, de"
        ):
            preset_of(made)


# ---------------------------------------------------------------- demonstrations
def test_a_demonstration_is_trained_with_the_turn_of_its_template(config: Config, tiny_model_dir: str) -> None:
    processor = Processor.from_pretrained(tiny_model_dir)
    small = replace(config, train=replace(config.train, micro_batch_tokens=1024))
    images = (picture(0),)
    sample = SftSample(Prompt("p", "3 + 7?", "10", images), "look", FIRST)
    (row,) = Batcher(small, processor, ALONE).sft([sample]).micro_batches
    turn = templates_of(config).by_name["look"].render("3 + 7?", 1)
    ids = processor.expand(processor.turn_ids(turn, 1), [processor.grid(image.size) for image in images])
    assert tuple(row.input_ids[: len(ids)].tolist()) == ids and len(row.images) == 1
    text = processor.decode(ids)
    assert "system\nLook well.<|im_end|>" in text and text.index("3 + 7?") < text.index("<|image_pad|>")
    with pytest.raises(ConfigError, match="sample 'p': template='look' is no template"):
        Batcher(replace(small, templates={}, objective=Config().objective), processor, ALONE).sft([sample])


# ---------------------------------------------------------------- what is kept
def test_saved_rollouts_are_not_read_by_other_templates(preset: Preset, tmp_path: Path) -> None:
    made = [replace(group(), group_id=0)]
    path = rollouts_file(tmp_path, 0)
    write_rollouts(path, rollouts_of(made, None, preset), 1, preset.asked)
    prompts = lambda further: Listed.of(made)  # noqa: E731
    assert read_rollouts(path, prompts, 1, ["acc"], preset.asked).groups == made
    with pytest.raises(ValueError, match=r"asked by other templates, look .*; the configuration has see_think "):
        read_rollouts(path, prompts, 1, ["acc"])
    (file,) = step_files(path)
    path.write_text(read_text(file).replace('"templates"', '"other"'))
    file.unlink()
    assert read_rollouts(path, prompts, 1, ["acc"]).groups == made, "of an earlier release"


def test_an_evaluation_knows_its_templates(config: Config) -> None:
    class Data:
        fingerprint = "f"

    def identity(**changes: Any) -> dict[str, Any]:
        return dict(_identity(replace(config, **changes), Data(), "m"))  # type: ignore[arg-type]

    before = identity()
    assert before["the template"] == "look" and before["the templates"].startswith("look ")
    other = {**config.templates, "read": {**config.templates["read"], "prompt": "S: {description} {problem}"}}
    told = replace(config.model, system_prompt="Be brief.")
    digests = {digest_of(each) for each in (before, identity(templates=other), identity(model=told))}
    assert len(digests) == 3
    default = dict(_identity(Config(), Data(), "m"))  # type: ignore[arg-type]
    assert "the templates" not in default and "model.system_prompt" not in default, "as earlier releases kept it"


def test_controls_are_asked_and_read_by_the_templates(config: Config, preset: Preset, tmp_path: Path) -> None:
    """The plain one answers on its last line, the second as JSON; the first's answers are in a tag."""
    settings = replace(config.evaluate, controls=("prior", "gold"))
    small = replace(config.rollout, max_response_tokens=90, max_description_tokens=50, max_model_tokens=1000)
    engine = ScriptedEngine(lambda request_id: AGAIN if engine.prompts[request_id].startswith("S: ") else PLAIN)
    made = group()
    vectors: Any = score_group(made, own_rewards(described=True), asked=preset.asked)
    material = Material("shown", "7 and 3")
    files = EvaluationFiles(tmp_path, "evaluate")
    files.records.parent.mkdir()
    replace_records(
        files.records, [record_of(made, preset.asked.first, vectors, "m", ends_chunk=True, material=material)]
    )
    run: Any = SimpleNamespace(
        config=replace(config, evaluate=settings, rollout=small),
        platform=OnThreads(),
        planner=Planner(Letters(), Limits(90, 1000, 50), templates_of(config)),  # type: ignore[arg-type]
        say=lambda text: None,
    )
    ask_controls(run, lambda: TwoPassGenerator(engine, run.planner, slots=1), files, 0, "")
    assert set(engine.prompts.values()) == {"S: 7 and 3 Q: 3 + 7?", "[Look well.]Q: 3 + 7? Look."}
    (kept,) = read_records(files.records)
    assert {name: answer.right for name, answer in kept.samples[0].controls.items()} == {"prior": True, "gold": True}


def test_records_say_whether_a_description_was_asked_for(preset: Preset, tmp_path: Path) -> None:
    path, made = tmp_path / "evaluate.jsonl", group()
    vectors = score_group(made, own_rewards(described=True), asked=preset.asked)
    append_records(path, [record_of(made, preset.asked.first, vectors, "m", ends_chunk=True)])
    (kept,) = read_records(path)
    assert kept.described and kept.template == "look"
    numbers, _ = summarise_records([kept])
    assert (numbers["format"], numbers["second_pass_accuracy"], numbers["accuracy"]) == (1.0, 1.0, 1.0)
    questions: list[str] = []
    judge_records(path, lambda q: questions.append(q) or '{"final": 10}', "j", 1, template=preset.asked.second)
    (judged,) = read_records(path)
    assert questions == ["S: 3 and 7 Q: 3 + 7?"] and judged.samples[0].judge is not None
    assert judged.samples[0].judge.right
    path.write_text(path.read_text().replace(', "described": true', "").replace('"look"', '"see_think"'))
    (old,) = read_records(path)
    assert old.described and not replace(old, template=SEE_THINK.name, described=False).described
