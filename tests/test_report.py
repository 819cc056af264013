"""The report page: one file, every model text escaped, every number where it belongs."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from megatron_sr1.cli.command import main
from megatron_sr1.config import dump_config, load_config
from megatron_sr1.report import find_runs, print_table, summary_rows, write_report
from megatron_sr1.report.curves_section import seed_groups
from megatron_sr1.report.plots import CHARTS, chart_names, running_mean, series
from megatron_sr1.report.runs import read_run
from megatron_sr1.report.starts import note_start
from megatron_sr1.report.summary_table import COLUMNS, SummaryRow, comparison_rows
from megatron_sr1.report.viewer.page import viewer_script

VOID = {"meta", "img", "source", "br", "link", "input"}
EVIL = (
    '<script>alert(1)</script> & "quoted" <description>a 3</description></pre></title></style><svg/onload=alert(1)>'
    """<img src=x onerror=alert(1)><a href="javascript:alert(1)">x</a>" onmouseover="alert(1)' onfocus='alert(1)<!--"""
)


class Page(HTMLParser):
    """Checks nesting while reading; keeps tags, text, the cells of each table, and the data of the viewer."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.data: dict[str, Any] = {}
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.table = self.tables.setdefault(dict(attrs)["id"], [])
        elif tag == "tr":
            self.table.append([])
        elif tag in ("td", "th"):
            self.table[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if self.open and self.open[-1] == "script":
            name = self.tags[-1][1].get("data-chunk")
            if name is not None:
                stamp = self.data.get("index", {}).get("stamp")
                self.data[name.removeprefix(f"{stamp}-")] = json.loads(data)
            return
        self.text.append(data)
        if "table" in self.open and {"td", "th"} & set(self.open):
            self.table[-1][-1] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def example(key: str = "a/1", **changes) -> dict:
    values = {
        "key": key,
        "problem": "What is 3 + 4?",
        "answer": "7",
        "images": ["eval/images/x.png"],
        "first": "<description>a 3</description><think>3+4</think>\\boxed{7}",
        "second": EVIL,
        "description": "a 3",
        "rewards": {"accuracy": 1.0, "visual": 0.0, "leak": 0.0},
        "faithful": True,
    }
    return values | changes


def make_run(path: Path, preset: str, evaluations: dict[str, tuple[int, float, float | None]], steps: int = 30) -> Path:
    images = path / "eval" / "images"
    images.mkdir(parents=True)
    Image.new("RGB", (8, 8), "navy").save(images / "x.png")
    (path / "config.yaml").write_text(dump_config(load_config(None, [f"objective.preset={preset}"])))
    lines = [
        {"step": s, "reward/total": s / 10, "reward/format": 1.0, "kl/answer": None if s == 1 else 0.1}
        for s in range(steps)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for label, (step, accuracy, faithful) in evaluations.items():
        tree = {
            "label": label,
            "step": step,
            "summary": {
                "accuracy": accuracy,
                "second_pass_accuracy": 0.25,
                "language_shortcut_rate": 0.2 - accuracy / 10,
                "faithful": faithful,
                "format": 1.0,
                "leak": 0.0,
                "num_prompts": 40,
            },
            "by_source": {"sum<2>": {"accuracy": accuracy, "num_prompts": 40}},
            "examples": [example(), example("a/2", second=None, description=None, faithful=None, first=EVIL)],
        }
        (path / "eval" / f"{label}.json").write_text(json.dumps(tree))
    return path


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return make_run(tmp_path / "grpo", "vision_sr1", {"after": (30, 0.75, None), "before": (0, 0.5, 0.375)})


@pytest.fixture
def page(run_dir, tmp_path) -> Page:
    out = tmp_path / "new" / "report.html"
    write_report([run_dir], out)
    return Page(out.read_text(encoding="utf-8"))


def test_table_has_before_then_after_with_differences(page) -> None:
    head, before, after = page.tables["summary"]
    assert [cell.split(" ")[0] for cell in head] == [
        "",
        "accuracy",
        "second",
        "LSR",
        "faithful",
        "format",
        "leak",
        "prompts",
    ]
    assert before == ["before step 0", "50.0", "25.0", "15.0", "37.5", "100.0", "0.0", "40"]
    assert after == ["after step 30", "75.0 +25.0", "25.0 +0.0", "12.5 -2.5", "–", "100.0 +0.0", "0.0 +0.0", "40"]
    kinds = [attributes["class"] for attributes in page.of("small") if "class" in attributes]
    assert kinds == ["good", "same", "good", "same", "same"]  # a lower LSR is good
    assert page.tables["sources"][1] == ["sum<2>", "50.0", "75.0", "40"]


def test_controls_have_a_table_where_they_were_asked(page, run_dir, tmp_path) -> None:
    assert "controls" not in page.tables
    path = run_dir / "eval" / "after.json"
    tree = json.loads(path.read_text())
    tree["summary"] |= {
        "prior_accuracy": 0.125,
        "sufficiency": 0.125,
        "sufficiency_low": -0.01,
        "sufficiency_high": 0.26,
        "shuffled_accuracy": 0.2,
        "shuffled_same_question": 1.0,
    }
    path.write_text(json.dumps(tree))
    write_report([run_dir], tmp_path / "r.html")
    head, after = Page((tmp_path / "r.html").read_text(encoding="utf-8")).tables["controls"]
    assert head == ["", "second pass", "prior", "sufficiency", "shuffled", "same question"]
    assert after == ["after step 30", "25.0", "12.5", "12.5 -1.0 – 26.0", "20.0", "100.0"]


def test_page_needs_nothing_from_outside(page) -> None:
    addresses = [a["src"] for a in page.of("img")] + [a["srcset"] for a in page.of("source")]
    images = page.data["images"].values()
    assert addresses and images
    assert all(address.startswith("data:image/png;base64,") for address in (*addresses, *images))
    for address in (*addresses, *images):
        Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))).verify()
    assert not [script for script in page.of("script") if "src" in script] and not page.of("link")
    assert "url(" not in "".join(page.text) and "@import" not in "".join(page.text)


