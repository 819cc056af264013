"""Controls of the second pass: what each is given and asked, who lends it, and what is done again."""

from __future__ import annotations

import io
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_sr1.cli.runs import check_run
from megatron_sr1.config import Config, ConfigError, check_reference, load_config
from megatron_sr1.evaluation import Record, print_controls, read_records, replace_records, summarise_records
from megatron_sr1.evaluation.controls import ControlTasks
from megatron_sr1.evaluation.records import ControlAnswer, Material, Response
from megatron_sr1.loops.control_material import check_material, gold_text, material_of
from megatron_sr1.loops.evaluate import _identity
from megatron_sr1.types import Prompt, Question

from .control_cases import Evaluated, Reader
from .evaluation_cases import boxed, pair, record
from .model_zoo import create_family
from .pass_cases import shown
from .scripted_engine import SEEN, prompt
from .thread_ranks import on_threads

ALL = "evaluate.controls=[prior,shuffled,gold,reference,other_question]"
DISC = [{"problem": "Shape?", "answer": "disc"}]
SAID = {0: "A", 2: "C", 3: "D", 4: "E"}  # by number of the prompt; 1 describes nothing
GOLD = {"How many?": "1", "Red?": "red", "Blue?": "blue", "Shape?": "disc"}


def _prompts() -> list[Prompt]:
    """a and c show one image; a, b and e ask the same; d has facts that are empty; t shows nothing."""
    prompts = [
        shown("a", b"1", facts=["1", 2]),
        shown("b", b"2", facts=["two cats"]),
        replace(shown("c", b"1"), problem="Red?", answer="red"),
        replace(shown("d", b"3", facts=[" "], others=DISC), problem="Blue?", answer="blue"),
        shown("e", b"4"),
        prompt("t", num_images=0),
    ]
    return prompts


def _first(request_id: str) -> str:
    number = int(request_id.split("/")[0])
    block = f"<description> {SAID[number]} </description> " if number in SAID else ""
    return block + boxed("1")


def _reads(given: str | None, problem: str) -> str:
    """Right where something is read, but for C and what is known of b."""
    return "no" if given in (None, "C", "two cats") else GOLD[problem]


@pytest.fixture
def evaluated(tmp_path: Path) -> tuple[Evaluated, Reader]:
    engine = Reader(_reads, _first)
    return Evaluated(tmp_path, _prompts(), engine, ALL, "evaluate.other_questions=others"), engine


def _answers(records: list[Record], control: str) -> dict[str, ControlAnswer | None]:
    return {one.key: one.samples[0].controls.get(control) for one in records if one.num_images}


def _right(records: list[Record], control: str) -> dict[str, bool]:
    return {key: answer.right for key, answer in _answers(records, control).items() if answer is not None}


# ---------------------------------------------------------------- what is asked
def test_each_control_reads_and_asks_what_its_name_says(evaluated: tuple[Evaluated, Reader]) -> None:
    evaluation, engine = evaluated
    before = list(read_records(evaluation.files.records))
    records = evaluation.ask(engine, reader="start")
    assert Counter(engine.asked) == Counter(
        {
            (None, "How many?"): 3, (None, "Red?"): 1, (None, "Blue?"): 1,  # prior
            # shuffled: a reads of e, which asks the same, over what is nearer; e and b of a and e; the others of whom
            # comes next with another image
            ("E", "How many?"): 2 + 1, ("A", "How many?"): 1 + 1, ("D", "Red?"): 1, ("E", "Blue?"): 1,
            ("1, 2", "How many?"): 1, ("two cats", "How many?"): 1,  # gold
            ("C", "Red?"): 1, ("D", "Blue?"): 1,  # reference, with the A and E above
            ("A", "Red?"): 1, ("C", "How many?"): 1, ("D", "Shape?"): 1,  # other_question
        }
    )  # fmt: skip
    lent = {key: (one.lent_by, one.same_question) for key, one in _answers(records, "shuffled").items() if one}
    assert lent == {"a": ("e", True), "b": ("e", True), "c": ("d", False), "d": ("e", False), "e": ("a", True)}
    asked = {key: one.lent_by for key, one in _answers(records, "other_question").items() if one}
    assert asked == {"a": "c", "c": "a", "d": ""}, "of d the metadata has another; b describes nothing; e is alone"
    assert _right(records, "prior") == dict.fromkeys("abcde", False)
    assert _right(records, "shuffled") == dict.fromkeys("abcde", True)
    assert _right(records, "gold") == {"a": True, "b": False}
    assert _right(records, "reference") == {"a": True, "c": False, "d": True, "e": True}
    assert _right(records, "other_question") == {"a": True, "c": False, "d": True}
    assert not records[-1].samples[0].controls, "without an image there is no second pass to compare with"
    bare = [replace(one, samples=tuple(replace(s, controls={}) for s in one.samples)) for one in records]
    assert bare == before, "nothing else of a record has changed"


