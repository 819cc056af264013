"""Models whose chat template begins the answer with <think>: prompts, passes, rewards, segments, demonstrations, rows
and exports, where a response begins inside the block and holds </think> alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_sr1.config import Config, ObjectiveConfig, TrainConfig
from megatron_sr1.data.build.layouts import LayoutRules
from megatron_sr1.data.build.samples import BuiltSample, build_sample
from megatron_sr1.data.sources.source import Problem, RawSample
from megatron_sr1.digits import tiny_families
from megatron_sr1.loops.sft import _check_of
from megatron_sr1.preflight import gold_groups, known_rewards, unearned
from megatron_sr1.processor import Processor
from megatron_sr1.prompts import SEE_THINK, SHIPPED, THINKING, THINKING_COT, THINKING_REASONER, Template
from megatron_sr1.ranks import ALONE
from megatron_sr1.rewards import for_prompt, score_group
from megatron_sr1.rewards.reading import EndpointReadings
from megatron_sr1.rollout.plan import Limits, Planner
from megatron_sr1.rollout.request import Draw, Generation, OwnView
from megatron_sr1.rollout.two_pass import TwoPassGenerator
from megatron_sr1.streams import Preset, preset_of, segments_of
from megatron_sr1.training.batches import Batcher
from megatron_sr1.training.segments import response_masks, scored_responses
from megatron_sr1.types import Prompt, PromptShare, Reading, RewardStream, Rollout, RolloutGroup, Sampling, SftSample
from megatron_sr1.weights.hf_dir import copy_side_files
from tests.data_cases import noise, png
from tests.scripted_engine import ScriptedEngine

# In the form of the thinking models' own: an answer's turn that begins with the tag and a line break.
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
THOUGHT = "Seven and three dots.\n</think>\n\n"
FIRST = THOUGHT + "<description> seven red dots and three blue </description>\n\\boxed{10}"
AGAIN = "7 + 3\n</think>\n\\boxed{10}"


@pytest.fixture(scope="module", params=[False, True], ids=["pieces", "tokens"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thinking model without weights; the tags are tokens that are not special, as in Qwen3's, or made of pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_families, "_save_weights", lambda *given, **how: None)
        made = tiny_families.create_family(tmp_path_factory.mktemp("thinking"), "qwen3_vl")
    if request.param:
        tokenizer = AutoTokenizer.from_pretrained(made)
        tokenizer.add_tokens(["<think>", "</think>"])
        tokenizer.save_pretrained(made)
    (made / "chat_template.jinja").write_text(CHAT)
    return made


@pytest.fixture(scope="module")
def processor(folder: Path) -> Processor:
    return Processor.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def preset() -> Preset:
    names = {"template": "thinking", "second_template": "thinking_reasoner", "plain_template": "thinking_cot"}
    return preset_of(Config(objective=ObjectiveConfig(preset="perception_credit", **names)))


class TextEngine(ScriptedEngine):
    """Answers with texts, in a real tokenizer's ids."""

    def __init__(self, processor: Processor, answer: Callable[[str], str]) -> None:
        super().__init__(answer)
        self.ids: dict[str, tuple[int, ...]] = {}
        self._processor = processor

    def own_view(self, prompt_ids: Sequence[int], images: Sequence[Any]) -> OwnView:
        seen = [self._processor.encode_image(image) for image in images]
        ids = self._processor.expand(prompt_ids, [image.grid_thw for image in seen])
        return OwnView(ids, [(image.grid_thw, image.pixel_values) for image in seen])

    def add(self, request_id: str, prepared: Any, draw: Draw) -> None:
        self.ids[request_id] = prepared
        self._queue.append((request_id, prepared))

    def step(self) -> list[Generation]:
        request_id, prompt = self._queue.pop()
        ids = self._processor.response_ids(self._answer(request_id))
        return [Generation(request_id, prompt, ids, (-0.5,) * len(ids), "stop")]


def prompt(key: str, num_images: int = 1) -> Prompt:
    return Prompt(key, "How many dots?", "10", tuple(noise(number, (64, 64)) for number in range(num_images)))


def rollouts(
    processor: Processor, preset: Preset, answer: Callable[[str], str], *asked: Prompt
) -> tuple[list[RolloutGroup], TextEngine]:
    engine = TextEngine(processor, answer)
    planner = Planner(processor, Limits(90, 1000, 50), preset.templates)
    planner.check(preset.passes)
    made = TwoPassGenerator(engine, planner).generate(
        PromptShare.whole(asked), Sampling(1, 1.0, 90, 1, *preset.passes), 0
    )
    return made, engine


