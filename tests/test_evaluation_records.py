"""The numbers of constructed answers, counted by hand, and the file that the answers are kept in."""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megatron_sr1.evaluation import (
    Record,
    Verdict,
    check_identity,
    digest_of,
    drop_unfinished,
    file_digests,
    model_digest,
    pass_at_k,
    print_sources,
    read_records,
    replace_records,
    summarise_records,
)
from megatron_sr1.ranks import OneRank
from megatron_sr1.types import RolloutPair

from .evaluation_cases import MADE_OF, append_records, boxed, pair, record, rollout


# ---------------------------------------------------------------- the numbers
def test_the_language_shortcut_rate_is_its_definition() -> None:
    """All eight combinations: the answer is right or not; the description leads to the answer or not; the judge says
    that it does or not. And both kinds of samples without a description."""
    records, expected, judged = [], [], []
    for right, suffices, says in itertools.product((True, False), repeat=3):
        made = record("p", [pair("10" if right else "9", "some digits", "10" if suffices else "8")])
        sample = replace(made.samples[0], judge=Verdict("j", "text", says))
        records.append(replace(made, key=f"p{len(records)}", samples=(sample,)))
        expected.append(right and not suffices)
        judged.append(right and not says)
    for right in (True, False):
        records.append(record(f"p{len(records)}", [pair("10" if right else "9", None, None)]))
        expected.append(right)  # no description does not give the answer
        judged.append(right)
    summary, _ = summarise_records(records, "j")
    assert sum(expected) == 3 and sum(judged) == 3, "two of eight, and one of two"
    assert summary["language_shortcut_rate"] == summary["language_shortcut_rate_judged"] == 3 / 10
    assert (summary["accuracy"], summary["second_pass_accuracy"], summary["judged_accuracy"]) == (0.5, 0.4, 0.4)
    for made, shortcut, by_judge in zip(records, expected, judged, strict=True):
        alone, _ = summarise_records([made], "j")
        assert alone["language_shortcut_rate"] == float(shortcut)
        assert alone["language_shortcut_rate_judged"] == float(by_judge)


def test_a_missing_verdict_is_counted_nowhere() -> None:
    missing = record("a", [pair("10", "some digits", "10")])
    wrong = record("b", [pair("10", "some digits", "10")])
    wrong = replace(wrong, samples=(replace(wrong.samples[0], judge=Verdict("j", "text", False)),))
    summary, _ = summarise_records([missing, wrong], "j")
    assert summary["judge_missing"] == 1
    assert summary["judged_accuracy"] == 0.0 and summary["language_shortcut_rate_judged"] == 1.0, "of one sample"
    only_missing, _ = summarise_records([missing], "j")
    assert only_missing["judged_accuracy"] is None and only_missing["language_shortcut_rate_judged"] is None
    other_judge, _ = summarise_records([wrong], "another")
    assert other_judge["judged_accuracy"] is None and other_judge["judge_missing"] == 1
    assert "judge_missing" not in summarise_records([wrong])[0], "no judge, no numbers of one"


@pytest.fixture
def counted() -> list[Record]:
    """Two samples of each of three prompts with an image, from two sources, and one prompt without."""
    cut = RolloutPair(0, rollout("<description> 3 7", 8, "length"), None, None)
    return [
        record("a", [pair("10", "3 7", "10"), pair("10", "3 8", "11")], source="sum", facts=["3", "7"]),
        record("b", [pair("9", "the answer is 10", "10"), cut], source="sum", facts=["3", "7"]),
        record("c", [pair("5", "two cats", "5"), pair("5", "five", "4", 6)], source="count", gold="5"),
        record(
            "d",
            [RolloutPair(0, rollout(boxed("10"), 2), None, None), RolloutPair(1, rollout("10", 2), None, None)],
            source="text",
            template="cot",
        ),
    ]