def test_the_same_image_lends_no_description_and_the_same_question_no_question(tmp_path: Path) -> None:
    """a, b and d show one image; of them a and b ask the same, as c does of another."""
    engine = Reader(lambda given, problem: "1", lambda request_id: SEEN.format(request_id))
    prompts = [
        shown("a", b"1"),
        shown("b", b"1"),
        shown("c", b"2"),
        replace(shown("d", b"1"), problem="Red?", answer="red"),
    ]
    records = Evaluated(tmp_path, prompts, engine, ALL).ask(engine, reader="start")
    lent = {key: (one.lent_by, one.same_question) for key, one in _answers(records, "shuffled").items() if one}
    assert lent == {"a": ("c", True), "b": ("c", True), "c": ("a", True), "d": ("c", False)}
    asked = {key: one.lent_by for key, one in _answers(records, "other_question").items() if one}
    assert asked == {"a": "d", "b": "d", "d": "a"}


def test_the_numbers_are_those_counted_by_hand(evaluated: tuple[Evaluated, Reader]) -> None:
    evaluation, engine = evaluated
    records = evaluation.ask(engine, reader="start")
    names = ("prior", "shuffled", "gold", "reference", "other_question")
    summary, by_source = summarise_records(records, controls=names)
    # second pass: a, d and e are right; b has none, c is wrong
    wanted = {
        "prior_accuracy": 0.0, "sufficiency": 3 / 5, "prior_samples": 5,
        "shuffled_accuracy": 1.0, "shuffled_gap": 3 / 5 - 1, "shuffled_same_question": 3 / 5, "shuffled_samples": 5,
        "gold_accuracy": 1 / 2, "gold_gap": 0.0, "gold_samples": 2,
        "reference_accuracy": 3 / 4, "reference_gap": 0.0, "reference_samples": 4,
        "other_question_accuracy": 2 / 3, "other_question_gap": 0.0, "other_question_samples": 3,
    }  # fmt: skip
    found = {key: value for key, value in summary.items() if key.startswith((*names, "suff"))}
    assert {key: value for key, value in found.items() if key in wanted} == pytest.approx(wanted)
    bounds = {
        f"{key}{end}" for key in wanted if key.endswith(("accuracy", "gap", "sufficiency")) for end in ("_low", "_high")
    }
    assert found.keys() - wanted.keys() == bounds
    assert summary["second_pass_accuracy"] == 3 / 5 and by_source[""]["sufficiency"] == pytest.approx(3 / 5)
    without, _ = summarise_records(records)
    assert without == {key: value for key, value in summary.items() if key not in found}