def credited(processor: Processor, preset: Preset, group: RolloutGroup, *streams: str) -> list[str]:
    """The text of the tokens of each stream of the first pass; without names those of the objective."""
    chosen = [RewardStream(name, "first", name, (("acc", 1.0),)) for name in streams] or list(preset.streams)
    response, *_ = scored_responses(group.pairs[0], group.prompt, preset)
    ids = response.rollout.response_ids
    masks = response_masks(processor, response, chosen)
    return [processor.decode([i for i, inside in zip(ids, mask, strict=True) if inside]) for mask in masks]


# ---------------------------------------------------------------- both passes
def test_every_pass_begins_inside_the_block(processor: Processor, folder: Path, preset: Preset) -> None:
    """The ids of each pass are those of transformers' own rendering, and end with the tag."""
    script = {"0/0/first": FIRST, "0/0/second": AGAIN, "1/0/first": AGAIN}
    (shown, plain), engine = rollouts(processor, preset, script.__getitem__, prompt("a"), prompt("b", 0))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = {
        "0/0/first": THINKING.user_text("How many dots?"),
        "0/0/second": THINKING_REASONER.user_text("How many dots?", 0, "seven red dots and three blue"),
        "1/0/first": THINKING_COT.user_text("How many dots?", 0),
    }
    for name, text in texts.items():
        image = [{"type": "image"}] if name == "0/0/first" else []
        content = [*image, {"type": "text", "text": text}]
        made = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=True
        )
        grids = [processor.grid((64, 64))] * len(image)
        assert engine.ids[name] == processor.expand(made["input_ids"], grids)
        assert processor.decode(engine.ids[name]).endswith("<|im_start|>assistant\n<think>\n")
    pair = shown.pairs[0]
    assert (pair.first.response_text, pair.description) == (FIRST, "seven red dots and three blue")
    assert pair.second is not None and pair.second.response_text == AGAIN
    right = {"acc": 1.0, "fmt": 1.0, "acc_vis": 1.0, "fmt_vis": 1.0}
    assert score_group(shown, right, asked=preset.asked.of(shown.prompt)) == [right]
    assert score_group(plain, ["acc", "fmt_cot"], asked=preset.asked.of(plain.prompt)) == [{"acc": 1.0, "fmt_cot": 1.0}]


def test_segments_split_the_response_where_the_block_closes(processor: Processor, preset: Preset) -> None:
    (group,), _ = rollouts(processor, preset, lambda name: FIRST if "first" in name else AGAIN, prompt("a"))
    reasoning, described = credited(processor, preset, group)
    assert described.strip() == "<description> seven red dots and three blue </description>"
    assert reasoning.startswith("Seven and three dots.\n</think>") and reasoning.endswith("\\boxed{10}<|im_end|>")
    assert "<description>" not in reasoning
    think, answer = credited(processor, preset, group, "think", "answer")
    assert think.strip() == "Seven and three dots.\n</think>" and answer.strip() == "\\boxed{10}"
    assert segments_of(THINKING)[:4] == ("response", "think", "description", "answer")
    second = second_of(group)
    assert second.rollout.response_text == AGAIN
    (mask,) = response_masks(processor, second, [RewardStream("t", "second", "think", (("acc_vis", 1.0),))])
    ids = second.rollout.response_ids
    assert processor.decode([i for i, inside in zip(ids, mask, strict=True) if inside]).strip() == "7 + 3\n</think>"


def second_of(group: RolloutGroup) -> Any:
    """The second response as one that a stream credits."""
    from megatron_sr1.training.segments import Response

    assert group.pairs[0].second is not None
    return Response("second", 0, group.pairs[0].second, group.prompt, THINKING_REASONER)