def test_numbers_equal_those_counted_by_hand(counted: list[Record]) -> None:
    summary, by_source = summarise_records(counted)
    found = {name: value for name, value in summary.items() if not name.endswith(("_low", "_high"))}
    assert found == {
        "accuracy": 5 / 8,  # a: 2, b: 0, c: 2, d: 1
        "second_pass_accuracy": 3 / 6,  # the prompt without an image has no second pass
        "language_shortcut_rate": 2 / 6,  # the second samples of a and c
        "faithful": 1 / 4,  # of a and b, whose facts are known
        "format": 6 / 8,  # not the one that was cut, not the bare 10
        "leak": 2 / 6,  # "the answer is", and "five" for 5
        "pass@1": 5 / 8,
        "pass@2": 3 / 4,
        "first_tokens": (5 + 5 + 5 + 8 + 5 + 6 + 2 + 2) / 8,
        "first_tokens_longest": 8,
        "first_truncated": 1 / 8,
        "second_tokens": 3.0,
        "second_tokens_longest": 3,
        "second_truncated": 0.0,
        "num_samples": 8,
        "num_prompts": 4,
        "macro_accuracy": (1.0 + 0.5 + 0.5) / 3,  # count, sum, text
    }
    assert list(by_source) == ["count", "sum", "text"]
    assert [by_source[source]["accuracy"] for source in by_source] == [1.0, 0.5, 0.5]
    assert [by_source[source]["num_prompts"] for source in by_source] == [1, 2, 1]
    assert by_source["count"]["faithful"] is None, "no facts are known there"


def test_parts_of_a_source_add_up_to_it(counted: list[Record]) -> None:
    records = [replace(r, source=s) for r, s in zip(counted, ["mm/Art", "mm/Art/Old", "mm/Law", "gsm"], strict=True)]
    summary, by_source = summarise_records(records)
    found = {source: (numbers["num_prompts"], numbers["accuracy"]) for source, numbers in by_source.items()}
    assert found == {
        "gsm": (1, 0.5),
        "mm": (3, 4 / 6),
        "mm/Art": (2, 0.5),
        "mm/Art/Old": (1, 0.0),
        "mm/Law": (1, 1.0),
    }
    assert summary["accuracy"] == 5 / 8 and summary["macro_accuracy"] == (0.5 + 4 / 6) / 2


def test_without_images_only_the_first_pass_is_measured(counted: list[Record]) -> None:
    """Dropping the prompt without an image changes no share that a description belongs to."""
    text = summarise_records(counted)[1]["text"]
    with_text, without = summarise_records(counted)[0], summarise_records(counted[:3])[0]
    for name in ("second_pass_accuracy", "language_shortcut_rate", "faithful", "leak"):
        assert text[name] is None and text[f"{name}_low"] is None
        assert with_text[name] == without[name] and with_text[f"{name}_high"] == without[f"{name}_high"]
    assert text["second_tokens"] is None and text["pass@2"] == 1.0


def test_pass_at_k_is_the_mean_over_prompts() -> None:
    right = [3, 0, 1, 4]
    records = [record(f"p{n}", [pair("10" if index < n else "9", "x", "1") for index in range(4)]) for n in set(right)]
    summary, _ = summarise_records(records)
    for k in (1, 2, 4):
        assert summary[f"pass@{k}"] == pytest.approx(sum(pass_at_k(4, c, k) for c in set(right)) / 4, abs=1e-15)
    assert summary["pass@4"] == 0.75 and summary["pass@1"] == summary["accuracy"]
    assert "pass@1" not in summarise_records([record("p", [pair("10", "x", "1")])])[0], "one sample: the accuracy"


def test_the_table_has_a_row_per_source(counted: list[Record]) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    print_sources(console, *summarise_records(counted))
    lines = [line.split() for line in console.export_text().splitlines() if line.strip()]
    (row,) = (line for line in lines if line[0] == "text")
    assert row == ["text", "50.0", "[9.5,", "90.5]", "–", "–", "–", "50.0", "0.0", "100.0", "2", "1"]
    assert [line[0] for line in lines[-5:]] == ["count", "sum", "text", "all", "mean"]
    assert lines[-1][-1] == "66.7"