def test_nothing_runs_but_the_page_s_own_script(page, run_dir, tmp_path) -> None:
    policy = next(meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and "unsafe" not in policy and "*" not in policy
    digest = base64.b64encode(hashlib.sha256(viewer_script().encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{digest}' 'self'" and "'self'" not in rules["style-src"]


def test_model_text_is_data_and_never_markup(page, run_dir, tmp_path) -> None:
    write_report([run_dir], tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "alert(1)" in html and "<script>alert" not in html and "<img src=x" not in html
    assert json.dumps(page.data["r0-s1-0"]).count(json.dumps(EVIL)[1:-1]) == 2
    assert {"description", "think", "svg"}.isdisjoint({tag for tag, _ in page.tags})
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_names_of_any_kind_are_text_too(run_dir: Path, tmp_path: Path) -> None:
    """Of samples, sources, rewards, labels and metrics, which come from data and from code of others."""
    path = run_dir / "eval" / "after.json"
    tree = json.loads(path.read_text())
    label = "<svg onload=alert(1)>"
    tree |= {"label": label, "by_source": {EVIL: tree["by_source"][next(iter(tree["by_source"]))]}}
    texts = dict.fromkeys(("key", "problem", "answer", "first", "second", "description"), EVIL)
    tree["examples"] = [{**tree["examples"][0], **texts, "rewards": {EVIL: 1.0}}]
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"after\.json calls itself '<svg"):
        read_run(run_dir)
    path.rename(path.with_name(f"{label}.json"))
    write_report([run_dir], tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert EVIL in "".join(page.text) and label in "".join(page.text)  # the tables; the rest is data
    (group,) = page.data["r0-s1-0"]
    assert [group[name] for name in ("key", "problem", "answer")] == [EVIL] * 3
    assert page.data["index"]["runs"][0]["sets"][1]["name"] == label
    assert {"svg", "description"}.isdisjoint({tag for tag, _ in page.tags})
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_charts_are_those_that_have_numbers(page) -> None:
    alts = [attributes["alt"] for attributes in page.of("img") if "over training" in attributes["alt"]]
    titles = ("Rewards", "Distance from the reference model, by stream")
    assert alts == [f"{title} over training steps" for title in titles]
    assert len(page.of("source")) == len(alts)


def test_examples_are_in_the_viewer(page) -> None:
    """Where there are no records; those are in test_viewer.py."""
    before, after = page.data["index"]["runs"][0]["sets"]
    assert (before["name"], after["name"], after["samples"], after["problem"]) == ("before", "after", 2, "")
    assert "no advantages" in after["absent"]["advantage"] and "without tokens" in after["absent"]["surprise"]
    first, second = page.data["r0-s1-0"]
    assert first["key"] == "a/1" and first["images"] == list(page.data["images"])
    (sample,) = first["samples"]
    assert sample["rewards"] == {"accuracy": 1.0, "visual": 0.0, "leak": 0.0, "faithful": 1.0}
    assert [response["pass_name"] for response in sample["responses"]] == ["first", "second"]
    (undescribed,) = second["samples"]
    assert undescribed["description"] is None and len(undescribed["responses"]) == 1
    assert not undescribed["filters"] and not sample["filters"]
    assert all("do not say what was cut" in after["absent"][name] for name in ("cut", "undescribed"))


def test_seeds_are_one_line_and_differences_a_table(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, "vision_sr1", {}) for name in ("a", "b", "c")]
    for run, seed, rate in zip(runs, (1, 2, 1), (1e-6, 1e-6, 2e-6), strict=True):
        words = [f"seed={seed}", f"optimizer.lr={rate}", f"run_dir={run}", "objective.preset=vision_sr1"]
        (run / "config.yaml").write_text(dump_config(load_config(None, words)))
    note_start(runs[0], "text", 0, {"versions": "torch <9>", "ranks": 2})
    read = [read_run(run) for run in runs]
    assert [[run.name for run in group] for group in seed_groups(read)] == [["a", "b"], ["c"]]
    assert [[run.name for run in group] for group in seed_groups([*read, read[1]])] == [["a"], ["b"], ["b"], ["c"]]
    write_report(runs, tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.tables["differences"][0] == ["", "a", "b", "c"]
    assert {row[0]: row[1:] for row in page.tables["differences"][1:]} == {
        "seed": ["1", "2", "1"],
        "optimizer.lr": ["1e-06", "1e-06", "2e-06"],
    }
    assert page.tables["machines"] == [["", "from step", "versions", "ranks"], ["a", "0", "torch <9>", "2"]]
    assert "Not noted of b, c" in " ".join(page.text)


def test_phases_have_their_share_of_a_step(run_dir: Path, tmp_path: Path) -> None:
    lines = [{"step": s, "seconds/rollout": 3.0, "seconds/train": 1.0 + 2 * (s == 2)} for s in range(3)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report([run_dir], tmp_path / "r.html")
    table = Page((tmp_path / "r.html").read_text(encoding="utf-8")).tables["times"]
    assert table == [["", "rollout", "train", "together", "steps"], ["grpo", "3 (75 %)", "1 (25 %)", "4", "3"]]


def test_ablation_has_one_row_per_preset_under_the_common_start(tmp_path) -> None:
    a = make_run(tmp_path / "x1", "see_think", {"before": (0, 0.5, None), "after": (30, 0.6, None)})
    b = make_run(tmp_path / "x2", "vision_sr1", {"before": (0, 0.5, None), "after": (30, 0.7, None)})
    rows = write_report([a, b], tmp_path / "r.html").rows
    assert [(row.label, row.values["accuracy"]) for row in rows] == [
        ("before", 0.5),
        ("see_think", 0.6),
        ("vision_sr1", 0.7),
    ]
    assert len(Page((tmp_path / "r.html").read_text()).of("figure")) == 2  # both runs share each chart


def test_runs_that_started_apart_keep_their_own_start_and_same_presets_take_folder_names(tmp_path) -> None:
    a = make_run(tmp_path / "one", "vision_sr1", {"before": (0, 0.4, None), "after": (30, 0.6, None)})
    b = make_run(tmp_path / "two", "vision_sr1", {"before": (0, 0.5, None), "after": (30, 0.7, None)})
    rows = comparison_rows([read_run(a), read_run(b)])
    assert [row.label for row in rows] == ["one, before", "two, before", "one", "two"]


def test_folder_of_runs_stands_for_its_runs(tmp_path, run_dir) -> None:
    make_run(tmp_path / "sft", "vision_sr1", {})
    (tmp_path / "data").mkdir()
    assert find_runs([tmp_path]) == [run_dir, tmp_path / "sft"]
    assert find_runs([run_dir]) == [run_dir]
    assert [row.label for row in write_report(find_runs([tmp_path]), tmp_path / "r.html").rows] == ["before", "after"]
    with pytest.raises(ValueError, match="data holds no run"):
        find_runs([tmp_path / "data"])
    with pytest.raises(ValueError, match="nowhere holds no run"):
        find_runs([tmp_path / "nowhere"])


def test_run_without_evaluation_says_so(tmp_path) -> None:
    write_report([make_run(tmp_path / "sft", "vision_sr1", {})], tmp_path / "r.html")
    assert "No evaluation yet." in " ".join(Page((tmp_path / "r.html").read_text()).text)
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path / "r.html")


def test_terminal_table_has_the_same_numbers(run_dir) -> None:
    out = io.StringIO()
    print_table(Console(file=out, width=120), summary_rows(run_dir))
    lines = [line.replace("│", " ").split() for line in out.getvalue().splitlines()]
    assert ["before", "50.0", "25.0", "15.0", "37.5", "100.0", "0.0", "40"] in lines
    assert ["after", "75.0", "25.0", "12.5", "–", "100.0", "0.0", "40"] in lines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": ["eval/images/none.png"]}, "none.png is missing"),
        ({"images": ["../../secret.png"]}, "lies outside the run folder"),
    ],
)
def test_bad_image_is_named(run_dir, change, message) -> None:
    file = run_dir / "eval" / "after.json"
    tree = json.loads(file.read_text())
    file.write_text(json.dumps(tree | {"examples": [example(**change)]}))
    with pytest.raises(ValueError, match=f"'a/1'.*{message}"):
        read_run(run_dir)


def test_damaged_evaluation_and_metrics_are_named(run_dir) -> None:
    (run_dir / "eval" / "after.json").write_text('{"label": "after"}')
    with pytest.raises(ValueError, match=r"after\.json lacks the key 'step'"):
        read_run(run_dir)
    (run_dir / "eval" / "after.json").unlink()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "rew')  # a line being written: not an error
    assert len(read_run(run_dir).metrics) == 30
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:31 is not JSON"):
        read_run(run_dir)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"[1, 2]", "holds a list, not an object"),
        (b"3", "holds a int, not an object"),
        (b'{"step": 30, "reward/total": "high"}', "has reward/total='high', which is no number"),
        (b'{"reward/total": 1.0}', "has no step"),
        (b"\xff\xfe{}", "is no text in UTF-8"),
        (b"\0\0\0\0", "is not JSON"),
    ],
)
def test_a_damaged_line_of_metrics_is_named(
    run_dir: Path, line: bytes, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command: one line, no traceback."""
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(SystemExit):
        main(["report", str(run_dir)])
    written = capsys.readouterr().err.strip()
    assert "\n" not in written and "metrics.jsonl" in written and reason in written


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ([], "holds a list"),
        ({"summary": 3}, "summary is a int, not a dict"),
        ({"summary": {"accuracy": "high"}}, "accuracy='high' is no number"),
        ({"by_source": {"a": 1}}, "after.json is damaged"),
        ({"examples": {"a": 1}}, "examples is a dict, not a list"),
        ({"examples": ["a"]}, "after.json is damaged"),
        ({"step": None}, "step is a NoneType, not a int"),
    ],
)
def test_a_damaged_evaluation_is_named(
    run_dir: Path, change: object, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run_dir / "eval" / "after.json"
    tree = json.loads(file.read_text()) | change if isinstance(change, dict) else change
    file.write_text(json.dumps(tree))
    with pytest.raises(SystemExit):
        main(["report", str(run_dir)])
    written = capsys.readouterr().err.strip()
    assert "\n" not in written and "after.json" in written and reason in written


def test_a_run_that_is_given_twice_counts_once(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run_dir)
    twice = [run_dir, run_dir, run_dir / ".." / run_dir.name, tmp_path / "link"]
    assert find_runs(twice) == [run_dir]
    assert {path.resolve() for path in find_runs([run_dir, run_dir.parent])} == {run_dir.resolve()}


def test_series_keeps_gaps_and_running_mean_skips_them(run_dir) -> None:
    run = read_run(run_dir)
    assert chart_names(run, CHARTS[0]) == ["reward/format", "reward/total"]
    steps, values = series(run.metrics[:3], "kl/answer")
    assert steps == [0.0, 1.0, 2.0] and values[1] != values[1]
    assert running_mean([1.0, float("nan"), 3.0, 5.0], 2) == [1.0, 1.0, 3.0, 4.0]


def test_one_chart_as_a_file(run_dir, tmp_path) -> None:
    tool = Path(__file__).parent.parent / "tools" / "draw_chart.py"
    out = tmp_path / "docs" / "chart.png"
    subprocess.run([sys.executable, str(tool), str(run_dir), "--chart", "Rewards", "--out", str(out)], check=True)
    assert Image.open(out).size[0] > 300
    missing = subprocess.run(
        [sys.executable, str(tool), str(run_dir), "--chart", "Gradient norm", "--out", str(out)], capture_output=True
    )
    assert missing.returncode == 2 and b"none of the runs" in missing.stderr


def test_names_are_no_markup() -> None:
    """Of folders, sources and tensors: the names are other people's."""
    out = io.StringIO()
    values: dict[str, float | None] = {column.key: 0.5 for column in COLUMNS}
    row = SummaryRow("a[/x] [bold]", 1, {**values, "num_prompts": 3}, {})
    print_table(Console(file=out, width=120), [row])
    assert "a[/x] [bold]" in out.getvalue()