ODD = {  # response: format, accuracy, description, the block
    "the tag is written again": ("<think>" + FIRST, 0.0, 1.0, "seven red dots and three blue", ""),
    "never closed": ("dots \\boxed{10}", 0.0, 1.0, None, ""),
    "closed twice": ("a </think>" + FIRST, 0.0, 1.0, "seven red dots and three blue", ""),
    "a block of the wrong order": ("<description> d </description> a </think> \\boxed{10}", 0.0, 1.0, "d", None),
    "the reasoning quotes a tag": ("in <description> I say\n" + FIRST, 0.0, 1.0, None, None),
    "no description": ("a </think> \\boxed{10}", 0.0, 1.0, None, "a </think>"),
    "an answer in the reasoning alone": ("\\boxed{10} </think> <description> d </description> 10", 0.0, 1.0, "d", None),
    "a thought that is blank": ("</think><description>d</description>\\boxed{10}", 1.0, 1.0, "d", "</think>"),
    "nothing": ("", 0.0, 0.0, None, ""),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_responses_are_graded_as_what_they_are(case: str, processor: Processor, preset: Preset) -> None:
    text, fmt, acc, description, block = ODD[case]
    (group,), engine = rollouts(processor, preset, lambda name: text if "first" in name else AGAIN, prompt("a"))
    graded = score_group(group, ["fmt", "acc"], asked=preset.asked)
    assert (graded, group.pairs[0].description) == ([{"fmt": fmt, "acc": acc}], description)
    assert ("0/0/second" in engine.ids) == (description is not None)
    (think,) = credited(processor, preset, group, "think")
    assert block is None or think.strip() == block


def test_a_gold_answer_earns_everything(processor: Processor, preset: Preset) -> None:
    """As the first phase of a run asks: the response is written by the layout, which leaves the tag out."""
    asked = {0: prompt("a"), 1: prompt("b", 0)}
    groups = gold_groups(asked, preset, Planner(processor, Limits(90, 1000, 50), preset.templates))
    assert groups[0].pairs[0].first.response_text.count("think>") == 1
    graded: dict[int, Any] = {
        group.group_id: score_group(
            group,
            for_prompt(known_rewards(preset), bool(group.prompt.images)),
            asked=preset.asked.of(group.prompt),
        )
        for group in groups
    }
    assert unearned(groups, graded, preset) == []


def test_an_endpoint_s_response_is_read_as_the_policy_s() -> None:
    """Its own chat template may leave the tag to it: what a layout looks for is what comes behind."""

    def read(question: str, where: str) -> Future[str]:
        future: Future[str] = Future()
        future.set_result(question)
        return future

    for template, text, expected in (
        (THINKING_REASONER, "<think> a </think> \\boxed{1}", " a </think> \\boxed{1}"),
        (THINKING_REASONER, "\n<think>a</think>\\boxed{1}", "a</think>\\boxed{1}"),
        (THINKING_REASONER, "a </think> \\boxed{1}", "a </think> \\boxed{1}"),
        (SHIPPED.by_name["caption_reasoner"], "<think> a </think> \\boxed{1}", "<think> a </think> \\boxed{1}"),
    ):
        judged: Any = SimpleNamespace(read=read)
        asked: Any = SimpleNamespace(second=template, plain=SEE_THINK)
        readings = EndpointReadings(judged, asked)
        readings.ask(0, 0, text, Reading("big", 0, Rollout("r", (), (), "", (), "stop", 0), "d"))
        ((_, _, reading),) = readings.collect()
        assert reading.rollout.response_text == expected and template.parse(expected) is not None


# ---------------------------------------------------------------- demonstrations
def demonstration(template: str, response: str, num_images: int = 1) -> SftSample:
    return SftSample(prompt("k", num_images), template, response)


def test_a_demonstration_s_target_is_what_comes_behind_the_tag(processor: Processor) -> None:
    config = Config(train=TrainConfig(micro_batch_tokens=1024))
    (row,) = Batcher(config, processor, ALONE).sft([demonstration("thinking", FIRST)]).micro_batches
    ids = row.input_ids.tolist()
    turn = processor.turn_ids(THINKING.render("How many dots?", 1), 1)
    start = len(processor.expand(turn, [processor.grid((64, 64))]))
    assert processor.decode(ids[:start]).endswith("assistant\n<think>\n")
    text = processor.decode(ids)
    assert text.count("<think>") == text.count("</think>") == 1, "the target does not have the tag again"
    assert len(row.targets) == len(processor.response_ids(FIRST)), "nothing of the prompt is trained on"
    assert processor.decode(row.targets.tolist()) == FIRST + "<|im_end|>"


def test_demonstrations_of_another_kind_of_model_are_refused_before_the_model_is_made(processor: Processor) -> None:
    run: Any = SimpleNamespace(config=Config(), processor=processor)
    check = _check_of(run)
    check(demonstration("thinking", FIRST))
    with pytest.raises(ValueError, match=r"begins the answer with <think>.*'see_think'.*demonstrations name these"):
        check(demonstration("see_think", "<description> d </description> <think> t </think> \\boxed{1}"))
    with pytest.raises(ValueError, match=r"'k': its response has <think>, which the chat template has written already"):
        check(demonstration("thinking", "<think>" + FIRST))


def built(**row: Any) -> BuiltSample | Problem:
    fields = {"problem": "How many?", **row}
    images = () if "description" in row or row.get("template") == "thinking_cot" else (png(1),)
    return build_sample(RawSample("here", "k", fields, images), LayoutRules())


def test_rows_may_name_the_templates() -> None:
    for template, response, more in (
        ("thinking", FIRST, {}),
        ("thinking_cot", AGAIN, {}),
        ("thinking_reasoner", AGAIN, {"description": "ten dots"}),
        ("vision_sr1_cot", f"<think>{AGAIN}", {}),
    ):
        made = built(template=template, response=response, **more)
        assert isinstance(made, BuiltSample), made
        text = json.loads(dict(made.members)["json"])
        assert (text["template"], text["response"], text["answer"]) == (template, response, "10")
    for row, kind, words in (
        ({"template": "thinking", "response": f"<think>{FIRST}"}, "response", "has <think> already: take it out"),
        ({"template": "thinking", "response": AGAIN}, "response", "follow the layout of thinking: "),
        ({"template": "thinking_reasoner", "response": AGAIN}, "field", "belongs exactly to templates that read one"),
        ({"template": "thinking_cot", "response": AGAIN, "description": "d"}, "field", "belongs exactly to"),
        ({"template": "thought", "response": AGAIN}, "field", "must be one of see_think, cot, caption_reasoner, "),
        ({"template": ["thinking"], "response": AGAIN}, "field", "must be one of"),
    ):
        problem = built(**row)
        assert isinstance(problem, Problem) and problem.kind == kind and words in problem.reason, problem


# ---------------------------------------------------------------- chat templates
def test_the_export_keeps_the_chat_template(folder: Path, processor: Processor, tmp_path: Path) -> None:
    copy_side_files(folder, tmp_path / "hf")
    again = Processor.from_pretrained(str(tmp_path / "hf"))
    assert again.opened == processor.opened == "<think>"
    turn = THINKING.render("q", 1)
    assert again.turn_ids(turn, 1) == processor.turn_ids(turn, 1)


def test_what_is_wrong_with_the_opening_is_told(folder: Path, processor: Processor, tmp_path: Path) -> None:
    words = (
        r"begins the answer with <think>, and the template 'see_think' does not know it. Set objective.template="
        r"thinking .*second_template=thinking_reasoner and objective.plain_template=thinking_cot"
    )
    with pytest.raises(ValueError, match=words):
        Planner(processor, Limits(90, 1000, 50)).check(preset_of(Config()).passes)
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "chat_template.jinja"
    path.write_text(CHAT.replace("<think>\n' }}", "<look>\n' }}"))
    looks = Processor.from_pretrained(str(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"with <look>, and the template 'thinking' .* Take a template of your own"):
        looks.turn_ids(THINKING.render("q", 1), 1)
    assert looks.turn_ids(Template("own", "{problem}", tags=("look",), opens="<look>").render("q", 0), 0)
    path.write_text(CHAT.replace("<think>\n' }}", "' + ('<think>' if messages[0].role == 'user' else '') }}"))
    sometimes = Processor.from_pretrained(str(tmp_path / "model"))
    assert sometimes.turn_ids(THINKING.render("q", 1), 1)
    told = Template("told", "{problem}", tags=("think",), opens="<think>", system="Be brief.")
    with pytest.raises(ValueError, match=r"assistant' here and with .*assistant\\n<think>' elsewhere, by images or"):
        sometimes.turn_ids(told.render("q", 1), 1)


def test_a_block_that_is_empty_and_closed_is_a_part_of_the_prompt(folder: Path, tmp_path: Path) -> None:
    """As the small Qwen3.5 have it, and every one that is told not to think: the layouts are those of other models."""
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(
        CHAT.replace("<think>\n' }}", "<think>\n\n</think>\n\n' }}")
    )
    processor = Processor.from_pretrained(str(tmp_path / "model"))
    assert processor.opened == ""
    preset = preset_of(Config(objective=ObjectiveConfig(preset="perception_credit")))
    response = f"<description> ten dots </description> <think> {THOUGHT} \\boxed{{10}}"
    again = f"<think> {AGAIN}"
    (group,), engine = rollouts(processor, preset, lambda name: response if "first" in name else again, prompt("a"))
    for ids in engine.ids.values():
        assert processor.decode(ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert group.pairs[0].description == "ten dots"
    right = {"acc": 1.0, "fmt": 1.0, "acc_vis": 1.0, "fmt_vis": 1.0}
    assert score_group(group, right, asked=preset.asked.of(group.prompt)) == [right]
    reasoning, described = credited(processor, preset, group)
    assert described.strip() == "<description> ten dots </description>" and reasoning.count("think>") == 2
    with pytest.raises(ValueError, match=r"'thinking' has opens: <think>, and .* begins no answer with it"):
        processor.turn_ids(THINKING.render("q", 1), 1)
    path = tmp_path / "model" / "chat_template.jinja"
    closed = "' + ('<think></think>' if messages[0].role == 'user' else '')"
    path.write_text(CHAT.replace("<think>\n'", closed))
    sometimes = Processor.from_pretrained(str(tmp_path / "model"))
    told = Template("told", "{problem}", tags=("think",), system="Be brief.")
    with pytest.raises(ValueError, match=r"passes would be asked in two ways"):
        sometimes.turn_ids(told.render("q", 1), 1)