def test_the_table_has_a_row_per_source_that_was_asked(evaluated: tuple[Evaluated, Reader]) -> None:
    evaluation, engine = evaluated
    records = evaluation.ask(engine, "evaluate.controls=[prior,shuffled,gold]")
    numbers: Any = summarise_records(records[:4], controls=("prior", "shuffled", "gold"))
    by_source = {"x": numbers[0], "y": summarise_records(records[5:])[0]}
    console = Console(width=120, record=True, file=io.StringIO())
    print_controls(console, numbers[0], by_source)
    rows = [line.split() for line in console.export_text().splitlines() if line.strip()]
    gap = numbers[0]
    bounds = [f"[{100 * gap['sufficiency_low']:.1f},", f"{100 * gap['sufficiency_high']:.1f}]"]
    wanted = ["50.0", "0.0", "50.0", *bounds, "100.0", "50.0", "50.0"]
    assert [row for row in rows if row[0] in ("x", "y", "all")] == [["x", *wanted], ["all", *wanted]]
    print_controls(console, by_source["y"], {})
    assert "Controls" not in console.export_text(clear=False), "nothing was asked"


def test_the_starting_weights_read_last_and_the_policy_reads_the_rest(tmp_path: Path) -> None:
    engine = Reader(_reads, _first)
    evaluation = Evaluated(tmp_path, _prompts(), engine, "evaluate.controls=[reference,prior]")
    weights: dict[str, Any] = {"weights": {"policy": 9}.items, "start_weights": {"start": 0}.items}
    records = evaluation.ask(engine, reader="begun/with", **weights)
    assert engine.versions == [9] * 5 + [0] * 4 and [given for given, _ in engine.asked[:5]] == [None] * 5
    answers = [one for one in _answers(records, "reference").values() if one is not None]
    assert [one.reader for one in answers] == ["begun/with"] * 4
    evaluation.ask(engine, reader="begun/with", **weights)
    assert len(engine.versions) == 9, "all is there"
    evaluation.ask(engine, reader="elsewhere", **weights)
    assert len(engine.versions) == 13, "another reader is asked anew"
    evaluation.ask(engine)
    assert any("reference is left out" in line for line in evaluation.said) and len(engine.versions) == 13


def test_samples_of_a_prompt_lend_by_their_number_and_are_drawn_by_themselves(tmp_path: Path) -> None:
    engine = Reader(lambda given, problem: "1", lambda request_id: SEEN.format(request_id))
    more = ("evaluate.controls=[prior,shuffled]", "evaluate.samples=3", "evaluate.temperature=1.0")
    evaluation = Evaluated(tmp_path, [shown("a", b"1"), shown("b", b"2")], engine, *more, num_samples=3)
    records = evaluation.ask(engine)
    assert [answer.lent_by for one in records for s in one.samples if (answer := s.controls["shuffled"])] == list(
        "bbbaaa"
    )
    read = sorted(str(given) for given, _ in engine.asked if given)
    assert read == [f"a {group}/{number}/first" for group in range(2) for number in range(3)]
    seeds = {engine.draws[name].seed for name in engine.prompts}
    assert len(engine.prompts) == len(seeds) == 12
    summary, _ = summarise_records(records, controls=("prior", "shuffled"))
    assert (summary["prior_samples"], summary["sufficiency"], summary["shuffled_same_question"]) == (6, 0.0, 1.0)


# ---------------------------------------------------------------- what cannot be asked
def test_where_all_show_one_image_nobody_lends_a_description(tmp_path: Path) -> None:
    engine = Reader(_reads, _first)
    prompts = [shown("a", b"1"), replace(shown("b", b"1"), problem="Red?", answer="red")]
    records = Evaluated(tmp_path, prompts, engine, "evaluate.controls=[shuffled]").ask(engine)
    assert engine.asked == [] and "shuffled_accuracy" not in summarise_records(records, controls=("shuffled",))[0]


def test_where_nothing_is_described_only_the_question_is_asked(tmp_path: Path) -> None:
    engine = Reader(_reads, lambda request_id: boxed("1"))
    evaluation = Evaluated(tmp_path, [shown("a", b"1"), shown("b", b"2"), prompt("t", 0)], engine, ALL)
    records = evaluation.ask(engine, reader="start")
    assert engine.asked == [(None, "How many?")] * 2
    summary, _ = summarise_records(records, controls=("prior", "shuffled", "reference"))
    assert (summary["prior_accuracy"], summary["sufficiency"]) == (0.0, 0.0) and "shuffled_samples" not in summary


