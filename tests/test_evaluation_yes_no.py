"""The numbers of yes-or-no questions: counted by hand, by scikit-learn and by a second small program."""

from __future__ import annotations

import io
import itertools
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from sklearn.metrics import precision_recall_fscore_support

from megatron_sr1.data import Quarantine, ShardDataset, write_shards
from megatron_sr1.data.yes_no import ENTRY, YesNo, yes_no_of
from megatron_sr1.evaluation import Record, print_sources, read_records, record_of, replace_records, summarise_records
from megatron_sr1.evaluation.heldout import Heldout
from megatron_sr1.evaluation.summary import Numbers
from megatron_sr1.prompts import OURS, SHIPPED
from megatron_sr1.prompts.answers import AnswerFormat
from megatron_sr1.rewards import own_rewards, score_group
from megatron_sr1.types import Prompt, RolloutGroup, RolloutPair

from .data_cases import picture
from .evaluation_cases import MADE_OF, boxed, rollout

PLAIN = replace(OURS, first=SHIPPED.by_name["cot"])
POPE, AMBER = YesNo(positive="yes"), YesNo(positive="no")
TOLD = {"yes": boxed("Yes"), "no": boxed("no."), "": boxed("maybe")}


def asked(key: str, gold: str, how: YesNo | None, texts: Iterable[str], source: str = "set") -> Record:
    """A question whose answers are these texts, graded by the project's own rewards."""
    prompt = Prompt(key, "Is it?", gold, source=source, metadata={} if how is None else how.entry())
    pairs = tuple(RolloutPair(number, rollout(text), None, None) for number, text in enumerate(texts))
    group = RolloutGroup(0, prompt, pairs)
    return record_of(group, PLAIN.first, score_group(group, own_rewards(False), asked=PLAIN), MADE_OF, False)


def told(gold: str, how: YesNo, *said: str, source: str = "set") -> Record:
    """The same with answers yes, no and "" for neither."""
    return asked("k", gold.capitalize(), how, [TOLD[word] for word in said], source)


def numbers_of(records: Sequence[Record], *names: str) -> list[float | None]:
    summary, _ = summarise_records(records)
    return [summary[name] for name in names]


# ---------------------------------------------------------------- what was said
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (boxed("Yes"), "yes"),
        (boxed("yes."), "yes"),
        (boxed("Yes, there is a dog."), "yes"),
        (boxed(r"\text{YES}"), "yes"),
        (boxed("The answer is yes"), "yes"),
        (boxed("No"), "no"),
        (boxed("no, there is no dog"), "no"),
        (boxed("No. The dog is outside"), "no"),
        (boxed("maybe"), ""),
        (boxed("yes or no"), ""),
        (boxed("Yes, but no"), ""),
        (boxed("I do not know"), ""),
        (boxed("not sure"), ""),
        (boxed("nothing"), ""),
        (boxed("1"), ""),
        (boxed(" "), ""),
        ("No", ""),  # outside of any box: no answer at all
        ("", ""),
    ],
)
def test_what_an_answer_says(text: str, said: str) -> None:
    """By the grader, whatever the gold is: what is neither is wrong for both, and never taken for no."""
    for gold in ("Yes", "No", "yes", "no"):
        record = asked("k", gold, POPE, [text])
        assert record.samples[0].said == said
        assert record.samples[0].rewards["acc"] == float(said == gold.lower())
    assert asked("k", "Yes", None, [text]).samples[0].said is None


def test_an_answer_is_read_as_its_template_has_it() -> None:
    template = replace(PLAIN.first, answer=AnswerFormat("tag", "answer"))
    tagged = replace(PLAIN, first=template)
    prompt = Prompt("k", "Is it?", "No", metadata=POPE.entry())
    texts = ("<answer>Yes.</answer>", boxed("Yes"), "<answer>No</answer>")
    group = RolloutGroup(0, prompt, tuple(RolloutPair(n, rollout(text), None, None) for n, text in enumerate(texts)))
    rewards = score_group(group, own_rewards(False), asked=tagged)
    record = record_of(group, template, rewards, MADE_OF, False)
    assert [sample.said for sample in record.samples] == ["yes", "", "no"]


# ---------------------------------------------------------------- by hand
GOLD_AND_SAID = [
    ("yes", "yes"), ("yes", "yes"), ("yes", "no"), ("yes", ""),
    ("no", "no"), ("no", "no"), ("no", "no"), ("no", "yes"), ("no", ""), ("no", ""),
]  # fmt: skip
MEASURED = ("accuracy", "precision", "recall", "f1", "yes_ratio", "undecided")


