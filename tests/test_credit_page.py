"""`megatron-sr1 credit`: its table, its page, its refusals."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sr1.cli import main
from megatron_sr1.report import write_credit
from megatron_sr1.training.credit_report import credit_pieces
from tests.batch_cases import their_rewards, two_groups
from tests.credit_cases import SavedRun, Saver, with_text
from tests.test_report import EVIL, Page


@pytest.fixture
def saver(tmp_path: Path, tiny_model_dir: str) -> Saver:
    return Saver(tmp_path, tiny_model_dir)


@pytest.fixture
def run(saver: Saver) -> SavedRun:
    """The first sample writes markup, and so does its question."""
    groups = two_groups(saver.processor)
    pair = with_text(saver.processor, groups[0].pairs[0], EVIL)
    prompt = replace(groups[0].prompt, problem="<b>What?</b>", key='a"b/<i>')
    groups[0] = replace(groups[0], prompt=prompt, pairs=(pair, groups[0].pairs[1]))
    return saver.save("objective.format_weight=0", rewards=their_rewards(), groups=groups)


def command(run: SavedRun, *words: str, capsys: pytest.CaptureFixture[str]) -> str:
    main(["credit", str(run.folder), "--step", "0", *words])
    return capsys.readouterr().out


def test_the_command_prints_tables_and_writes_a_page(
    run: SavedRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "170")
    printed = command(run, "--against", "summed", capsys=capsys)
    lines = [line.split() for line in printed.splitlines()]
    assert ["A", "all", "together", "0", "(0.0", "%)"] in lines and [
        "B",
        "all",
        "together",
        "1",
        "(50.0",
        "%)",
    ] in lines
    assert ["A", "answer,", "visual", "50.0", "50.0", "0.0", "0.0", "0.0", "4"] in lines
    assert any(line[:4] == ["4", "samples", "50.0", "0.0"] for line in lines)
    assert "A: vision_sr1, the run's own" in printed and f"report: {run.folder / 'credit.html'}" in printed
    page = Page((run.folder / "credit.html").read_text())
    assert page.tables["credit-pairs"][1] == ["A answer, visual", "50.0", "50.0", "0.0", "0.0", "0.0", "4"]
    assert [row[0] for row in page.tables["credit-switches"]] == [
        *("", "A leak filter", "", "A no std", ""),
        *("B leak filter", "", "B no std", ""),
    ]
    assert page.tables["credit-agreement"][1][1:6] == ["50.0", "0.0", "50.0", "0.0", "0.0"]
    assert len(page.tables["credit-samples"]) == 1 + 4


def test_a_narrow_terminal_has_every_column(
    run: SavedRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    printed = command(run, "--against", "perception_credit", capsys=capsys)
    heads = [line.split()[-1] for line, below in pairwise(printed.splitlines()) if below.startswith(" ──")]
    assert heads == ["dead", "B", "B", "samples", "moved", "B"]
    assert "…" not in printed and all(len(line) <= 80 for line in printed.splitlines() if "──" in line)


def test_texts_are_shown_and_never_interpreted(run: SavedRun) -> None:
    out = run.folder / "new" / "page.html"
    write_credit(run.credit("summed"), out)
    page = Page(out.read_text())
    text = "".join(page.text)
    assert text.count(EVIL) == 2 and "<b>What?</b>" in text  # under A and under B
    assert {"script", "description", "i"}.isdisjoint({tag for tag, _ in page.tags})
    assert not page.of("img") and not page.of("link") and "url(" not in text and "@import" not in text
    assert [attributes["id"] for attributes in page.of("article")].count('sample-a"b/<i>-0') == 1


def shown(page: Page) -> list[tuple[str | None, str | None]]:
    return [(one["class"], one["title"]) for one in page.of("span")]


def test_tokens_have_the_colour_of_their_credit(saver: Saver) -> None:
    run = saver.save("objective.preset=perception_credit", "objective.format_weight=0", rewards=their_rewards())
    report = run.credit("see_think")
    out = run.folder / "page.html"
    write_credit(replace(report, samples=report.samples[:1]), out)
    html = out.read_text()
    found = shown(Page(html))
    first, second = report.samples[0].responses[0].pieces
    assert (first.credits[0] > 0) != (second.credits[0] > 0), "answer and visual advantages of group 0 are opposite"
    assert [kind for kind, _ in found] == [
        "gain" if piece.credits[side] > 0 else "loss" for side in range(2) for piece in (first, second)
    ]
    assert found[0][1] == f"{first.credits[0]:+.3g} a token"
    strengths = [int(value) for value in re.findall(r"--strength: (\d+)%", html)]
    largest = max(abs(piece.credits[0]) for piece in (first, second))
    assert strengths[:2] == [round(100 * (0.14 + 0.56 * abs(piece.credits[0]) / largest)) for piece in (first, second)]
    assert strengths[2:] == [70, 70]


def test_a_character_of_two_pieces_is_told_once(saver: Saver) -> None:
    ids = saver.processor.text_ids("é三")
    assert len(ids) > 2, "the characters are split"
    credit = torch.arange(2 * len(ids), dtype=torch.float64).view(2, -1)
    pieces = list(credit_pieces(saver.processor, ids, credit))
    assert len(pieces) == len(ids) and "".join(piece.text for piece in pieces) == "é三"
    assert [piece.credits for piece in pieces] == [tuple(pair) for pair in credit.T.tolist()]
    assert list(credit_pieces(saver.processor, (), credit[:, :0])) == []


def test_a_token_is_of_one_segment(saver: Saver) -> None:
    """The answer stands within the thought."""
    groups = two_groups(saver.processor)
    text = r"<description> 3 7 </description> <think> \boxed{10} </think>"
    groups = [
        replace(group, pairs=tuple(with_text(saver.processor, pair, text) for pair in group.pairs)) for group in groups
    ]
    run = saver.save("objective.preset=perception_credit", rewards=their_rewards(), groups=groups)
    report = run.credit("see_think")
    counts = {region.segment: region.num_tokens for region in report.regions}
    assert sum(counts.values()) == report.num_tokens and counts.keys() == {"description", "think", "outside"}
    for side in range(2):
        parts = sum(region.masses[side] for region in report.regions)
        assert parts == pytest.approx(report.comparison.masses[side])


def test_what_is_equal_says_so(run: SavedRun, capsys: pytest.CaptureFixture[str]) -> None:
    out = run.folder / "same.html"
    printed = command(run, "--preset", "gdpo", "--against", "gdpo", "--out", str(out), capsys=capsys)
    assert "No sample has another credit." in out.read_text() and "largest change" not in printed


def test_a_dead_step_has_no_credit(saver: Saver, capsys: pytest.CaptureFixture[str]) -> None:
    run = saver.save(rewards={})
    printed = command(run, "--against", "summed", capsys=capsys)
    assert "A 0, B 0" in printed and "(100.0 %)" in " ".join(printed.split())
    assert "No sample has another credit." in (run.folder / "credit.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step", "5", "--against", "summed"], "rollouts has no rollouts of step 5. It has 0"),
        (["--step", "0", "--against", "sumed"], "--against sumed: neither a preset nor a file"),
        (["--step", "0", "--preset", "x.yaml", "--against", "gdpo"], "--preset x.yaml: neither a preset nor a file"),
        (["--step", "0", "--against", "gdpo", "--out", "page.txt"], "--out page.txt is not allowed"),
        (["--step", "0", "--against", "external_reasoner"], "the objective external_reasoner: "),
    ],
)
def test_mistakes_are_one_line(
    run: SavedRun, words: list[str], message: str, capsys: pytest.CaptureFixture[Any]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["credit", str(run.folder), *words])
    written = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and message in written and "\n" not in written
    assert not (run.folder / "credit.html").exists()


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["credit", str(tmp_path), "--step", "0", "--against", "gdpo"])
    assert "is not the folder of a GRPO run that has saved rollouts" in capsys.readouterr().err