def test_a_template_without_a_description_has_no_controls(tmp_path: Path) -> None:
    path = tmp_path / "evaluate.jsonl"
    one = record("a", [pair("10", None, None)], template="cot")
    alone = replace(record("b", [pair("10", "x", None)]), second_pass=False)
    replace_records(path, [one, replace(one, num_images=1), alone])
    assert ControlTasks(path, ["prior", "shuffled", "gold"], "").tasks == []


def test_a_gold_text_that_is_too_long_is_told_and_asked_no_more(tmp_path: Path) -> None:
    engine = Reader(_reads, _first)
    prompts = [shown("a", b"1", facts=["x" * 51]), shown("b", b"2", facts=["x" * 50])]
    evaluation = Evaluated(tmp_path, prompts, engine, "evaluate.controls=[gold]")
    records = evaluation.ask(engine)
    assert engine.asked == [("x" * 50, "How many?")]
    assert records[0].samples[0].controls["gold"].response is None
    assert evaluation.said[-1].startswith("1 questions of controls do not fit")
    summary, _ = summarise_records(records, controls=("gold",))
    assert summary["gold_samples"] == 1
    evaluation.ask(engine)
    assert len(engine.asked) == 1 and not any("asking" in line for line in evaluation.said[2:])


def test_a_question_that_does_not_fit_the_engine_is_left_out(tmp_path: Path) -> None:
    engine = Reader(lambda given, problem: "1", _first, limit=460)
    long = [{"problem": "x" * 300, "answer": "1"}]
    evaluation = Evaluated(tmp_path, [shown("a", b"1", others=long)], engine, ALL, "evaluate.other_questions=others")
    (one,) = evaluation.ask(engine)
    assert one.samples[0].controls["other_question"].response is None and one.samples[0].controls["prior"].right