def test_pope_counts_yes() -> None:
    records = [told(gold, POPE, said) for gold, said in GOLD_AND_SAID]
    # yes is said 3 times, twice rightly; 4 times it would have been right
    assert numbers_of(records, *MEASURED) == [5 / 10, 2 / 3, 2 / 4, 4 / 7, 3 / 10, 3 / 10]
    assert "question_pair_accuracy" not in summarise_records(records)[0]


def test_amber_counts_no() -> None:
    records = [told(gold, AMBER, said) for gold, said in GOLD_AND_SAID]
    # no is said 4 times, 3 times rightly; 6 times it would have been right
    assert numbers_of(records, *MEASURED) == [5 / 10, 3 / 4, 3 / 6, 6 / 10, 3 / 10, 3 / 10]


def test_what_is_not_defined_is_none() -> None:
    """Never the positive word: no precision; no question whose gold it is: no recall; neither: no F1."""
    for how, other in ((POPE, "no"), (AMBER, "yes")):
        never = [told("yes", how, other), told("no", how, other)]
        assert numbers_of(never, "precision", "recall", "f1") == [None, 0.0, 0.0]
        absent = [told(other, how, how.positive)]
        assert numbers_of(absent, "precision", "recall", "f1") == [0.0, None, 0.0]
        assert numbers_of([told(other, how, "")], "precision", "recall", "f1") == [None, None, None]
    assert "undecided" not in summarise_records([])[0]


def hallusion(subset: str, place: str, right: bool, *, answers: Sequence[bool] = ()) -> Record:
    """A question `set_figure_question`, answered rightly or not; figure 0 of VS is none."""
    number, figure, question = place.split("_")
    name = "" if (subset[:2], figure) == ("VS", "0") else f"{subset}/{number}_{figure}"
    how = YesNo(question=f"{subset}/{number}_{question}", figure=name)
    said = ["yes" if one else "no" for one in answers or (right,)]
    return told("yes", how, *said, source=f"hallusionbench/{subset}")


def test_hallusionbench_by_question_and_by_figure() -> None:
    vs, vd = "VS/chart", "VD/chart"
    records = [
        hallusion(vs, "0_0_0", True), hallusion(vs, "0_1_0", True), hallusion(vs, "0_2_0", True),
        hallusion(vs, "0_0_1", False), hallusion(vs, "0_1_1", True), hallusion(vs, "0_2_1", False),
        hallusion(vd, "0_0_0", True), hallusion(vd, "0_1_0", False),
        hallusion(vd, "0_0_1", True), hallusion(vd, "0_1_1", True),
        hallusion(vd, "1_0_0", True),
    ]  # fmt: skip
    summary, by_source = summarise_records(records)
    names = ("accuracy", "question_pair_accuracy", "figure_accuracy")
    measured = {source: tuple(numbers[name] for name in names) for source, numbers in by_source.items()}
    assert measured == {
        # VS: question 0 of 0 and 1; figure 1 of 1 and 2. VD: questions 0_1 and 1_0; figures 0_0 and 1_0 of three
        "hallusionbench": (8 / 11, 3 / 5, 3 / 5),
        "hallusionbench/VD": (4 / 5, 2 / 3, 2 / 3),
        "hallusionbench/VD/chart": (4 / 5, 2 / 3, 2 / 3),
        "hallusionbench/VS": (4 / 6, 1 / 2, 1 / 2),
        "hallusionbench/VS/chart": (4 / 6, 1 / 2, 1 / 2),
    }
    assert tuple(summary[name] for name in names) == measured["hallusionbench"]
    assert "precision" not in summary and summary["yes_ratio"] == 8 / 11
    without, _ = summarise_records(records[:1])
    assert (without["question_pair_accuracy"], without["figure_accuracy"]) == (1.0, None), "there is no figure"


