"""Rewards of a user's own, by import path: what is taken, what is refused, and what is said when one fails."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from megatron_sr1.config import ConfigError, ObjectiveConfig
from megatron_sr1.import_path import keep_code, load_object
from megatron_sr1.rewards import (
    REWARDS,
    Reward,
    RewardError,
    Ungraded,
    find_reward,
    for_prompt,
    own_rewards,
    score_group,
)
from megatron_sr1.rewards.workers import Graders
from megatron_sr1.streams import own_code
from megatron_sr1.types import Prompt, Rollout, RolloutGroup, RolloutPair

IMAGE = Image.new("RGB", (30, 20), (255, 0, 0))


def rollout(text: str, name: str = "first") -> Rollout:
    return Rollout(f"0/p/0/{name}", (1, 2), (3, 4), text, (-0.5, -0.5), "stop", 0)


def group(*texts: str, described: bool = True, metadata: dict[str, object] | None = None) -> RolloutGroup:
    """One sample for each text; the last has no second pass."""
    pairs = tuple(
        RolloutPair(index, rollout(text), rollout("s", "second") if described and index < len(texts) - 1 else None, "d")
        for index, text in enumerate(texts)
    )
    return RolloutGroup(0, Prompt("p7", "?", "1", (IMAGE,), metadata=metadata or {}), pairs)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """Where a test writes its module; no other test has this path."""
    return tmp_path / "mine.py"


def write(file: Path, text: str, name: str = "f") -> str:
    file.write_text(text)
    return f"{file}:{name}"


# ---------------------------------------------------------------- what is taken
@pytest.mark.parametrize(
    ("text", "needs"),
    [
        ("def f(pair, prompt):\n    return len(pair.first.response_text)", ("images",)),
        ("def f(pair, prompt, scale=1):\n    return scale * len(pair.first.response_text)", ("images",)),
        ("f = lambda *given: len(given[0].first.response_text)", ("images",)),
        (
            "class C:\n    def __call__(self, pair, prompt):\n        return len(pair.first.response_text)\nf = C()",
            ("images",),
        ),
        ("def f(group):\n    return [len(pair.first.response_text) for pair in group.pairs]", ("images", "group")),
        ("import numpy as np\ndef f(group):\n    return np.array([1, 2, 3])", ("images", "group")),
        ("def f(group):\n    return (n for n in (1, 2, 3))", ("images", "group")),
        (
            "from megatron_sr1.rewards import Reward\nf = Reward(lambda pair, prompt: len(pair.first.response_text))",
            (),
        ),
    ],
)
def test_functions_of_pairs_and_of_groups(file: Path, text: str, needs: tuple[str, ...]) -> None:
    name = write(file, text)
    assert find_reward(name).needs == needs
    assert score_group(group("a", "bb", "ccc"), [name]) == [{name: 1.0}, {name: 2.0}, {name: 3.0}]


def test_a_file_may_import_what_lies_beside_it_and_is_loaded_once(file: Path) -> None:
    beside = file.parent / f"beside_{file.parent.name}.py"
    beside.write_text("value = 0.25")
    name = write(
        file,
        f"import {beside.stem} as beside\nseen = []\ndef f(pair, prompt):\n    seen.append(1)\n    return beside.value",
    )
    assert score_group(group("a", "b"), [name]) == [{name: 0.25}] * 2
    assert load_object(f"{file}:seen", "x") == [1, 1]
    part = load_object(f"{file}:f.__name__", "x")
    assert part == "f"


def test_a_module_by_its_dotted_name() -> None:
    name = "megatron_sr1.rewards.components:leak"
    assert score_group(group("a"), [name]) == [{name: 0.0}]
    assert find_reward(name).shown == "megatron_sr1.rewards.leak"


def test_a_name_of_ours_is_shown_with_its_file(file: Path) -> None:
    name = write(file, "def acc(pair, prompt):\n    return 1.0", "acc")
    assert find_reward(name).shown == "mine.acc" and find_reward("acc").shown == "acc"


def test_the_second_pass_and_the_description_are_there_where_they_are_needed(file: Path) -> None:
    lines = [
        "from megatron_sr1.rewards import Reward",
        "second = Reward(lambda pair, prompt: len(pair.second.response_text), of_pass='second', shown='a')",
        "whole = Reward(lambda group: [1] * len(group.pairs), of_pass='second', needs=('group',), shown='b')",
        "described = Reward(lambda pair, prompt: len(pair.description), needs=('description',), shown='c')",
    ]
    file.write_text("\n".join(lines))
    names = [f"{file}:{name}" for name in ("second", "whole", "described")]
    assert [list(vector.values()) for vector in score_group(group("x", "y"), names)] == [[1, 1, 1], [0, 0, 1]]


def test_images_and_metadata_come_to_the_grading_process(file: Path) -> None:
    lines = [
        "from megatron_sr1.rewards import Reward",
        "def red(pair, prompt):",
        "    return prompt.images[0].getpixel((0, 0))[0] + prompt.metadata['n']",
        "blind = Reward(lambda pair, prompt: len(prompt.images), needs=('metadata',), shown='blind')",
    ]
    file.write_text("\n".join(lines))
    asked = group("x", metadata={"n": 7})
    for names, expected in (([f"{file}:blind"], [0.0]), ([f"{file}:red", f"{file}:blind"], [262.0, 1.0])):
        with closing(Graders(names, num_workers=1)) as graders:
            graders.submit(asked)
            ((_, vectors),) = graders.collect()
        assert [list(vector.values()) for vector in vectors] == [expected], names
    with pytest.raises(RewardError, match="needs metadata, and sample 'p7' has none"):
        score_group(group("x"), [f"{file}:blind"])


def test_our_table_says_what_stands_in_where_a_prompt_has_no_images() -> None:
    assert for_prompt(["fmt", "a.py:f", "acc"], True) == ("fmt", "a.py:f", "acc")
    assert for_prompt(["fmt", "a.py:f", "fmt_cot"], False) == ("fmt_cot", "a.py:f")
    assert own_rewards(True) == ("acc", "acc_vis", "fmt", "fmt_vis", "leak") and own_rewards(False) == (
        "acc",
        "fmt_cot",
    )
    second = {name for name, reward in REWARDS.items() if reward.of_pass == "second"}
    assert second == {"acc_vis", "fmt_vis", "acc_judge"}, "what a leak takes away"


# ---------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("acuracy", "unknown reward 'acuracy': ours are acc, acc_vis"),
        ("fmt_viz", "Did you mean 'fmt_vis'"),
        ("nowhere.py:f", "there is no file '.*nowhere.py'"),
        ("no_such_module.part:f", "no module 'no_such_module.part'"),
        ("megatron_sr1.rewards:nothing", "there is no 'nothing' in megatron_sr1.rewards. It has ALWAYS"),
        ("megatron_sr1.rewards:", "is no import path"),
        (":f", "is no import path"),
        ("../x:f", "neither a module nor a .py file"),
        ("os:getcwd", "takes"),
        ("math:pi", "a reward is a function of"),
        ("builtins:dict", "a reward is a function of"),
    ],
)
def test_what_is_no_reward_is_named(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find_reward(name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def f(:", r"the import of '.*mine.py' failed at .*mine.py:1: SyntaxError"),
        ("import no_such_thing", r"at .*mine.py:1 in <module>: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("x = 1\ny = x / 0", r"at .*mine.py:2 in <module>: ZeroDivisionError"),
        ("import sys\nsys.exit(3)", r"at .*mine.py:2 in <module>: SystemExit: 3"),
        ("async def f(pair, prompt):\n    return 1", "a reward is a function of"),
        ("def f(pair, prompt, more):\n    return 1", r"takes \(pair, prompt, more\)"),
        ("def f():\n    return 1", r"takes \(\)"),
        ("def f(*, pair, prompt):\n    return 1", "takes"),
        ("class f:\n    pass", "a reward is a function of"),
        (
            "from megatron_sr1.rewards import Reward\nf = Reward(lambda group: [1])",
            r"takes 1 arguments, but with needs=\(\) it is given 2",
        ),
        (
            "from megatron_sr1.rewards import Reward\nf = Reward(lambda pair, prompt: 1, needs=('group',))",
            "takes 2 arguments, but with needs=.*it is given 1",
        ),
        ("from megatron_sr1.rewards import Reward\nf = Reward(lambda p, q: 1, shown='acc')", "shown as 'acc'"),
        ("from megatron_sr1.rewards import Reward\nf = Reward(lambda p, q: 1, shown='a/b')", "shown as 'a/b'"),
        ("from megatron_sr1.rewards import Reward\nf = Reward(lambda p, q: 1, of_pass='third')", "of_pass=.*third"),
        ("from megatron_sr1.rewards import Reward\nf = Reward(lambda p, q: 1, needs='images')", "needs='images'"),
    ],
)
def test_a_file_without_a_reward_is_refused_with_its_line(file: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find_reward(write(file, text))


# ---------------------------------------------------------------- what fails
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return pair.first.nothing", r"failed on response 0 to sample 'p7' at .*mine.py:2 in f: AttributeError"),
        ("import json; return json.loads('{')", r"at .*mine.py:2 in f: JSONDecodeError"),
        ("raise SystemExit", r"at .*mine.py:2 in f: SystemExit"),
        ("return None", "gave None for response 0 to sample 'p7': it must be a number"),
        ("return '1.0'", "gave '1.0' .*: it must be a finite number"),
        ("return bytearray(b'1.0')", "gave bytearray.*: it must be a finite number"),
        ("return 10**400", "gave 1000.*: it must be a number"),
        ("return -1e300", r"gave -1e\+300 for response 0 to sample 'p7'.* none beyond 1e\+09"),
        ("return float('nan')", "gave nan"),
        ("return [1.0]", r"gave \[1.0\]"),
    ],
)
def test_a_reward_that_fails_is_named_with_its_line_and_sample(file: Path, body: str, words: str) -> None:
    with pytest.raises(RewardError, match=words):
        score_group(group("x"), [write(file, f"def f(pair, prompt):\n    {body}")])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[1.0]", "gave 1 numbers for the 2 responses to sample 'p7'"),
        ("[1.0, 2.0, 3.0]", "gave 3 numbers for the 2"),
        ("'ab'", "it must be a list of numbers"),
        ("{'a': 1, 'b': 2}", "it must be a list of numbers"),
        ("{1.0, 2.0}", "it must be a list of numbers"),
        ("3.0", "gave no list for sample 'p7'.*TypeError"),
        ("[1.0, float('inf')]", "gave inf for response 1"),
        ("1 / 0", r"failed on sample 'p7' at .*mine.py:2 in f: ZeroDivisionError"),
    ],
)
def test_a_group_s_reward_must_give_a_number_for_each(file: Path, value: str, words: str) -> None:
    with pytest.raises(RewardError, match=words):
        score_group(group("x", "y"), [write(file, f"def f(group):\n    return {value}")])


def test_graders_give_the_reason_and_go_on(file: Path) -> None:
    """An exception, a process that ends, and one that does not end."""
    lines = [
        "import os, time",
        "def f(pair, prompt):",
        "    text = pair.first.response_text",
        "    if text == 'raise': raise KeyError('seen')",
        "    if text == 'die': os._exit(1)",
        "    if text == 'hang': time.sleep(600)",
        "    if text == 'interrupt': raise KeyboardInterrupt",
        "    return 0.5",
    ]
    name = write(file, "\n".join(lines))
    with closing(Graders([name], 1.0, num_workers=1)) as graders:
        for number, text in enumerate(("raise", "fine", "die", "hang", "fine", "interrupt")):
            made = group(text)
            graders.submit(RolloutGroup(number, made.prompt, made.pairs))
        graded = dict(graders.collect())
    assert isinstance(graded[0], Ungraded) and f"{file}:4 in f: KeyError: 'seen'" in graded[0].reason
    assert graded[1] == graded[4] == [{name: 0.5}]
    assert isinstance(graded[5], Ungraded) and "interrupted its process on sample 'p7'" in graded[5].reason
    for number in (2, 3):
        assert isinstance(graded[number], Ungraded) and "sample 'p7' ended 2 grading processes" in graded[number].reason
        assert "rewards.seconds=1 " in graded[number].reason


# ---------------------------------------------------------------- what is kept
def test_every_version_of_the_code_is_kept_and_a_change_is_told(file: Path) -> None:
    """Of rewards, and of a loss, which may be the same function for all it matters here."""
    name = write(file, "def f(pair, prompt):\n    return 1.0")
    stream = {"name": "a", "rewards": {"acc": 1.0, name: 0.5}}
    objective = ObjectiveConfig(preset=None, streams=[stream], loss=f"{file}:f")
    assert own_code(objective).keys() == {name} and own_code(ObjectiveConfig()) == {}
    folder = file.parent / "run" / "code"
    code = own_code(objective)
    assert keep_code(folder, code) == [] == keep_code(folder, code)
    file.write_text("def f(pair, prompt):\n    return 2.0")
    assert keep_code(folder, code) == [name] and keep_code(folder, code) == []
    assert sorted(path.read_text()[-3:] for path in folder.glob("mine_*.py")) == ["1.0", "2.0"]
    assert keep_code(file.parent / "other", {}) == [] and not (file.parent / "other").exists()
    with pytest.raises(ConfigError, match=r"objective\.loss='math:pi' is not allowed: it must be a function"):
        own_code(ObjectiveConfig(loss="math:pi"))


def test_rewards_are_numbers_of_any_size() -> None:
    reward = Reward(lambda pair, prompt: -math.pi, shown="pi")
    assert reward.shown == "pi" and reward.function(None, None) == -math.pi


# ---------------------------------------------------------------- what lies beside
def test_two_modules_of_one_name_beside_two_files_are_refused(tmp_path: Path) -> None:
    """Python would give both files the first; an import inside a function is found as well."""
    at_once = "import beside_both\n\ndef f(pair, prompt):\n    return beside_both.V\n"
    later = "def f(pair, prompt):\n    import beside_both\n    return beside_both.V\n"
    for folder, text in (("one", at_once), ("two", later)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "beside_both.py").write_text(f"V = {len(folder)}\n")
        (tmp_path / folder / "mine.py").write_text(text)
    assert score_group(group("x"), [f"{tmp_path}/one/mine.py:f"])[0][f"{tmp_path}/one/mine.py:f"] == 3.0
    with pytest.raises(ValueError, match=r"imports 'beside_both', which is .*two/beside_both\.py there, and .*/one/"):
        find_reward(f"{tmp_path}/two/mine.py:f")


def test_what_a_file_imports_from_beside_it_is_part_of_its_code(tmp_path: Path) -> None:
    (tmp_path / "deeper_part.py").write_text("V = 0.25\n")
    (tmp_path / "nearer_part.py").write_text("from deeper_part import V\n")
    (tmp_path / "unused_part.py").write_text("")
    (tmp_path / "json.py").write_text("raise AssertionError('Python has its own')\n")
    (tmp_path / "mine.py").write_text(
        "def f(pair, prompt):\n    from nearer_part import V\n    import json\n    return V\n"
    )
    function = find_reward(f"{tmp_path}/mine.py:f").function
    assert keep_code(tmp_path / "code", {"mine": function}) == []
    assert {file.name.rpartition("_")[0] for file in (tmp_path / "code").glob("*.py")} == {
        "mine",
        "nearer_part",
        "deeper_part",
    }
    assert keep_code(tmp_path / "code", {"mine": function}) == []
    (tmp_path / "deeper_part.py").write_text("V = 0.5\n")
    assert keep_code(tmp_path / "code", {"mine": function}) == ["mine"]
    assert len(list((tmp_path / "code").glob("deeper_part_*.py"))) == 2
