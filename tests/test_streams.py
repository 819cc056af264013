"""Objectives written as lists of streams: presets again, presets changed, and what contradicts itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from megatron_sr1.config import ConfigError, ObjectiveConfig, dump_config, load_config
from megatron_sr1.processor import Processor
from megatron_sr1.prompts import CAPTION_REASONER
from megatron_sr1.prompts import SEE_THINK as ASKED
from megatron_sr1.rewards import RewardError
from megatron_sr1.streams import PRESETS, Preset, preset_from_config, segments_of
from megatron_sr1.training.segments import Response, response_masks, scored_responses
from megatron_sr1.types import Clip, Prompt, RewardStream, Rollout, RolloutPair

SHOWN = Prompt("p", "?", "10", (Image.new("RGB", (28, 28)),))
SEE_THINK = r"<description> 3 and 7 </description> <think> sum </think> \boxed{10}"


def objective(*streams: dict[str, Any], preset: str | None = None, **more: Any) -> Preset:
    return preset_from_config(ObjectiveConfig(preset=preset, streams=list(streams), **more))


LISTS = {
    "vision_r1": [{"name": "answer", "rewards": {"acc": 1.0, "fmt_cot": 0.1}}],
    "gdpo": [
        {
            "name": "answer",
            "pass": "first",
            "tokens": "response",
            "normalize": "per_component",
            "rewards": {"acc": 1, "fmt": 0.1, "acc_vis": 1, "fmt_vis": 0.1},
        }
    ],
    "vision_sr1": [
        {"name": "answer", "rewards": {"acc": 1.0, "fmt": 0.1}, "loss_weight": 0.5},
        {"name": "visual", "pass": "second", "rewards": {"acc_vis": 1.0, "fmt_vis": 0.1}, "loss_weight": 0.5},
    ],
    "perception_credit": [
        {"name": "answer", "tokens": "reasoning", "rewards": {"acc": 1.0, "fmt": 0.1}, "loss_weight": 0.5},
        {"name": "visual", "tokens": "description", "rewards": {"acc_vis": 1.0, "fmt_vis": 0.1}, "loss_weight": 0.5},
    ],
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_is_the_preset_that_it_writes_out(name: str, tmp_path: Path) -> None:
    written = objective(*LISTS[name], template=PRESETS[name].template)
    assert (written.template, written.streams) == (PRESETS[name].template, PRESETS[name].streams)
    path = tmp_path / "c.yaml"
    path.write_text(f"objective: {{preset: null, template: {written.template}, streams: {LISTS[name]}}}\n")
    config = load_config(path, [])
    assert preset_from_config(config.objective) == written
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again, []) == config


def test_a_preset_is_changed_stream_by_stream() -> None:
    changed = objective(
        {"name": "visual", "loss_weight": 0.25, "kl_coef": 0},
        {"name": "brevity", "tokens": "think", "rewards": {"leak": -1.0}},
        preset="vision_sr1",
        kl_coef=0.5,
    )
    answer, visual, brevity = changed.streams
    assert answer.kl_coef == 0.5 and answer.rewards == (("acc", 1.0), ("fmt", 0.1))
    assert (visual.loss_weight, visual.kl_coef, visual.trajectory) == (0.25, 0.0, "second")
    assert (brevity.name, brevity.tokens, brevity.rewards, brevity.loss_weight) == (
        "brevity",
        "think",
        (("leak", -1),),
        1,
    )
    assert changed.name == "vision_sr1" and changed.passes == PRESETS["vision_sr1"].passes
    without = objective({"name": "visual", "enabled": False}, preset="vision_sr1")
    assert [stream.name for stream in without.streams] == ["answer"] and not without.second_pass


def test_what_a_stream_does_not_say_the_objective_says() -> None:
    own = {"advantage": "centred", "scope": "batch", "aggregation": "sequence_sum", "kl_estimator": "k1"}
    clips = {"clip_low": 0.1, "clip_high": 0.4, "dual_clip": None}
    more = {"kl_in": "reward", "entropy_coef": -0.5}
    said, silent = objective(
        {"name": "a", "rewards": {"acc": 1}, **own, **clips, **more},
        {"name": "b", "rewards": {"acc": 1}},
        advantage="leave_one_out",
        aggregation="sequence_mean",
        kl_estimator="k2",
        clip_low=0.3,
        dual_clip=3.0,
        entropy_coef=0.25,
    ).streams
    assert (said.kl_in, said.entropy_coef, said.kl_coef, said.kl_loss_coef) == ("reward", -0.5, 0.01, 0.0)
    assert (silent.kl_in, silent.entropy_coef, silent.kl_loss_coef) == ("loss", 0.25, 0.01)
    assert (said.advantage, said.scope, said.aggregation, said.kl_estimator) == tuple(own.values())
    assert said.clip == Clip(0.1, 0.4, None) and silent.clip == Clip(0.3, 0.2, 3.0)
    assert (silent.advantage, silent.scope, silent.aggregation, silent.kl_estimator) == (
        *("leave_one_out", "group", "sequence_mean", "k2"),
    )


def test_the_constant_is_of_the_streams_that_divide_by_it() -> None:
    constant = {"aggregation": "constant"}
    streams = objective(
        {"name": "a", "rewards": {"acc": 1}, **constant, "constant_tokens": 7},
        {"name": "b", "rewards": {"acc": 1}, **constant},
        {"name": "c", "rewards": {"acc": 1}},
        {"name": "d", "rewards": {"acc": 1}, **constant, "constant_tokens": None},
        constant_tokens=9,
    ).streams
    assert [stream.constant_tokens for stream in streams] == [7, 9, None, None]


@pytest.mark.parametrize(
    ("streams", "words"),
    [
        ("[{rewards: {acc: 1}}]", r"objective.streams\[0\].name=None"),
        ("[{name: a/b, rewards: {acc: 1}}]", r"objective.streams\[0\].name='a/b'"),
        ("[{name: a, rewards: {acc: 1}}, {name: a, rewards: {acc: 1}}]", r"streams\[1\].name='a'.*no other stream"),
        ("[{name: a, reward: {acc: 1}}]", r"streams\[0\] \(a\).reward is no key of a stream. Did you mean 'rewards'"),
        ("[{name: a, rewards: acc}]", r"\(a\).rewards='acc'"),
        ("[{name: a, rewards: {}}]", r"\(a\).rewards=\{\}"),
        ("[{name: a, rewards: {acc: high}}]", r"\(a\).rewards\['acc'\]='high'"),
        ("[{name: a, rewards: {acc: 0}}]", r"\(a\).rewards\['acc'\]=0.*Leave the reward out"),
        ("[{name: a, rewards: {acc: .inf}}]", r"\(a\).rewards\['acc'\]=inf"),
        ("[{name: a, rewards: {acc: true}}]", r"\(a\).rewards\['acc'\]=True"),
        ("[{name: a, rewards: {acc: 1}, pass: 3}]", r"\(a\).pass=3"),
        ("[{name: a, rewards: {acc: 1}, kl_coef: -1}]", r"\(a\).kl_coef=-1"),
        ("[{name: a, rewards: {acc: 1}, kl_coef: null}]", r"\(a\).kl_coef=None"),
        ("[{name: a, rewards: {acc: 1}, dual_clip: 0.5}]", r"\(a\).dual_clip=0.5"),
        ("[{name: a, rewards: {acc: 1}, kl_in: rewards}]", r"\(a\).kl_in='rewards'.*loss, reward"),
        ("[{name: a, rewards: {acc: 1}, kl_in: null}]", r"\(a\).kl_in=None"),
        ("[{name: a, rewards: {acc: 1}, entropy_coef: 1.5}]", r"\(a\).entropy_coef=1.5.*greater than -1"),
        ("[{name: a, rewards: {acc: 1}, entropy_coef: true}]", r"\(a\).entropy_coef=True"),
        ("[{name: a, rewards: {acc: 1}, entropy_coef: null}]", r"\(a\).entropy_coef=None"),
        ("[{name: a, rewards: {acc: 1}, entropy_coef: .nan}]", r"\(a\).entropy_coef=nan"),
        ("[{name: a, rewards: {acc: 1}, constant_tokens: 2.5}]", r"\(a\).constant_tokens=2.5.*a whole number"),
        ("[{name: a, rewards: {acc: 1}, constant_tokens: 0}]", r"\(a\).constant_tokens=0"),
        ("[{name: a, rewards: {acc: 1}, aggregation: fixed}]", r"\(a\).aggregation='fixed'.*constant"),
        ("[{name: a, rewards: {acc: 1}, advantage: std}]", r"\(a\).advantage='std'.*leave_one_out"),
        ("[{name: a, rewards: {acc: 1}, enabled: 'no'}]", r"\(a\).enabled='no'"),
        ("[a]", r"objective.streams\[0\]='a'"),
        ("{name: a}", "objective.streams="),
    ],
)
def test_a_slip_in_a_stream_is_named_with_its_place(streams: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(None, [f"objective.streams={streams}"])


@pytest.mark.parametrize(
    ("streams", "more", "words"),
    [
        ([], {"preset": None}, "it has no streams"),
        ([{"name": "answer", "enabled": False}], {"preset": "see_think"}, "it has no streams"),
        (
            [{"name": "visul", "loss_weight": 1.0}],
            {"preset": "vision_sr1"},
            "'visul' names no stream .* answer, visual",
        ),
        ([{"name": "a", "rewards": {"acuracy": 1}}], {}, "unknown reward 'acuracy'"),
        ([{"name": "a", "tokens": "tink", "rewards": {"acc": 1}}], {}, "tokens='tink' is no segment of the first pass"),
        ([{"name": "a", "pass": "second", "tokens": "description", "rewards": {"acc": 1}}], {}, "of the second pass"),
        (
            [{"name": "a", "tokens": "description", "rewards": {"acc": 1}}],
            {"template": "cot"},
            "no segment of the first",
        ),
        (
            [{"name": "a", "rewards": {"acc_vis": 1}}],
            {"template": "cot"},
            "needs a description.*objective.template=see",
        ),
        ([{"name": "a", "rewards": {"fmt": 1}}], {"template": "cot"}, "for another layout.*Use 'fmt_cot'"),
        ([{"name": "a", "rewards": {"fmt_cot": 1}}], {}, "for another layout.*Use 'fmt'"),
        ([{"name": n, "tokens": "rest", "rewards": {"acc": 1}} for n in "ab"], {}, "a and b both credit the rest"),
        (
            [{"name": "a", "rewards": {"acc": 1}, "advantage": "batch_std", "scope": "batch"}],
            {},
            "scope=batch contradic",
        ),
        (
            [{"name": "a", "rewards": {"acc": 1}, "advantage": "reward_std", "scope": "batch"}],
            {},
            "advantage=reward_std .* scope=batch contradic",
        ),
        (
            [{"name": "a", "rewards": {"acc": 1}, "kl_coef": 0}],
            {"kl_in": "reward", "kl_estimator": "k1"},
            "stream 'a': kl_in=reward .* kl_coef is 0. Set kl_coef, or kl_in=loss",
        ),
        (
            [{"name": "a", "rewards": {"acc": 1}}],
            {"kl_in": "reward"},
            "kl_in=reward with kl_estimator=k3 .*Set kl_estimator=k1",
        ),
        (
            [{"name": "a", "rewards": {"acc": 1}, "kl_in": "reward", "kl_estimator": "k2"}],
            {},
            "kl_in=reward with kl_estimator=k2 ",
        ),
        (
            [{"name": "a", "rewards": {"acc": 1}, "kl_in": "reward", "normalize": "per_component"}],
            {"kl_estimator": "k1"},
            "normalize=per_component makes an advantage of each",
        ),
        (
            [{"name": "a", "rewards": {"acc": 1}}],
            {"kl_in": "reward", "kl_estimator": "k1", "loss": "math:sqrt"},
            "stream 'a': kl_in=reward is of our loss, and objective.loss='math:sqrt'",
        ),
        (
            [{"name": "a", "rewards": {"acc": 1}, "entropy_coef": -0.1}],
            {"loss": "math:sqrt"},
            "stream 'a': entropy_coef=-0.1 is of our loss",
        ),
        (
            [{"name": "a", "rewards": {"acc": 1}, "constant_tokens": 9}],
            {},
            "'a' has constant_tokens=9, which belongs to aggregation=constant, and its aggregation is token_mean",
        ),
        (
            [{"name": "a", "rewards": {"acc": 1}}],
            {"constant_tokens": 9},
            "objective.constant_tokens=9 belongs to aggregation=constant, and no stream has it",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(streams: list[dict[str, Any]], more: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        objective(*streams, **more)


def test_two_rewards_of_one_name_are_refused(tmp_path: Path) -> None:
    names = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "r.py").write_text("def f(pair, prompt):\n    return 1.0")
        names.append(f"{tmp_path / folder / 'r.py'}:f")
    with pytest.raises(ValueError, match="both shown as 'f'"):
        objective({"name": "a", "rewards": dict.fromkeys(names, 1.0)})


# ---------------------------------------------------------------- segments
def masked(processor: Processor, text: str, second: str | None, *streams: RewardStream) -> list[str]:
    """The text of the tokens that each stream credits, both passes together."""

    def rollout(written: str | None) -> Rollout | None:
        if written is None:
            return None
        ids = processor.response_ids(written)
        return Rollout("0/p/0/x", (1,), ids, written, (0.0,) * len(ids), "stop", 0)

    first = rollout(text)
    assert first is not None
    pair = RolloutPair(0, first, rollout(second), "d")
    found = [""] * len(streams)
    for response in scored_responses(pair, SHOWN, Preset("credit", "see_think", tuple(streams))):
        for index, row in enumerate(response_masks(processor, response, streams)):
            ids = response.rollout.response_ids
            found[index] += processor.decode([i for i, inside in zip(ids, row.bool().tolist(), strict=True) if inside])
    return [text.strip() for text in found]


def credit(tokens: str, pass_name: str = "first") -> RewardStream:
    return RewardStream(f"{pass_name}_{tokens}", pass_name, tokens, (("acc", 1.0),))


def test_segments_are_what_their_names_say(tiny_model_dir: str) -> None:
    processor = Processor.from_pretrained(tiny_model_dir)
    end = processor.decode([processor.end_of_turn_id])
    names = segments_of(ASKED)
    assert names == ("response", "description", "think", "answer", "reasoning", "rest")
    whole, description, think, answer, reasoning = masked(processor, SEE_THINK, None, *map(credit, names[:-1]))
    assert whole == SEE_THINK + end and description == "<description> 3 and 7 </description>"
    assert think == "<think> sum </think>" and answer == r"\boxed{10}"
    assert reasoning == r"<think> sum </think> \boxed{10}" + end
    rest, _ = masked(processor, SEE_THINK, None, credit("rest"), credit("description"))
    assert rest == reasoning
    rest, *_ = masked(processor, SEE_THINK, None, credit("rest"), credit("description"), credit("answer"))
    assert rest.replace(" ", "") == "<think>sum</think>" + end
    nothing = masked(processor, "no layout at all", None, *map(credit, ("description", "think", "answer")))
    assert nothing == ["", "", ""]


def test_what_the_limit_cut_may_teach_nothing(tiny_model_dir: str) -> None:
    """Each pass by itself: a first response that is whole stays where the second was cut."""
    processor = Processor.from_pretrained(tiny_model_dir)
    ids = processor.response_ids(SEE_THINK)
    whole = Rollout("r", (1,), ids, SEE_THINK, (0.0,) * len(ids), "stop", 0)
    pair = RolloutPair(0, whole, replace(whole, finish_reason="length"), "d")
    streams = (credit("response"), credit("description"), credit("response", "second"))
    for cut, expected in (("train", len(ids)), ("mask", 0)):
        responses = scored_responses(pair, SHOWN, Preset("credit", "see_think", streams))
        first, second = (response_masks(processor, response, streams, cut) for response in responses)
        assert first[0].sum() == len(ids) and 0 < first[1].sum() < len(ids)
        assert second.shape == (3, len(ids)) and second.sum() == expected


def test_a_pass_has_its_own_segments(tiny_model_dir: str) -> None:
    processor = Processor.from_pretrained(tiny_model_dir)
    assert segments_of(CAPTION_REASONER) == ("response", "think", "answer", "rest")
    second = r"<think> 3 + 7 </think> \boxed{10}"
    streams = (credit("think"), credit("think", "second"), credit("rest", "second"))
    first_think, second_think, rest = masked(processor, SEE_THINK, second, *streams)
    assert (first_think, second_think) == ("<think> sum </think>", "<think> 3 + 7 </think>")
    assert rest.startswith(r"\boxed{10}"), "what the first pass' streams credit takes nothing from the second"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a <think> b </think> c", "<think> b </think>"),
        ("<think> a", None),
        ("</think> a <think>", None),
        ("<think> a </think> <think> b </think>", None),
        ("<think></think>", "<think></think>"),
    ],
)
def test_a_block_is_there_once_and_in_order(text: str, expected: str | None) -> None:
    span = ASKED.block(text, "think")
    assert (None if span is None else text[slice(*span)]) == expected


def test_the_answer_is_the_box_with_its_braces() -> None:
    text = r"\boxed{1} and \boxed{\frac{1}{2}} end"
    span = ASKED.block(text, "answer")
    assert span is not None and text[slice(*span)] == r"\boxed{\frac{1}{2}}"
    assert ASKED.block(r"\boxed{1", "answer") is None


def test_a_list_without_advantages_of_its_own_has_a_tensor_for_each(tiny_model_dir: str) -> None:
    processor = Processor.from_pretrained(tiny_model_dir)
    ids = processor.response_ids(SEE_THINK)
    pair = RolloutPair(0, Rollout("r", (1,), ids, SEE_THINK, (0.0,) * len(ids), "stop", 0), None, "d")
    streams = (credit("response"), credit("response", "second"))
    (response,) = scored_responses(pair, SHOWN, Preset("credit", "see_think", streams))
    assert response == Response("first", 0, pair.first, SHOWN, ASKED)
    masks = response_masks(processor, response, streams)
    assert torch.equal(masks, torch.stack([torch.ones(len(ids)), torch.zeros(len(ids))]))


def test_a_function_says_which_characters_a_stream_credits(tiny_model_dir: str, tmp_path: Path) -> None:
    """Beside a stream of the rest, which is left what it has not found; what it gives must be spans of the text."""
    (tmp_path / "mine.py").write_text(
        "import re\n"
        "def digits(text, prompt):\n    return [match.span() for match in re.finditer(r'[0-9]+', text)]\n"
        "def none(text, prompt):\n    return []\n"
        "def outside(text, prompt):\n    return [(0, len(text) + 1)]\n"
        "def turned(text, prompt):\n    return [(3, 1)]\n"
        "def broken(text, prompt):\n    return [prompt.answers]\n"
        "def one(text):\n    return []\n"
    )
    processor, file = Processor.from_pretrained(tiny_model_dir), tmp_path / "mine.py"
    first = Rollout("r", (1,), processor.response_ids(SEE_THINK), SEE_THINK, (), "stop", 0)

    def masks(name: str) -> list[str]:
        streams = (
            RewardStream("own", "first", f"{file}:{name}", (("acc", 1.0),)),
            RewardStream("rest", "first", "rest", (("acc", 1.0),)),
        )
        preset = Preset("credit", "see_think", streams)
        (response,) = scored_responses(RolloutPair(0, first, None, None), SHOWN, preset)
        rows = response_masks(processor, response, streams)
        assert torch.equal(rows.sum(0), torch.ones(len(first.response_ids)))
        ids = [[i for i, inside in zip(first.response_ids, row.bool().tolist(), strict=True) if inside] for row in rows]
        return [processor.decode(chosen) for chosen in ids]

    own, rest = masks("digits")
    assert own.replace(" ", "") == "3710" and not any(letter.isdigit() for letter in rest)
    assert masks("none")[0] == ""
    for name, words in (
        ("outside", r"gave \(0, \d+\), which is no \(start, end\)"),
        ("turned", r"gave \(3, 1\)"),
        ("broken", r"sample 'p' failed at .*mine.py:11 in broken: AttributeError"),
    ):
        with pytest.raises(RewardError, match=words):
            masks(name)
    with pytest.raises(ValueError, match=r"mine.py:one'.*too many positional.*function of \(text, prompt\)"):
        masks("one")
    with pytest.raises(ValueError, match="there is no"):
        masks("missing")