def test_records_of_an_earlier_release_are_asked_what_they_can_tell(evaluated: tuple[Evaluated, Reader]) -> None:
    evaluation, engine = evaluated
    path = evaluation.files.records
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        del line["material"]
        for sample in line["samples"]:
            del sample["controls"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = evaluation.ask(engine, reader="start")
    assert {name for one in records for s in one.samples for name in s.controls} == {"prior", "reference"}
    assert any(line.startswith("5 records of an earlier release say nothing") for line in evaluation.said)


# ---------------------------------------------------------------- what is done again
def test_killed_and_continued_it_asks_what_is_missing_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    def made(name: str) -> tuple[Evaluated, Reader]:
        engine = Reader(_reads, _first)
        return Evaluated(tmp_path / name, _prompts(), engine, ALL), engine

    evaluation, engine = made("whole")
    evaluation.ask(engine, reader="start")
    whole, count = evaluation.files.records.read_bytes(), len(engine.asked)
    evaluation, engine = made("killed")
    before = evaluation.files.records.read_bytes()
    engine.stops_after = 5
    with pytest.raises(KeyboardInterrupt):
        evaluation.ask(engine, reader="start")
    (part,) = evaluation.files.control_parts.glob("*.jsonl")
    assert evaluation.files.records.read_bytes() == before and len(part.read_text().splitlines()) == 5
    with part.open("ab") as file:
        file.write(b'{"place": [0, 0, "pri')
    engine.stops_after = -1
    engine.asked.clear()
    engine._queue.clear()
    evaluation.ask(engine, reader="start")
    assert len(engine.asked) == count - 5 and evaluation.files.records.read_bytes() == whole
    assert not evaluation.files.control_parts.exists()


@pytest.mark.parametrize("pulls", [False, True])
def test_engines_share_the_questions_and_end_in_the_same_bytes(tmp_path: Path, pulls: bool) -> None:
    def made(name: str, *overrides: str) -> Evaluated:
        return Evaluated(tmp_path / name, _prompts(), Reader(_reads, _first), ALL, *overrides)

    engine, alone, shared = Reader(_reads, _first), made("alone"), made("shared")
    alone.ask(engine, reader="start")
    engines = [Reader(_reads, _first) for _ in range(3)]

    class Numbers:
        """`ranks.Counter` of all engines."""

        def __init__(self) -> None:
            self._next: dict[str, Iterator[int]] = {}
            self._name = ""

        def begin(self, name: str) -> None:
            self._name = name
            self._next.setdefault(name, itertools.count())

        def next(self) -> int:
            return next(self._next[self._name])

    counter: dict[str, Any] = {"counter": Numbers()} if pulls else {}
    on_threads(3, lambda ranks: shared.ask(engines[ranks.rank], reader="start", ranks=ranks, **counter))
    assert shared.files.records.read_bytes() == alone.files.records.read_bytes()
    asked = Counter(question for one in engines for question in one.asked)
    assert asked == Counter(engine.asked), "each once"
    assert pulls or all(one.asked for one in engines)


def test_further_controls_are_asked_later_by_themselves(evaluated: tuple[Evaluated, Reader]) -> None:
    evaluation, engine = evaluated
    evaluation.ask(engine, "evaluate.controls=[gold]")
    assert len(engine.asked) == 2
    evaluation.ask(engine, "evaluate.controls=[]")
    (first, *_) = evaluation.ask(engine, "evaluate.controls=[prior,gold]")
    assert len(engine.asked) == 7 and list(first.samples[0].controls) == ["prior", "gold"]


def test_answers_left_by_a_kill_while_they_were_taken_over_are_taken_over(evaluated: tuple[Evaluated, Reader]) -> None:
    evaluation, engine = evaluated
    whole = evaluation.ask(engine, "evaluate.controls=[prior]")
    folder = evaluation.files.control_parts
    folder.mkdir(parents=True)
    answer = {"response": {"text": "x", "tokens": 1, "finish_reason": "stop"}, "right": True}
    (folder / "00000.jsonl").write_text(json.dumps({"place": [0, 0, "gold"], "answer": answer}) + "\n")
    engine.asked.clear()
    records = evaluation.ask(engine, "evaluate.controls=[prior]")
    assert records[0].samples[0].controls["gold"].right and not engine.asked and not folder.exists()
    assert records[1:] == whole[1:]
    (folder).mkdir(parents=True)
    (folder / "00000.jsonl").write_text('{"place": [0]}\n')
    with pytest.raises(ValueError, match=r"00000\.jsonl:1 is not a record"):
        evaluation.ask(engine, "evaluate.controls=[prior]")
    evaluation.files.remove()
    assert not folder.exists() and not evaluation.files.records.exists()


# ---------------------------------------------------------------- what is known of a prompt
@pytest.mark.parametrize(
    ("value", "text"),
    [(["3", "7"], "3, 7"), ([3, 7.5], "3, 7.5"), ("a cat", "a cat"), (["", " ", None], None), ([], None), (None, None)],
)
def test_gold_is_what_the_metadata_says(value: Any, text: str | None) -> None:
    assert gold_text(Prompt("a", "?", "1", metadata={"seen": value}), "seen") == text


def test_a_field_that_is_no_text_is_refused_with_its_sample() -> None:
    for value in ({"a": 1}, 3, [["x"]]):
        with pytest.raises(ValueError, match=r"sample 'a': the metadata's 'seen', which evaluate\.gold_field names"):
            check_material(shown("a", b"1", seen=value), "seen", "")
    with pytest.raises(ValueError, match=r"sample 'a'.*asks the metadata's 'others'"):
        check_material(shown("a", b"1", others=[{"problem": "?"}]), "facts", "others")
    check_material(prompt("t", num_images=0), "facts", "others")
    check_material(shown("a", b"1"), "facts", "others")


def test_material_comes_back_as_it_went(tmp_path: Path) -> None:
    one = material_of(shown("a", b"1", facts=["1"], others=DISC), "facts", "others")
    assert one == Material(one.shown, "1", (Question("Shape?", "disc"),)) and len(one.shown) == 32
    assert (
        one.shown
        == material_of(shown("b", b"1"), "facts", "").shown
        != material_of(shown("c", b"2"), "facts", "").shown
    )
    made = record("a", [pair("10", "x", "10")])
    answer = ControlAnswer(Response("x", 1, "stop"), True, "b", False, "start")
    made = replace(made, material=one, samples=(replace(made.samples[0], controls={"reference": answer}),))
    replace_records(tmp_path / "r.jsonl", [made])
    assert list(read_records(tmp_path / "r.jsonl")) == [made]


# ---------------------------------------------------------------- the configuration
def test_an_evaluation_is_another_by_the_fields_of_its_records_and_not_by_its_controls() -> None:
    class Data:
        fingerprint = "f"

    def identity(*words: str) -> dict[str, Any]:
        return dict(_identity(load_config(None, list(words)), Data(), "m"))  # type: ignore[arg-type]

    assert identity(ALL) == identity("evaluate.controls=[]") == identity(), "as earlier releases kept it"
    other = identity("evaluate.gold_field=seen", "evaluate.other_questions=others")
    assert other == {**identity(), "evaluate.gold_field": "seen", "evaluate.other_questions": "others"}


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        ("evaluate.controls=[prier]", r"evaluate\.controls=\['prier'\].*prior, shuffled, gold, reference, other"),
        ("evaluate.controls=[prior,prior]", r"each once.*\[\] for none"),
        ("evaluate.gold_field=''", r"evaluate\.gold_field=''"),
    ],
)  # fmt: skip
def test_a_slip_is_named(words: str, refused: str) -> None:
    with pytest.raises(ConfigError, match=refused):
        load_config(None, [words])