def test_several_samples_are_several_evaluations() -> None:
    """The mean over samples of each one's number; precision of those where the positive word was said."""
    records = [told("yes", POPE, "yes", "no", "no"), told("no", POPE, "yes", "no", "")]
    assert numbers_of(records, "precision", "recall", "f1") == [1 / 2, 1 / 3, (2 / 3 + 0 + 0) / 3]
    assert numbers_of(records, "yes_ratio", "undecided") == [2 / 6, 1 / 6]
    two = [hallusion("VD/ocr", "0_0_0", True, answers=a) for a in ((True, False), (True, True))]
    two[1] = replace(two[1], yes_no=YesNo(question="VD/ocr/0_0", figure="VD/ocr/0_1"))
    assert numbers_of(two, "question_pair_accuracy", "figure_accuracy") == [1 / 2, 3 / 4]
    fewer = [*two, hallusion("VD/ocr", "0_2_0", True)]
    assert numbers_of(fewer, "question_pair_accuracy", "figure_accuracy") == [1.0, 1.0], "all have a first sample"


def test_sets_of_different_kinds_are_not_mixed() -> None:
    """What holds for both of two sets is told of both together; a benchmark's own numbers are there in any company."""
    pope = [told("yes", POPE, "yes", source="pope/random"), told("no", POPE, "yes", source="pope/random")]
    amber = [told("no", AMBER, "", source="amber/existence")]
    pairs = [hallusion("VS/map", "0_1_0", True)]
    other = asked("k", "10", None, [boxed("10")], "gsm8k")
    summary, by_source = summarise_records([*pope, *amber, *pairs])
    assert {name for name in summary if name in (*MEASURED, "question_pair_accuracy")} == {
        "accuracy",
        "yes_ratio",
        "undecided",
    }
    assert summary["yes_ratio"] == 3 / 4 and summary["undecided"] == 1 / 4
    assert by_source["pope"]["precision"] == 1 / 2 and by_source["amber"]["precision"] is None
    for both in ([*pope, *amber], [*amber, *pope]):
        assert not {"precision", "recall", "f1"} & summarise_records(both)[0].keys()
    mixed, again = summarise_records([*pope, *amber, *pairs, other])
    assert "undecided" not in mixed and again["pope"] == by_source["pope"] and "undecided" not in again["gsm8k"]
    alike = [replace(pairs[0], source="a"), replace(hallusion("VS/map", "0_1_0", False), source="b")]
    assert numbers_of(alike, "question_pair_accuracy") == [1 / 2], "questions of two benchmarks may have one name"


