"""The numbers of a sweep: hand-counted means, spreads and paired differences, the same in every file and the page."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from megatron_sr1.config import dump_config, load_config
from megatron_sr1.report import RunGroup, print_tables, write_sweep_report
from megatron_sr1.report.sweep.bands import band, band_names, draw_bands
from megatron_sr1.report.sweep.groups import LAST_STEPS, GroupRow, sweep_rows
from megatron_sr1.report.sweep.statistics import estimate, paired_difference
from tests.test_report import Page, example

STEPS = 20
ACCURACY = {"see_think": {1: 0.50, 2: 0.60, 3: 0.70}, "vision_sr1": {1: 0.58, 2: 0.66, 4: 0.90}}


def make_seed(folder: Path, preset: str, seed: int, accuracy: float, steps: int = STEPS, start: float = 0.25) -> Path:
    """A run of STEPS steps of which `steps` are done. Its reward is 0 until the last LAST_STEPS, then the accuracy."""
    path = folder / f"{preset}-seed{seed}"
    images = path / "eval" / "images"
    images.mkdir(parents=True)
    Image.new("RGB", (8, 8), "navy").save(images / "x.png")
    keys = [f"objective.preset={preset}", f"seed={seed}", f"train.steps={STEPS}"]
    (path / "config.yaml").write_text(dump_config(load_config(None, keys)))
    lines = [
        {
            "step": step,
            "reward/total": accuracy if step >= STEPS - LAST_STEPS else 0.0,
            "reward/acc": accuracy,
            "accuracy": accuracy,
            "second/response_tokens": None if step == STEPS - 1 else 10.0 + seed,  # null: was not finite
            "seconds/first_pass": 99.0,  # beside the rollout, not after it
            "seconds/rollout": 100.0 if step == 0 else 2.0,
            "seconds/train": 1.0,
            **({"reward/acc_vis": 0.5} if preset == "vision_sr1" else {}),
        }
        for step in range(steps)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    labels = {"before": (0, start), "after": (STEPS, accuracy)} if steps == STEPS else {"before": (0, start)}
    for label, (step, value) in labels.items():
        summary = {"accuracy": value, "second_pass_accuracy": 0.5, "language_shortcut_rate": 0.1, "leak": 0.0}
        tree = {"summary": {**summary, "format": 1.0, "faithful": None, "num_prompts": 40}, "by_source": {}}
        (path / "eval" / f"{label}.json").write_text(
            json.dumps({"label": label, "step": step, "examples": [example()], **tree})
        )
    return path


@pytest.fixture
def groups(tmp_path: Path) -> list[RunGroup]:
    made = [
        RunGroup(preset, "", {seed: make_seed(tmp_path, preset, seed, value) for seed, value in seeds.items()})
        for preset, seeds in ACCURACY.items()
    ]
    late = {5: make_seed(tmp_path, "vision_sr1", 5, 0.1, steps=7), 6: tmp_path / "vision_sr1-seed6"}
    return [made[0], RunGroup("vision_sr1", "", {**made[1].runs, **late})]


@pytest.fixture
def rows(groups: list[RunGroup]) -> list[GroupRow]:
    return sweep_rows(groups)


def test_spread_by_hand() -> None:
    assert estimate([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]).std == pytest.approx(math.sqrt(32 / 7))
    assert (estimate([3.0]).mean, estimate([3.0]).std, estimate([3.0]).num) == (3.0, None, 1)
    difference = paired_difference({1: 5.0, 2: 7.0, 9: 100.0}, {1: 4.0, 2: 4.0, 8: 0.0})
    assert difference is not None  # over seeds 1 and 2: 1 and 3, std sqrt(2), standard error 1
    assert (difference.mean, difference.error, difference.num) == (2.0, pytest.approx(1.0), 2)
    one = paired_difference({1: 5.0}, {1: 4.0})
    assert one is not None and (one.mean, one.error, one.num) == (1.0, None, 1)
    assert paired_difference({1: 5.0}, {2: 4.0}) is None


@given(st.lists(st.tuples(st.floats(-100, 100), st.floats(-100, 100)), min_size=2, max_size=8))
def test_spread_equals_numpy(pairs: list[tuple[float, float]]) -> None:
    first, second = ([pair[side] for pair in pairs] for side in (0, 1))
    found = estimate(first)
    assert (found.mean, found.std) == (pytest.approx(np.mean(first)), pytest.approx(np.std(first, ddof=1), abs=1e-9))
    difference = paired_difference(dict(enumerate(first)), dict(enumerate(second)))
    assert difference is not None
    gaps = np.subtract(first, second)
    error = np.std(gaps, ddof=1) / np.sqrt(len(gaps))
    assert (difference.mean, difference.error) == (pytest.approx(np.mean(gaps)), pytest.approx(error, abs=1e-9))


def test_rows_count_finished_runs_only(rows: list[GroupRow]) -> None:
    first, second = rows
    accuracy = first.after["accuracy"]
    assert (accuracy.mean, accuracy.std, accuracy.num) == (pytest.approx(0.6), pytest.approx(0.1), 3)
    assert second.after["accuracy"].mean == pytest.approx((0.58 + 0.66 + 0.90) / 3)
    assert second.after["accuracy"].num == 3
    assert second.unfinished == ("vision_sr1-seed5 (7 of 20 steps)", "vision_sr1-seed6 (not begun)")
    assert first.unfinished == () and first.differences == {}
    paired = second.differences["accuracy"]  # seeds 1 and 2: +0.08 and +0.06
    assert (paired.mean, paired.error, paired.num) == (pytest.approx(0.07), pytest.approx(0.01), 2)
    assert "faithful" not in first.after, "nobody knows it here"
    assert first.before["accuracy"].mean == 0.25 and first.before["accuracy"].std == 0.0


def test_training_numbers_are_of_the_last_steps(rows: list[GroupRow]) -> None:
    values = rows[0].per_seed[2]
    assert values["reward/total"] == pytest.approx(0.60), "zero before the last steps"
    assert values["second/response_tokens"] == 12.0, "a null is left out"
    assert values["seconds/step"] == 3.0, "rollout and training of the median step"
    assert "reward/acc_vis" not in values and rows[1].per_seed[1]["reward/acc_vis"] == 0.5


def test_every_file_has_the_same_numbers(groups: list[RunGroup], tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = write_sweep_report(groups, out).rows
    with (out / "sweep.csv").open(newline="") as file:
        lines = {(line["group"], line["measure"]): line for line in csv.DictReader(file)}
    line = lines["vision_sr1", "accuracy"]
    assert (line["seeds"], line["paired_seeds"], line["preset"], line["variant"]) == ("3", "2", "vision_sr1", "")
    assert float(line["std"]) == pytest.approx(np.std([0.58, 0.66, 0.90], ddof=1))
    assert float(line["paired_difference"]) == pytest.approx(0.07)
    assert float(line["paired_standard_error"]) == pytest.approx(0.01)
    assert lines["see_think", "accuracy"]["paired_difference"] == "" and float(line["before_mean"]) == 0.25

    tree = json.loads((out / "sweep.json").read_text())
    assert [group["group"] for group in tree] == ["see_think", "vision_sr1"]
    assert tree[0]["after"]["accuracy"] == {"mean": pytest.approx(0.6), "std": pytest.approx(0.1), "num": 3}
    assert tree[1]["by_seed"]["4"]["accuracy"] == 0.90
    assert tree[1]["unfinished"] == list(rows[1].unfinished)

    text = (out / "sweep.md").read_text()
    assert "| see_think | 3 | 60.0 ± 10.0 | 50.0 ± 0.0 |" in text
    assert "| vision_sr1 | 3 | 71.3 ± 16.7 |" in text and "| before | 6 | 25.0 | 50.0 |" in text
    assert "Paired differences to see_think" in text and "| vision_sr1 | 2 | +7.0 ± 1.0 | +0.0 ± 0.0 |" in text
    assert "| reward/acc_vis | – | 0.500 ± 0.000 |" in text and "vision_sr1-seed5 (7 of 20 steps)" in text


def test_controls_and_what_else_was_measured_are_shown(groups: list[RunGroup], tmp_path: Path) -> None:
    for number, path in enumerate([*groups[0].runs.values(), *groups[1].runs.values()]):
        after = path / "eval" / "after.json"
        if not after.is_file():
            continue
        tree = json.loads(after.read_text())
        tree["summary"] |= {"prior_accuracy": 0.1 * number, "sufficiency": 0.5 - 0.1 * number, "gold_accuracy": None}
        after.write_text(json.dumps(tree))
        (path / "measures.json").write_text(json.dumps({"auc": 0.9 + 0.01 * number, "unknown": None}))
    rows = write_sweep_report(groups, tmp_path / "out").rows
    assert rows[0].after["sufficiency"].mean == pytest.approx(0.4)
    assert rows[0].after["measures/auc"].mean == pytest.approx(0.91) and "measures/unknown" not in rows[0].after
    text = (tmp_path / "out" / "sweep.md").read_text()
    assert "| see_think | 3 | 10.0 ± 10.0 | 40.0 ± 10.0 |" in text, "prior and sufficiency; gold was asked nowhere"
    assert "Controls of the second pass" in text and "| auc | 0.910 ± 0.010 |" in text
    assert "| vision_sr1 | 2 | +30.0 ± 0.0 | -30.0 ± 0.0 |" in text, "paired over seeds 1 and 2"


@pytest.mark.parametrize("text", ['{"auc": "high"}', '{"auc": NaN}', '{"auc": -Infinity}', '{"auc": true}', "[1]", "{"])
def test_damaged_measures_are_named(groups: list[RunGroup], tmp_path: Path, text: str) -> None:
    path = groups[0].runs[1] / "measures.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"measures\.json"):
        write_sweep_report(groups, tmp_path / "out")


def test_page_has_the_tables_the_bands_and_the_runs(groups: list[RunGroup], tmp_path: Path) -> None:
    write_sweep_report(groups, tmp_path / "out")
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert page.tables["sweep-evaluation"][0][:3] == ["", "seeds", "accuracy"]
    assert page.tables["sweep-evaluation"][2][:3] == ["see_think", "3", "60.0 ± 10.0"]
    assert page.tables["sweep-paired"][1][:3] == ["vision_sr1", "2", "+7.0 ± 1.0"]
    assert ["reward/acc", "0.600 ± 0.100", "0.713 ± 0.167"] in page.tables["sweep-training"]
    assert [line[0] for line in page.tables["summary"]][1:] == [
        "before step 0",
        *(f"see_think-seed{seed} step 20" for seed in (1, 2, 3)),
        *(f"vision_sr1-seed{seed} step 20" for seed in (1, 2, 4)),
        "vision_sr1-seed5 step 0",
    ]
    assert len(page.of("figure")) == len(
        ("reward/total", "accuracy", "second/response_tokens", "reward/acc", "reward/acc_vis")
    )
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.of("img"))


def test_terminal_has_them_too(rows: list[GroupRow]) -> None:
    for width in (80, 120):
        out = io.StringIO()
        print_tables(Console(file=out, width=width), rows)
        words = out.getvalue().split()
        assert {"60.0", "10.0", "+7.0", "0.713", "before"} <= set(words)
        assert max(map(len, (line for line in out.getvalue().splitlines() if "─" in line))) <= width
    assert "60.0 ± 10.0" in out.getvalue() and "not in the numbers" in out.getvalue()


def test_a_narrow_terminal_or_a_file_loses_no_column(rows: list[GroupRow]) -> None:
    wide, narrow = io.StringIO(), io.StringIO()
    print_tables(Console(file=wide, width=1000), rows)
    print_tables(Console(file=narrow, width=20), rows)
    words = [sorted(text.getvalue().replace("─", "").split()) for text in (wide, narrow)]
    assert words[0] == words[1]


def test_a_single_seed_has_no_spread(tmp_path: Path) -> None:
    one = [RunGroup("gdpo", name, {1: make_seed(tmp_path / name, "gdpo", 1, value)}) for name, value in
           (("low", 0.25), ("high", 0.5))]  # fmt: skip
    write_sweep_report(one, tmp_path / "out")
    text = (tmp_path / "out" / "sweep.md").read_text()
    assert "| gdpo-low | 1 | 25.0 | 50.0 |" in text and "| gdpo-high | 1 | +25.0 | +0.0 |" in text


def test_starts_that_differ_have_a_row_each(tmp_path: Path) -> None:
    seeds = {seed: make_seed(tmp_path, "gdpo", seed, 0.5, start=0.1 * seed) for seed in (1, 3)}
    write_sweep_report([RunGroup("gdpo", "", seeds)], tmp_path / "out")
    assert "| gdpo, before | 2 | 20.0 ± 14.1 |" in (tmp_path / "out" / "sweep.md").read_text()


def test_a_sweep_of_cold_starts_has_losses_and_no_evaluation(tmp_path: Path) -> None:
    path = make_seed(tmp_path, "gdpo", 1, 0.5)
    for file in (path / "eval").glob("*.json"):
        file.unlink()
    lines = [{"step": step, "loss/sft/nll": 2.0 - step / STEPS, "seconds/step": 4.0} for step in range(STEPS)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_sweep_report([RunGroup("gdpo", "", {1: path})], tmp_path / "out")
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert list(page.tables) == ["sweep-training", "times"]
    assert page.tables["sweep-training"] == [
        ["", "gdpo"],
        ["seeds", "1"],
        ["loss", "1.275"],
        ["seconds a step", "4.00"],
    ]
    assert len(page.of("figure")) == 1


def test_a_sweep_without_a_step_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has made a step yet"):
        write_sweep_report([RunGroup("gdpo", "", {1: tmp_path / "none"})], tmp_path)


def test_bands_are_mean_and_spread_of_smoothed_curves(rows: list[GroupRow]) -> None:
    curves = {
        1: [{"step": step, "x": 1.0} for step in range(4)],
        2: [{"step": step, "x": 3.0} for step in range(3)],
        3: [{"step": 0, "x": None}],
    }
    points = band(curves, "x")
    assert [points[step].mean for step in range(4)] == [2.0, 2.0, 2.0, 1.0]
    assert points[0].std == pytest.approx(math.sqrt(2)) and points[3].std is None
    long = {1: [{"step": step, "x": float(step)} for step in range(100)]}
    assert band(long, "x")[50].mean == np.mean([46, 47, 48, 49, 50]), "a running mean over 5 % of the steps"
    assert band_names(rows)[:2] == ["reward/total", "accuracy"] and band_names(rows)[-1] == "reward/acc_vis"


def test_the_band_is_drawn(rows: list[GroupRow]) -> None:
    def shaded(name: str) -> int:
        data = base64.b64decode(draw_bands(rows, name, "light").split(",", 1)[1])
        alpha = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))[:, :, 3]
        return int(((alpha > 40) & (alpha < 60)).sum())  # 20 % opaque

    assert shaded("accuracy") > 5 * shaded("reward/acc_vis"), "which is the same for every seed"
