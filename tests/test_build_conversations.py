"""`--format llava`: each answer of a conversation becomes a sample, or the row is left out by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sr1.data.build.layouts import LayoutRules
from megatron_sr1.data.build.samples import BuiltSample, build_sample
from megatron_sr1.data.sources.opening import open_source
from megatron_sr1.data.sources.source import Problem
from tests.build_cases import IMAGES, SEE_THINK, write_jsonl

HUMAN, GPT, SYSTEM = ("human", "gpt", "system")


def said(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"id": "x7", "conversations": [{"from": who, "value": text} for who, text in turns], **more}


def built(folder: Path, *rows: Any, name: str = "") -> list[Any]:
    """What each becomes: (key, fields, number of images), or (kind, reason)."""
    path = write_jsonl(folder, rows, IMAGES)
    if name:
        (path / name).write_text(json.dumps(rows))
        (path / "data.jsonl").unlink()
    source = open_source("llava", str(path), {})
    items = [item for chunk in source.chunks() for item in source.read(chunk)]
    made = [item if isinstance(item, Problem) else build_sample(item, LayoutRules()) for item in items]
    return [_plain(one) for one in made]


def _plain(one: BuiltSample | Problem) -> Any:
    if isinstance(one, Problem):
        return one.kind, one.reason
    *images, (_, text) = one.members
    return one.key, json.loads(text), len(images)


def test_one_question_is_one_sample(tmp_path: Path) -> None:
    row = said((HUMAN, "<image>\nWhich?"), (GPT, "3"), image="r.png", level=2)
    for name in ("", "rows.json"):
        ((key, fields, num_images),) = built(tmp_path / f"in{name}", row, name=name)
        assert num_images == 1 and key.endswith("-00000000")
        assert fields == {"problem": "Which?", "answer": "3", "metadata": {"level": 2}}


def test_every_answer_of_several_turns_is_asked_with_what_was_said_before(tmp_path: Path) -> None:
    row = said(
        (SYSTEM, "Be brief."),
        (HUMAN, "<image>\nWhat is left?"),
        (GPT, "a dial"),
        (HUMAN, "And here: <image>?"),
        (GPT, "two"),
        (HUMAN, "Both?"),
        (GPT, "yes, both"),
        images=["r.png", "g.png"],
    )
    first, second, third = built(tmp_path, row)
    assert [one[0][-2:] for one in (first, second, third)] == ["-0", "-1", "-2"]
    assert [one[2] for one in (first, second, third)] == [1, 2, 2], "no image that was shown later"
    assert first[1]["problem"] == "Be brief.\n\n[image 1]\nWhat is left?" and first[1]["answer"] == "a dial"
    before = "Be brief.\n\nUser: [image 1]\nWhat is left?\n\nAssistant: a dial\n\nUser: "
    assert second[1]["problem"] == f"{before}And here: [image 2]?" and second[1]["answer"] == "two"
    assert third[1]["problem"] == f"{before}And here: [image 2]?\n\nAssistant: two\n\nUser: Both?"
    assert third[1]["answer"] == "yes, both"


def test_without_marks_the_images_stand_in_front_of_the_first_question(tmp_path: Path) -> None:
    one, two, text = built(
        tmp_path,
        said((HUMAN, "Which?"), (GPT, "3"), image="r.png"),
        said((HUMAN, "Which of them?"), (GPT, "4"), images=["r.png", "g.png"]),
        said((HUMAN, "2 + 2?"), (GPT, "4")),
    )
    assert (one[1]["problem"], one[2], two[2], text[2]) == ("Which?", 1, 2, 0)


def test_an_answer_of_the_layout_is_a_demonstration(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": SEE_THINK}]
    ((_, fields, num_images),) = built(tmp_path, {"messages": messages, "images": ["r.png"]})
    assert (fields["template"], fields["response"], fields["answer"]) == ("see_think", SEE_THINK, "3")
    assert num_images == 1


ASK = ((HUMAN, "<image>\nWhich?"), (GPT, "3"))
REFUSED = {
    "missing": (said(*ASK, image="none.png"), "unreadable_image", "none.png"),
    "outside": (said(*ASK, image="../r.png"), "unreadable_image", "leads outside"),
    "no image": (said(*ASK), "placeholders", "1 times <image>"),
    "too many": (said(*ASK, images=["r.png", "g.png"]), "placeholders", "1 times <image> in its conv.*but 2 images"),
    "nowhere": (
        said((HUMAN, "a?"), (GPT, "1"), (HUMAN, "b?"), (GPT, "2"), images=["r.png", "g.png"]),
        "placeholders",
        "0 times <image>",
    ),
    "in an answer": (said((HUMAN, "Which?"), (GPT, "<image>"), image="r.png"), "placeholders", "asks nothing"),
    "unknown role": (said((HUMAN, "a?"), ("narrator", "b")), "field", "by 'narrator'"),
    "tool": (said((HUMAN, "a?"), ("function_call", "b"), (GPT, "c")), "field", "by 'function_call'"),
    "late system": (said((HUMAN, "a?"), (SYSTEM, "b"), (GPT, "c")), "field", "user, system, assistant"),
    "two systems": (said((SYSTEM, "a"), (SYSTEM, "b"), *ASK, image="r.png"), "field", "system, user, assistant"),
    "no answer": (said((HUMAN, "a?"), (GPT, "b"), (HUMAN, "c?")), "field", "user, assistant, user"),
    "answer first": (said((GPT, "a"), (HUMAN, "b?")), "field", "assistant, user"),
    "nothing": (said(), "field", "of nobody"),
    "only system": (said((SYSTEM, "a")), "field", "of nobody"),
    "no turns": ({"id": "x7", "conversations": "a"}, "field", "a list of turns"),
    "half a turn": ({"id": "x7", "conversations": [{"from": "human"}]}, "field", "needed are role and content"),
    "neither": ({"id": "x7", "text": "a"}, "field", "the columns id, text"),
    "both": (said(*ASK, messages=[], image="r.png"), "field", "both conversations and messages"),
    "system beside": (said(*ASK, image="r.png", system="s"), "field", "'system' is said beside"),
    "two columns": (said(*ASK, image="r.png", images=["r.png"]), "image_columns", "images and image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_says_something_else_is_left_out_by_its_name(name: str, tmp_path: Path) -> None:
    import re

    row, kind, reason = REFUSED[name]
    ((found, said_of_it),) = built(tmp_path, row)
    assert found == kind and re.search(reason, said_of_it) and said_of_it.startswith("row 'x7': "), said_of_it


def test_files_of_both_kinds_are_refused(tmp_path: Path) -> None:
    folder = write_jsonl(tmp_path, [said(*ASK)])
    (folder / "more.json").write_text("[]")
    with pytest.raises(ValueError, match=r"\.json and \.jsonl files"):
        list(open_source("llava", str(folder), {}).chunks())