# ---------------------------------------------------------------- the file
def test_records_come_back_as_they_went(counted: list[Record], tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    judged = replace(counted[0], samples=(replace(counted[0].samples[0], judge=Verdict("j", "\n\\boxed{1}", True)),))
    records = [judged, replace(counted[1], key="größer\u2028", problem="<b>\r\n"), *counted[2:]]
    append_records(path, records[:2])
    append_records(path, records[2:])
    assert list(read_records(path)) == records
    assert [json.loads(line)["key"] for line in path.read_bytes().splitlines()] == [r.key for r in records]
    replace_records(path, records[:1])
    assert list(read_records(path)) == records[:1] and [p.name for p in tmp_path.iterdir()] == ["eval.jsonl"]


def test_every_cut_leaves_the_whole_chunks(counted: list[Record], tmp_path: Path) -> None:
    """Chunks of two and of one; the file is cut at every byte, as a kill might."""
    path = tmp_path / "eval.jsonl"
    chunks = [[counted[0], replace(counted[1], ends_chunk=True)], [replace(counted[2], ends_chunk=True)]]
    ends = []
    for chunk in chunks:
        append_records(path, chunk)
        ends.append(path.stat().st_size)
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 7), ends[0] - 1, ends[0], ends[0] + 1, len(whole) - 1, len(whole)]:
        path.write_bytes(whole[:size])
        kept = 2 if size >= ends[1] else 1 if size >= ends[0] else 0
        assert drop_unfinished(path, MADE_OF) == ["a", "b", "c"][: (0, 2, 3)[kept]]
        assert path.read_bytes() == whole[: (0, *ends)[kept]]
    assert drop_unfinished(tmp_path / "none.jsonl", MADE_OF) == []


def test_records_of_another_evaluation_are_not_continued(counted: list[Record], tmp_path: Path) -> None:
    """Also where the file that says what they were made of is gone."""
    path = tmp_path / "eval.jsonl"
    append_records(path, [counted[0], replace(counted[1], made_of="fedcba9876543210", ends_chunk=True)])
    with pytest.raises(ValueError, match=r"record 'b' is of another evaluation, fedc.*--restart"):
        drop_unfinished(path, MADE_OF)
    assert len(list(read_records(path))) == 2


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"key": 1}', b"\xff", b"null"])
def test_a_damaged_line_is_named(counted: list[Record], tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "eval.jsonl"
    append_records(path, counted[:1])
    with path.open("ab") as file:
        file.write(line + b"\n")
    append_records(path, counted[1:2])
    with pytest.raises(ValueError, match=r"eval\.jsonl:2 is not a record .*--restart"):
        drop_unfinished(path, MADE_OF)


# ---------------------------------------------------------------- what it is made of
def test_another_evaluation_is_told_by_name(tmp_path: Path) -> None:
    path = tmp_path / "identity" / "evaluate.json"
    first = {"the model": "abc", "seed": 1, "evaluate.temperature": 0.0}
    check_identity(path, first)
    check_identity(path, dict(reversed(first.items())))
    with pytest.raises(ValueError, match=r"seed was 1 and is 2; evaluate\.temperature was 0\.0 and is 1\.0\.") as error:
        check_identity(path, first | {"seed": 2, "evaluate.temperature": 1.0})
    assert "--restart" in str(error.value) and "the model" not in str(error.value)
    with pytest.raises(ValueError, match=r"evaluate\.samples was None and is 4"):
        check_identity(path, first | {"evaluate.samples": 4})
    assert digest_of(first) == digest_of(dict(reversed(first.items()))) != digest_of(first | {"seed": 2})


def test_the_model_is_known_by_its_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in ("model-00001.safetensors", "model-00002.safetensors", "config.json", "merges.txt"):
            (tmp_path / folder / name).write_bytes(name.encode() * 1000)
    (tmp_path / "b" / "README.md").write_text("no part of the model")
    whole = model_digest(file_digests(tmp_path / "a"))
    assert whole == model_digest(file_digests(tmp_path / "b"))
    shares = [file_digests(tmp_path / "a", OneRank(rank, 3)) for rank in range(3)]
    assert [len(share) for share in shares] == [2, 1, 1] and model_digest(shares[2] + shares[0] + shares[1]) == whole
    weights = tmp_path / "b" / "model-00002.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert model_digest(file_digests(tmp_path / "b")) != whole
