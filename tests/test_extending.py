"""The examples of docs/extending.md, as they stand there."""

from __future__ import annotations

import json
import re
import runpy
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from megatron_sr1.config import FAMILIES, ObjectiveConfig, load_config
from megatron_sr1.config.passes import KEYS as PASS_KEYS
from megatron_sr1.config.streams import KEYS
from megatron_sr1.config.templates import KEYS as TEMPLATE_KEYS
from megatron_sr1.data import Quarantine, open_stream
from megatron_sr1.digits.tiny_families import ZOO
from megatron_sr1.objective import OwnLoss, stream_loss
from megatron_sr1.rewards import find_reward, score_group, soft_overlong
from megatron_sr1.streams import PRESETS, preset_from_config, preset_of
from megatron_sr1.streams.spans import own_spans
from megatron_sr1.types import LossInputs, Prompt, Rollout, RolloutGroup, RolloutPair

REPOSITORY = Path(__file__).parent.parent
TEXT = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
EXAMPLES = {
    name: body for body, name in re.findall(r"^```(?:python|yaml)\n(# (\S+)\n.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, body in EXAMPLES.items():
        (tmp_path / name).write_text(body)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def group(*texts: str, description: str | None = "a wide picture") -> RolloutGroup:
    pairs = [
        RolloutPair(index, Rollout("0/p/0/first", (1,), (2,), text, (-0.1,), "stop", 0), None, description)
        for index, text in enumerate(texts)
    ]
    return RolloutGroup(0, Prompt("p", "?", "10", (Image.new("RGB", (40, 20)),)), tuple(pairs))


def scores(name: str, made: RolloutGroup) -> list[float]:
    path = str(Path.cwd() / name)  # a relative path stays the same module for a process, and tests have many folders
    return [vector[path] for vector in score_group(made, [path])]


def test_every_example_is_short_and_there() -> None:
    assert {
        "my_rewards.py",
        "brief.yaml",
        "picture_rewards.py",
        "group_rewards.py",
        "credit.yaml",
        "sufficient.yaml",
        "length_rewards.py",
        "judge_rewards.py",
        "judged.yaml",
        "my_loss.py",
        "layout.yaml",
        "my_spans.py",
        "my_source.py",
        "sources.yaml",
    } == EXAMPLES.keys()
    assert all(len(body.splitlines()) <= 25 for body in EXAMPLES.values())


def test_a_reward() -> None:
    assert scores("my_rewards.py:brevity", group("", "x" * 1000, "x" * 5000)) == [1.0, 0.5, 0.0]


def test_a_reward_that_needs_something() -> None:
    assert scores("picture_rewards.py:shape", group("x")) == [1.0]
    assert scores("picture_rewards.py:shape", group("x", description="a tall picture")) == [0.0]
    assert scores("picture_rewards.py:shape", group("x", description=None)) == [0.0]


def test_a_reward_of_a_whole_group() -> None:
    texts = [rf"\boxed{{{answer}}}" for answer in ("10", "9", "10")]
    assert scores("group_rewards.py:majority", group(*texts, "none")) == [1.0, 0.0, 1.0, 0.0]
    assert scores("group_rewards.py:majority", group("none", "none")) == [0.0, 0.0]


def test_a_judge() -> None:
    config = load_config("judged.yaml", [])
    answer, visual = preset_from_config(config.objective).streams
    assert answer == PRESETS["perception_credit"].streams[0]
    assert (visual.tokens, visual.rewards) == ("description", (("judge_rewards.py:complete", 1.0),))
    assert config.rewards.judge.endpoint.model == "reader"
    path = f"{Path.cwd()}/judge_rewards.py:complete"
    for said, expected in (("Yes.", 1.0), ("no", 0.0)):
        assert score_group(group("x"), [path], ask=lambda question, said=said: said) == [{path: expected}]
    assert score_group(group("x", description=None), [path], ask=str) == [{path: 0.0}]


def test_a_length_penalty() -> None:
    reward = find_reward(f"{Path.cwd()}/length_rewards.py:overlong")
    assert reward.shown == "overlong" and reward.needs == ()
    for length, expected in ((1, 0.0), (1536, 0.0), (1792, -0.5), (2048, -1.0), (3000, -1.0)):
        (pair,) = group("x").pairs
        assert reward.function(replace(pair, first=replace(pair.first, response_ids=(5,) * length)), None) == expected
    for tokens, buffer in ((10, 0), (10, 11), (0, 0)):
        with pytest.raises(ValueError, match="buffer_tokens"):
            soft_overlong(tokens, buffer)


def test_a_preset_with_a_stream_more() -> None:
    preset = preset_from_config(load_config("brief.yaml", []).objective)
    *ours, brief = preset.streams
    assert tuple(ours) == PRESETS["vision_sr1"].streams
    assert (brief.tokens, brief.rewards, brief.loss_weight) == ("think", (("my_rewards.py:brevity", 1.0),), 0.2)


def test_a_segment() -> None:
    path = f"{Path.cwd()}/my_spans.py:numbers"
    config = ObjectiveConfig(streams=[{"name": "digits", "tokens": path, "rewards": {"acc": 1.0}}])
    assert preset_from_config(config).streams[-1].tokens == path
    text = "3 and 17."
    assert [text[slice(*span)] for span in own_spans(path, text, group("x").prompt)] == ["3", "17"]


def test_a_later_pass() -> None:
    preset = preset_from_config(load_config("sufficient.yaml", []).objective)
    assert [(later.name, later.context, later.reader, later.samples) for later in preset.passes.later] == [
        ("second", "description", "policy", 4),
        ("start", "description", "reference", 1),
        ("blind", "nothing", "reference", 1),
    ]
    assert [find_reward(name).later for name, _ in preset.streams[1].rewards] == ["start", "blind", "second"]
    for key in PASS_KEYS:
        assert f"| `{key}` |" in TEXT.partition("## A later pass")[2]


def test_a_list_of_streams() -> None:
    answer, visual = preset_from_config(load_config("credit.yaml", []).objective).streams
    assert (answer.tokens, answer.advantage, answer.kl_coef) == ("rest", "z_score", 0.01)
    assert (visual.tokens, visual.advantage, visual.kl_coef) == ("description", "leave_one_out", 0.0)


def test_a_template() -> None:
    preset = preset_of(load_config("layout.yaml", []))
    turn = preset.asked.first.render("How many?", 1)
    assert (turn.before, turn.system) == ("How many?\n", "You look before you speak.")
    assert turn.after.startswith("\nWrite <caption> what") and turn.after.endswith("</answer>.")
    text = "<caption> a 3 and a 7 </caption>\n<think> 3 + 7 </think>\n<answer> 10 </answer>"
    assert preset.asked.first.find_description(text) == "a 3 and a 7"
    made = group(text)
    assert score_group(made, ["acc", "fmt"], asked=preset.asked) == [{"acc": 1.0, "fmt": 1.0}]
    assert preset.asked.plain.user_text("q", 0).startswith("q Write <think>")
    assert preset.asked.second.user_text("q", 0, "d").startswith("Description of the image: d\n\nq\n\n")
    assert [stream.tokens for stream in preset.streams] == ["reasoning", "caption"]


def test_the_table_has_every_key_of_a_template() -> None:
    table = TEXT[TEXT.index("| `prompt` |") : TEXT.index("Ours are `see_think`")]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(TEMPLATE_KEYS)


def test_a_loss() -> None:
    """On-policy and without a KL term its gradient is ours."""
    found = {}
    streams = tuple(replace(stream, kl_coef=0.0) for stream in PRESETS["vision_sr1"].streams)
    for name, loss in (("ours", stream_loss), ("theirs", OwnLoss(f"{Path.cwd()}/my_loss.py:reinforce"))):
        trainer = torch.linspace(-2, -1, 5, requires_grad=True)
        weights = torch.tensor([[0.5, 0.5, 0, 0, 0], [0, 0, 0.2, 0.3, 0.5]])
        inputs = LossInputs(trainer, None, None, torch.linspace(-1, 1, 10).view(2, 5), weights, streams)
        value, metrics = loss(inputs)
        value.backward()
        found[name] = (trainer.grad, {"loss/answer/policy", "loss/visual/policy"} - metrics.keys())
    torch.testing.assert_close(found["theirs"][0], found["ours"][0])
    assert not found["theirs"][1]


def test_the_table_has_every_key_of_a_stream() -> None:
    section = TEXT.partition("## A list of streams")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(KEYS) - {"enabled"}


def test_a_data_source(folder: Path) -> None:
    """The script's shards, a Parquet file and a split, mixed as the configuration says."""
    (folder / "pictures").mkdir()
    for number in (2, 3):
        Image.new("RGB", (30, 20), (number, 0, 0)).save(folder / "pictures" / f"{number}-apples.png")
    runpy.run_path("my_source.py", run_name="__main__")
    rows = pyarrow.Table.from_pylist([{"question": "one?", "solution": 1}])
    for name in ("more", "path/to/dataset/train", "path/to/dataset/test"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(rows, folder / f"{name}.parquet")
    data = replace(load_config("sources.yaml", []).data, cache_dir=str(folder / "cache"))
    stream = open_stream(data, "train", 1, Quarantine(0), None)
    asked = {sample.key: sample for sample in stream.take(0, 40)}
    assert sorted(asked) == ["2-apples", "3-apples", "more-00000000", "train-00000000"]
    assert (asked["3-apples"].problem, asked["3-apples"].answer) == ("How many apples are there?", "3")
    assert asked["3-apples"].images[0].getpixel((0, 0)) == (3, 0, 0) and asked["more-00000000"].answer == "1"


# ---------------------------------------------------------------- a model family
FAMILY = TEXT.partition("## Add a model family\n")[2]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in FAMILY.splitlines() if line.startswith("| ")]
ALWAYS = ("megatron_sr1/policy/read.py", "megatron_sr1/digits/tiny_families.py")  # beside the lists of tests


def _paths(text: str) -> list[str]:
    return re.findall(r"`((?:megatron_sr1|tests|examples|docs)/[^`]*|[A-Z]+\.md)`", text)


def test_every_file_and_test_of_the_way_to_a_family_is_there() -> None:
    paths = _paths(FAMILY)
    assert len(paths) > 30 and len(set(paths)) > 30
    for path in paths:
        file, _, test = path.partition("::")
        assert (REPOSITORY / file).exists(), path
        if test:
            assert re.search(rf"^def {test}\(", (REPOSITORY / file).read_text(encoding="utf-8"), re.MULTILINE), path
    steps = [[int(row[0]) for row in ROWS if len(row) == width and row[0].isdigit()] for width in (3, 4)]
    assert steps[0] == list(range(1, 11)) and set(steps[1]) < set(steps[0]) and steps[1] == sorted(steps[1])
    keys = re.findall(r"`(_?[A-Z]+)`", FAMILY)
    files = {path.partition("::")[0] for path in paths}
    sources = "".join((REPOSITORY / file).read_text(encoding="utf-8") for file in files if file.endswith(".py"))
    assert {"FAMILIES", "_CLASSES", "ZOO", "_ENGINE", "STATES", "SYNCS"} == set(keys)
    assert all(re.search(rf"^{key}\b.* = ", sources, re.MULTILINE) for key in keys)


def _is_named(family: str, class_name: str, text: str) -> bool:
    """Quoted, as an entry of a list; a tied and an untied one are of one family."""
    return re.search(rf"\"{family}(_tied|_untied)?\"|:{class_name}\"", text) is not None


def test_every_family_is_where_the_page_says() -> None:
    lists = [_paths(row[1])[0].partition("::")[0] for row in ROWS if len(row) == 4 and row[3] == "yes"]
    assert len(lists) == 9
    for class_name, family in FAMILIES.items():
        for file in (*ALWAYS, *lists):
            text = (REPOSITORY / file).read_text(encoding="utf-8")
            assert _is_named(family.name, class_name, text), f"{family.name} is not named in {file}"
        assert class_name in {entry.class_name for entry in ZOO.values()}
        assert f"`{class_name}`" in (REPOSITORY / "README.md").read_text(encoding="utf-8")
        models = REPOSITORY.glob("examples/models/*/config.json")
        assert any(json.loads(path.read_text())["architectures"] == [class_name] for path in models), class_name
    assert not _is_named("qwen3_vl", "Qwen3VLForConditionalGeneration", 'a = ["qwen3_vl_moe"]'), "a prefix is no name"