def test_a_reference_that_engines_cannot_read_is_refused() -> None:
    words = ["evaluate.controls=[reference]", "model.megatron_dir=there"]
    with pytest.raises(ConfigError, match=r"model\.megatron_dir='there'.*evaluate\.controls has reference"):
        load_config(None, words)
    load_config(None, [*words, "objective.reference_dir=hf"])
    assert Config().evaluate.controls == ("prior", "shuffled", "gold")


def test_a_reference_of_another_shape_is_refused_before_anything_starts(tmp_path: Path) -> None:
    create_family(tmp_path / "own", "qwen3_vl_moe")
    shutil.copytree(tmp_path / "own", tmp_path / "start")
    path = tmp_path / "start" / "config.json"
    words = [f"model.hf_dir={tmp_path / 'own'}", f"objective.reference_dir={tmp_path / 'start'}"]
    asked = load_config(None, [*words, "evaluate.controls=[reference]"])
    check_reference(asked, ())
    whole = json.loads(path.read_text())
    name = "num_experts" if "num_experts" in whole["text_config"] else "num_local_experts"
    for section, key, said in (("text_config", name, "num_experts"), ("vision_config", "depth", "vision_config.depth")):
        value = whole[section][key]
        path.write_text(json.dumps(whole | {section: whole[section] | {key: value + 1}}))
        refused = rf"objective\.reference_dir=.*where {said} is {value}, and not {value + 1}.*began with"
        with pytest.raises(ConfigError, match=refused):
            check_reference(asked, ())
    path.unlink()
    with pytest.raises(ConfigError, match=r"objective\.reference_dir=.*which holds a config\.json"):
        check_reference(asked, ())
    check_reference(load_config(None, words), ("policy",))
    words += ["data.train=[no/*.tar]", "data.heldout=[no/*.tar]", f"run_dir={tmp_path / 'run'}"]
    assert len(check_run("grpo", load_config(None, words))) == 2  # read by nothing; no list has files
    with pytest.raises(ConfigError, match=r"objective\.reference_dir=.*which holds a config\.json"):
        check_run("grpo", load_config(None, [*words, "objective.preset=caprl"]))