# ---------------------------------------------------------------- by other programs
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("how", [POPE, AMBER])
def test_numbers_equal_those_of_scikit_learn(how: YesNo, seed: int) -> None:
    """Neither is a third class there, which is predicted and never true."""
    draw, samples = random.Random(seed), 1 + seed
    golds = draw.choices(("yes", "no"), (2, 3), k=60)
    answers = [draw.choices(("yes", "no", ""), (4, 4, 1), k=samples) for _ in golds]
    records = [told(gold, how, *said) for gold, said in zip(golds, answers, strict=True)]
    expected = [
        precision_recall_fscore_support(golds, said, labels=[how.positive], average=None)[:3]
        for said in zip(*answers, strict=True)
    ]
    means = [sum(float(numbers[place][0]) for numbers in expected) / samples for place in range(3)]
    assert numbers_of(records, "precision", "recall", "f1") == pytest.approx(means, abs=1e-12)
    flat = list(itertools.chain(*answers))
    shares = [flat.count("yes") / len(flat), flat.count("") / len(flat)]
    assert numbers_of(records, "yes_ratio", "undecided") == pytest.approx(shares, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_groups_equal_those_of_a_second_program(seed: int) -> None:
    """It sorts and groups, where ours goes through once."""
    draw, samples = random.Random(seed), 1 + seed
    subsets, digits = ("VD/math", "VS/math", "VS/map"), range(3)
    places = [(s, f"{a}_{b}_{c}") for s, a, b, c in itertools.product(subsets, digits, digits, digits)]
    draw.shuffle(places)
    rows = [(subset, place, draw.choices((True, False), (5, 1), k=samples)) for subset, place in places[:70]]
    records = [hallusion(subset, place, True, answers=answers) for subset, place, answers in rows]

    def accuracy(group: Sequence[int], with_figure: bool) -> float:
        shares = []
        for sample in range(samples):
            key = {
                (subset, place): (subset, *(place.split("_")[part] for part in group))
                for subset, place, _ in rows
                if not with_figure or subset[:2] == "VD" or place.split("_")[1] != "0"
            }
            right = {(subset, place): answers[sample] for subset, place, answers in rows}
            by_group = itertools.groupby(sorted(key, key=key.__getitem__), key.__getitem__)
            whole = [all(right[one] for one in members) for _, members in by_group]
            shares.append(sum(whole) / len(whole))
        return sum(shares) / samples

    expected = [accuracy((0, 2), False), accuracy((0, 1), True)]
    assert min(expected) > 0 and max(expected) < 1
    found = numbers_of(records, "question_pair_accuracy", "figure_accuracy")
    assert found == pytest.approx(expected, abs=1e-12)


# ---------------------------------------------------------------- where they are kept and shown
def test_records_keep_what_was_said(tmp_path: Path) -> None:
    records = [told("yes", POPE, "yes", "", "no"), hallusion("VS/map", "0_1_0", True), asked("k", "10", None, ["x"])]
    path = tmp_path / "evaluate.jsonl"
    replace_records(path, records)
    assert list(read_records(path)) == records
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [sample["said"] for sample in lines[0]["samples"]] == ["yes", "", "no"]
    for line in lines:  # as earlier releases wrote them
        del line["yes_no"]
        for sample in line["samples"]:
            del sample["said"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    old = list(read_records(path))
    assert {record.yes_no for record in old} == {None} and "undecided" not in summarise_records(old)[0]


def shown(summary: Numbers, by_source: dict[str, Numbers]) -> list[list[str]]:
    text = io.StringIO()
    print_sources(Console(file=text, width=120), summary, by_source)
    return [line.split() for line in text.getvalue().splitlines()]


def test_the_table_of_yes_and_no() -> None:
    pope = [told(gold, POPE, said, source="pope/random") for gold, said in GOLD_AND_SAID]
    lines = shown(*summarise_records([*pope, hallusion("VS/map", "0_1_0", True)]))
    head = ["accuracy", "precision", "recall", "F1", "yes", "neither", "qAcc", "fAcc", "prompts"]
    start = lines.index(head)
    rows = {line[0]: line[1:] for line in lines[start:] if line}
    assert rows["pope"] == ["50.0", "66.7", "50.0", "57.1", "30.0", "30.0", "–", "–", "10"]
    assert rows["hallusionbench/VS/map"] == ["100.0", "–", "–", "–", "100.0", "0.0", "100.0", "100.0", "1"]
    assert rows["all"] == ["54.5", "–", "–", "–", "36.4", "27.3", "–", "–", "11"]
    assert any("neither yes nor no; it is wrong" in " ".join(line) for line in lines)
    never = shown(*summarise_records([told("yes", POPE, "no", source="pope")]))
    assert ["pope", "0.0", "–", "0.0", "0.0", "0.0", "0.0", "1"] in never, "a precision that is not defined is shown"
    plain = shown(*summarise_records([asked("k", "10", None, [boxed("10")], "gsm8k")]))
    assert not any("yes" in line for line in plain)


# ---------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("entry", "answer", "message"),
    [
        ("yes", "Yes", "must be an object of texts"),
        ({"positive": 1}, "Yes", "must be an object of texts"),
        ({"postive": "yes"}, "Yes", "with none but positive, question, figure"),
        ({"positive": "Yes"}, "Yes", "positive='Yes': write yes or no"),
        ({"figure": "f"}, "Yes", "figure='f' and no question"),
        ({}, "maybe", "its answer 'maybe' is neither yes nor no"),
        ({"positive": "no"}, "B", "has their letters for answers"),
    ],
)
def test_wrong_metadata_make_a_bad_sample(entry: object, answer: str, message: str, tmp_path: Path) -> None:
    """Before anything is answered: the sample is named, and counts for data.max_bad_samples."""
    bad = Prompt("bad", "Is it?", answer, (picture(1),), "set", {ENTRY: entry})
    with pytest.raises(ValueError, match="sample 'bad'") as error:
        yes_no_of(bad)
    assert message in str(error.value)
    good = Prompt("good", "Is it?", "No", (picture(2),), "set", {ENTRY: {"positive": None}})
    shards = write_shards([bad, good], tmp_path, "test", 9)
    quarantine = Quarantine(1)
    heldout = Heldout(ShardDataset(shards, quarantine=quarantine), quarantine)
    assert [prompt.key for prompt in heldout.first(9)] == ["good"]
    assert [(sample.key, message in sample.reason) for sample in quarantine.bad] == [("bad", True)]
    assert yes_no_of(good) == YesNo() and yes_no_of(replace(good, metadata={})) is None
