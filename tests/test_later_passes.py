"""Passes that follow the first: what they are asked and by whom they are read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sr1.cli.arguments import parse, sources
from megatron_sr1.config import ConfigError, JudgeConfig, ObjectiveConfig, RewardsConfig, load_config
from megatron_sr1.ranks import ALONE
from megatron_sr1.rewards import score_group
from megatron_sr1.rollout.request import Generation
from megatron_sr1.streams import check_objective
from megatron_sr1.training.rollout_files import rollouts_file
from megatron_sr1.training.rollout_reader import read_rollouts
from megatron_sr1.training.step_rewards import scored_rewards
from megatron_sr1.types import LaterPass, Passes, Question, RolloutGroup
from tests.pass_cases import BLIND, OTHERS, live, preset, right, shown
from tests.scripted_engine import IMAGE, SEEN, ScriptedEngine, dealt, generator, planner, prompt, sampling, whole
from tests.step_cases import Listed
from tests.thread_ranks import Meeting


# ---------------------------------------------------------------- the configuration
@pytest.mark.parametrize(
    ("passes", "words"),
    [
        ("[{context: nothing}]", r"objective.passes\[0\].name=None"),
        ("[{name: first}]", r"passes\[0\].name='first'.*not first"),
        ("[{name: a b}]", r"passes\[0\].name='a b'"),
        ("[{name: 2nd, context: nothing}]", r"passes\[0\].name='2nd'.*begins with a letter"),
        ("[{name: a, context: nothing}, {name: a, context: nothing}]", r"passes\[1\].name='a'.*no other pass"),
        ("[{name: a, contxt: nothing}]", r"\(a\).contxt is no key of a pass. Did you mean 'context'"),
        ("[{name: a, context: image}]", r"\(a\).context='image'.*description, other_description, metadata, nothing"),
        ("[{name: a, reader: judge}]", r"\(a\).reader='judge'.*policy, reference, endpoint"),
        ("[{name: a, samples: 0}]", r"\(a\).samples=0"),
        ("[{name: a, samples: true}]", r"\(a\).samples=True"),
        ("[{name: a, samples: 65}]", r"\(a\).samples=65"),
        ("[{name: a, context: metadata}]", r"\(a\).field=None.*where context is metadata"),
        ("[{name: a, context: nothing, field: facts}]", r"\(a\).field='facts'"),
        ("[{name: a, question: ''}]", r"\(a\).question=''"),
        ("[{name: second, reader: reference}]", r"\(second\).reader='reference'.*another name"),
        ("[{name: a, enabled: 1}]", r"\(a\).enabled=1"),
        ("[a]", r"objective.passes\[0\]='a'"),
    ],
)
def test_a_slip_in_a_pass_is_named_with_its_place(passes: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(None, [f"objective.passes={passes}"])


@pytest.mark.parametrize(
    ("passes", "streams", "more", "words"),
    [
        ([{"name": "blind", "enabled": False}], [], {}, "no pass 'blind' to take away"),
        ([], [{"name": "v", "pass": "blind", "rewards": {"acc": 1}}], {}, "pass='blind' is no pass of the run.*second"),
        ([{"name": "second", "enabled": False}], [], {}, "pass='second' is no pass of the run, which has first"),
        ([], [{"name": "v", "rewards": {"acc_vis@blind": 1}}], {}, "'acc_vis@blind' is of the pass 'blind', which is"),
        (
            [],
            [{"name": "v", "rewards": {"acc@second": 1}}],
            {},
            "'acc' is of the first pass. Only rewards of the second",
        ),
        ([], [{"name": "v", "rewards": {"acc_vis@second": 1}}], {}, "leave @second out"),
        (
            [{"name": "a", "context": "nothing"}, {"name": "b", "context": "nothing"}],
            [{"name": "v", "rewards": {"acc_vis@a@b": 1}}],
            {},
            "leave @b out",
        ),
        (
            [{"name": "a", "context": "nothing"}],
            [{"name": "v", "rewards": {"acc_judge@a": 1}}],
            {},
            "asks the endpoint about a text, and the pass 'a' reads none",
        ),
        ([], [{"name": "v", "tokens": "rest", "rewards": {"acc": 1}}], {}, "nothing is left for tokens=rest"),
        ([{"name": "a"}], [], {"preset": "vision_r1"}, "'a' reads a description, and the template 'cot' asks for none"),
        (
            [{"name": "start", "reader": "reference"}],
            [{"name": "v", "pass": "start", "rewards": {"acc_vis@start": 1}}],
            {},
            "read by reader=reference, and only what the policy writes.*acc_vis@start",
        ),
        (
            [{"name": "big", "reader": "endpoint"}],
            [{"name": "v", "rewards": {"acc_judge@big": 1}}],
            {},
            "asks the endpoint about a pass that it answers. Use acc_vis@big",
        ),
    ],
)
def test_passes_streams_and_rewards_must_agree(passes: Any, streams: Any, more: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        preset(*passes, streams=streams, **more)


def test_no_reward_is_shown_as_the_measure_of_a_pass(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from megatron_sr1.rewards import Reward\nf = Reward(lambda pair, prompt: 1.0, shown='acc_vis.a')\n"
    )
    mine = {"name": "v", "rewards": {f"{tmp_path}/mine.py:f": 1}}
    with pytest.raises(ValueError, match=r"are both shown as 'acc_vis.a'"):
        preset({"name": "a", "context": "nothing"}, streams=[mine])


def test_the_paper_s_graph_is_the_default_and_what_is_written_joins_it() -> None:
    assert [later.name for later in preset().passes.later] == ["second"]
    assert preset(preset="vision_r1").passes.later == ()
    found = preset({"name": "blind", "context": "nothing"}, {"name": "second", "samples": 3}).passes.later
    assert [(one.name, one.samples) for one in found] == [("second", 3), ("blind", 1)]
    alone = preset({"name": "second", "enabled": False}, {"name": "blind", "context": "nothing"}, preset="see_think")
    assert alone.passes.later == (BLIND,) and not alone.second_pass
    assert preset({"name": "blind", "context": "nothing"}, preset="vision_r1").passes.later == (BLIND,)
    assert preset({"name": "second", "enabled": False}, preset="see_think").passes.later == ()


def test_what_a_pass_is_read_by_must_be_there() -> None:
    objective = ObjectiveConfig(passes=[{"name": "big", "reader": "endpoint"}])
    with pytest.raises(ConfigError, match=r"rewards.judge.url=''.*the pass 'big' asks"):
        check_objective(objective, RewardsConfig())
    check_objective(objective, RewardsConfig(judge=JudgeConfig(url="http://127.0.0.1:1/v1", model="m")))
    objective = ObjectiveConfig(passes=[{"name": "start", "reader": "reference"}])
    with pytest.raises(ConfigError, match=r"model.megatron_dir='there'.*'start' is read by the starting weights"):
        check_objective(objective, RewardsConfig(), "there")


# ---------------------------------------------------------------- what is asked
def test_every_context_is_what_its_name_says() -> None:
    later = (
        LaterPass("second", samples=2),
        LaterPass("gold", "metadata", field="facts"),
        BLIND,
        LaterPass("more", question="others", samples=3),
    )
    engine, prompts = ScriptedEngine(), [shown("a", b"1", facts=["3", "7"], others=OTHERS)]
    (group,) = generator(engine).generate(whole(prompts), sampling(later=later), 4)
    asked = {name.split("/", 2)[2]: text for name, text in engine.prompts.items() if name.startswith("0/1/")}
    assert set(asked) == {"first", "second", "second.1", "gold", "blind", "more", "more.1", "more.2"}
    assert asked["second"] == asked["second.1"] and "Description of the image: a 0/1/first\n" in asked["second"]
    assert "Description of the image: 3, 7\n\nHow many?" in asked["gold"]
    assert asked["blind"].startswith("How many?") and "image" not in asked["blind"]
    assert "a 0/1/first\n\nHow many are red?" in asked["more"] and "a 0/1/first\n\nWhich?" in asked["more.1"]
    assert asked["more.2"] == asked["more"], "the questions begin again"
    assert all(chr(IMAGE) not in text for name, text in asked.items() if name != "first")
    assert len({engine.draws[f"0/1/{name}"].seed for name in asked}) == len(asked), "each is drawn by itself"
    pair = group.pairs[1]
    assert pair.second is pair.readings("second")[0].rollout and pair.readings("second")[0].context == "a 0/1/first"
    found = [(reading.pass_name, reading.number) for reading in pair.further]
    assert found == [("second", 1), ("gold", 0), ("blind", 0), ("more", 0), ("more", 1), ("more", 2)]
    assert [reading.rollout.rollout_id for reading in pair.readings("more")] == [
        f"4/a/1/{name}" for name in ("more", "more.1", "more.2")
    ]
    assert pair.readings("more")[1].question == Question("Which?", "B", ("x", "y"))
    assert pair.readings("blind")[0].context is None and pair.readings("blind")[0].question is None
    assert {name: len(rollouts) for name, rollouts in pair.rollouts().items()} == {
        "first": 1, "second": 2, "gold": 1, "blind": 1, "more": 3,
    }  # fmt: skip


def test_a_pass_that_needs_no_description_is_asked_where_there_is_none() -> None:
    engine = ScriptedEngine(answer=lambda request_id: "\\boxed{1}")
    later = (LaterPass("second"), BLIND)
    groups = generator(engine).generate(whole([prompt("a"), prompt("t", num_images=0)]), sampling(later=later), 0)
    assert [[bool(pair.readings(name)) for name in ("second", "blind")] for pair in groups[0].pairs] == [
        [False, True]
    ] * 2
    assert not any(pair.further for pair in groups[1].pairs), "without an image there is the plain pass alone"


@pytest.mark.parametrize("streamed", [True, False])
def test_another_image_s_description_comes_from_the_next_prompt_that_shows_another(streamed: bool) -> None:
    """Whoever was quicker; a second question about the same image lends nothing."""
    later = (LaterPass("second"), LaterPass("other", "other_description"))
    prompts = [shown("a", b"1"), shown("b", b"1"), shown("c", b"2"), shown("d", b"3")]
    engine = ScriptedEngine(
        answer=lambda request_id: "\\boxed{1}" if request_id == "2/0/first" else SEEN.format(request_id)
    )
    groups = generator(engine, streamed=streamed).generate(whole(prompts), sampling(later=later), 0)
    lent = [[pair.readings("other")[0].context for pair in group.pairs] for group in groups]
    assert lent == [
        ["a 3/0/first", "a 2/1/first"],
        ["a 3/0/first", "a 2/1/first"],
        ["a 3/0/first", "a 3/1/first"],
        ["a 0/0/first", "a 0/1/first"],
    ]
    assert "How many?" in engine.prompts["0/0/other"]
    alone = generator(ScriptedEngine()).generate(whole(prompts[:2]), sampling(later=later), 0)
    assert all(not pair.readings("other") and pair.second is not None for group in alone for pair in group.pairs)


def test_who_lends_a_description_does_not_depend_on_the_engines() -> None:
    later = (LaterPass("other", "other_description"),)
    prompts = [shown(name, name.encode()) for name in "abcd"]

    def lent(ranks: Any) -> list[list[str | None]]:
        groups = generator(ScriptedEngine(lambda request_id: SEEN.format(f"{request_id} x")), engines=ranks).generate(
            dealt(prompts, sampling(later=later), ranks), sampling(later=later), 0
        )
        held = ranks.gather(groups)
        held.sort(key=lambda group: group.group_id)
        return [[pair.readings("other")[0].context for pair in group.pairs] for group in held]

    (alone,) = (lent(ALONE),)
    assert alone[3] == ["a 0/0/first x", "a 0/1/first x"]
    for number in (2, 4):
        meeting = Meeting(number)
        with ThreadPoolExecutor(number) as pool:
            assert (
                list(pool.map(lambda rank, meeting=meeting: lent(meeting.of(rank)), range(number))) == [alone] * number
            )


def test_a_description_is_found_where_no_later_pass_reads_it() -> None:
    (group,) = generator(ScriptedEngine()).generate(whole([prompt("a")]), sampling(later=(BLIND,)), 0)
    assert [pair.description for pair in group.pairs] == ["a 0/0/first", "a 0/1/first"]
    assert score_group(group, ["leak"])[0]["leak"] in (0.0, 1.0) and group.pairs[0].second is None


def test_a_text_of_the_metadata_is_read_whole_or_refused() -> None:
    later = (LaterPass("gold", "metadata", field="facts"),)
    with pytest.raises(ValueError, match=r"sample 'a': the metadata's 'facts'.*rollout.max_description_tokens=50"):
        generator(ScriptedEngine()).generate(whole([shown("a", b"1", facts="x" * 51)]), sampling(later=later), 0)


@pytest.mark.parametrize(
    ("later", "metadata", "words"),
    [
        (LaterPass("gold", "metadata", field="facts"), {}, "'gold' reads the metadata's 'facts', which is None"),
        (LaterPass("gold", "metadata", field="facts"), {"facts": [3]}, r"which is \[3\]"),
        (LaterPass("gold", "metadata", field="facts"), {"facts": " "}, "which is ' '"),
        (LaterPass("more", question="others"), {}, "'more' asks the metadata's 'others', which is None"),
        (LaterPass("more", question="others"), {"others": [{"problem": "?"}]}, "problem: ..., answer"),
        (LaterPass("more", question="others"), {"others": [{**OTHERS[0], "choices": 3}]}, "problem: ..., answer"),
    ],
)
def test_a_sample_without_what_a_pass_reads_is_refused_before_anything_is_asked(
    later: LaterPass, metadata: Any, words: str
) -> None:
    engine = ScriptedEngine()
    with pytest.raises(ValueError, match=f"sample 'a': the pass .*{words}"):
        generator(engine).generate(whole([shown("a", b"1", **metadata)]), sampling(later=(later,)), 0)
    assert not engine.prompts


def test_a_pass_that_cannot_fit_is_refused_at_once() -> None:
    long = {"others": [{"problem": "x" * 300, "answer": "1"}]}
    later = (LaterPass("more", question="others"),)
    (text,) = planner(400).refusals(shown("a", b"1", **long), Passes("see_think", later))
    assert "sample 'a', more pass" in text


# ---------------------------------------------------------------- who reads
def test_the_starting_weights_read_when_the_policy_has_written_and_leave_again() -> None:
    later = (LaterPass("second"), LaterPass("start", reader="reference"))
    engine, handed = ScriptedEngine(), []
    policy = generator(engine, weights=lambda: {"policy": 9}.items(), start_weights=lambda: {"start": 0}.items())

    def take(group: RolloutGroup) -> None:
        handed.append(group.group_id)

    for step in range(2):
        groups = policy.generate(whole([prompt("a")]), sampling(later=later), step, take)
    (pair, _) = groups[0].pairs
    assert [pair.first.weight_version, pair.readings("start")[0].rollout.weight_version] == [9, 0]
    at = engine.log.index("weights {'start': 0}")
    assert not any("start" in line for line in engine.log[:at]) and "end 0/1/second" in engine.log[:at]
    back = engine.log.index("weights {'policy': 9}")
    assert at < engine.log.index("end 0/1/start") < back < engine.log.index("add 0/0/first", back)
    assert handed == [0, 0] and engine.log.count("weights {'policy': 9}") == 1
    policy.update_weights({"new": 1}.items(), 10)
    policy.generate(whole([prompt("a")]), sampling(later=later), 2)
    assert engine.log.count("weights {'policy': 9}") == 1, "new weights came in between"
    alone = ScriptedEngine()
    (group,) = generator(alone).generate(whole([prompt("a")]), sampling(later=later), 0)
    assert group.pairs[0].readings("start") and not any("weights" in line for line in alone.log)


def test_an_evaluation_has_its_own_weights_beside_those_of_the_start(tmp_path: Path) -> None:
    """Of a finished run: its export is evaluated, and read by what the run began with."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "config.yaml").write_text("model: {hf_dir: begun/with}\n")
    _, words = sources(parse(["evaluate", str(tmp_path)]))
    assert {"objective.reference_dir=begun/with", f"model.hf_dir={tmp_path / 'hf'}"} < set(words)
    (tmp_path / "config.yaml").write_text("model: {hf_dir: x}\nobjective: {reference_dir: named}\n")
    assert "objective.reference_dir=named" in sources(parse(["evaluate", str(tmp_path)]))[1]


def test_an_engine_that_fails_under_the_starting_weights_gets_them_again() -> None:
    class Failing(ScriptedEngine):
        fails = True

        def step(self) -> list[Generation]:
            if self.weight_version == 0 and self.fails:
                self.fails = False
                raise RuntimeError("out of memory")
            return super().step()

    later = (LaterPass("start", reader="reference"),)
    engine = Failing()
    ours = generator(engine, weights=lambda: {"policy": 9}.items(), start_weights=lambda: {"start": 0}.items())
    (group,) = ours.generate(whole([prompt("a")]), sampling(later=later), 0)
    assert all(pair.readings("start")[0].rollout.weight_version == 0 for pair in group.pairs)
    assert [line for line in engine.log if "weights" in line or line == "restart"] == [
        "weights {'start': 0}", "restart", "weights {'start': 0}"
    ]  # fmt: skip


def test_an_endpoint_reads_while_the_engine_decodes_and_its_answers_are_kept(tmp_path: Path) -> None:
    objective, prompts, taken, metrics = live(tmp_path, right)
    groups, rewards = taken.groups, taken.ledger.rollout_rewards
    assert rewards["acc_vis@big"].tolist() == [1.0, 0.0, 0.0, 0.0]
    reading = groups[0].pairs[0].readings("big")[0]
    assert (reading.rollout.response_text, reading.context) == (r"\boxed{1}", "a 0/0/first")
    assert reading.rollout.response_ids == () and reading.rollout.rollout_id == "0/a/0/big"
    assert metrics["reward/acc_vis.big"] == 0.25 and metrics["big/missing"] == metrics["second/missing"] == 0.0
    assert "big/response_tokens" not in metrics and metrics["second/response_tokens"] == 3
    again = read_rollouts(
        rollouts_file(tmp_path, 0),
        lambda further: Listed(prompts),
        2,
        scored_rewards(objective),
        later=objective.passes.later,
    )
    assert again.groups == groups
    for name in scored_rewards(objective):
        assert torch.equal(torch.cat([each[name] for each in again.rewards]), rewards[name])
    assert rewards["acc_vis"].shape == (4, 2)


def test_an_endpoint_that_is_gone_ends_the_step_and_is_never_a_zero(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"the pass 'big' of '0/.*' was not answered by its endpoint: 2 attempts failed"
    ):
        live(tmp_path, lambda question, attempt: "500")
    _, _, taken, metrics = live(
        tmp_path,
        lambda question, attempt: "400" if "a 1/1/first" in question else right(question, attempt),
        "skip_group",
    )
    assert [group.group_id for group in taken.groups] == [0] and metrics["groups/skipped"] == 1
    assert taken.ledger.rollout_rewards["acc_vis@big"].tolist() == [1.0, 0.0]
