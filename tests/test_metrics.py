"""Metrics reduce the same however they are split over ranks; the file never holds a step twice."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tensorboard.backend.event_processing import event_accumulator

from megatron_sr1.metrics import JsonlSink, Metric, MetricLog, MetricsWriter, read_jsonl, reduce_over


def test_each_reduction() -> None:
    log = MetricLog()
    for value in (3.0, 1.0, 2.0):
        log.add("a/sum", value, "sum")
        log.add("a/mean", value)
        log.add("a/max", value, "max")
        log.add("a/min", value, "min")
        log.add("a/last", value, "last")
    assert log.reduce() == {"a/sum": 6.0, "a/mean": 2.0, "a/max": 3.0, "a/min": 1.0, "a/last": 2.0}


def test_mean_is_weighted_by_what_it_averages() -> None:
    metrics = [Metric("x", 1.0, "mean", 3), Metric("x", 5.0, "mean", 1)]
    assert reduce_over(metrics) == {"x": 2.0}


@given(
    st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(0.1, 100)), min_size=1, max_size=20),
    st.integers(1, 4),
    st.sampled_from(["sum", "mean", "max", "min"]),
)
def test_split_over_ranks_changes_nothing(values, num_ranks, reduction) -> None:
    metrics = [Metric("x", value, reduction, weight) for value, weight in values]
    by_rank = [metrics[rank::num_ranks] for rank in range(num_ranks)]
    gathered = [metric for rank in by_rank for metric in rank]
    assert reduce_over(gathered)["x"] == pytest.approx(reduce_over(metrics)["x"], rel=1e-12, abs=1e-9)


def test_two_reductions_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'x'.*mean, sum"):
        reduce_over([Metric("x", 1.0), Metric("x", 1.0, "sum")])


@pytest.mark.parametrize("arguments", [("x", 1.0, "median"), ("x", 1.0, "mean", 0.0)])
def test_bad_metric_names_itself(arguments) -> None:
    with pytest.raises(ValueError, match="metric 'x'"):
        Metric(*arguments)


def steps(path: Path) -> list[float]:
    return [entry["step"] for entry in read_jsonl(path)]


def test_jsonl_is_on_disk_after_every_step_and_resumes_without_doubles(tmp_path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonlSink(path, 0)
    for step in range(5):
        sink.write(step, {"loss": step / 2})
        assert steps(path) == list(range(step + 1))  # before close
    sink.close()

    sink = JsonlSink(path, 3)  # the checkpoint was of step 3: steps 3 and 4 run again
    assert steps(path) == [0, 1, 2]
    sink.write(3, {"loss": 9.0})
    sink.close()
    assert [entry["loss"] for entry in read_jsonl(path)] == [0.0, 0.5, 1.0, 9.0]

    JsonlSink(path, 0).close()  # a run that starts over keeps nothing
    assert steps(path) == []


def test_torn_last_line_is_dropped_but_damage_inside_is_named(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
    sink = JsonlSink(path, 2)
    sink.write(2, {"loss": 2.0})
    sink.close()
    assert steps(path) == [0, 2]

    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not JSON"):
        JsonlSink(path, 3)
    path.write_text('{"loss": 0}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1 holds no step"):
        read_jsonl(path)


def test_jsonl_refuses_a_step_that_goes_back(tmp_path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", 0)
    sink.write(4, {})
    with pytest.raises(ValueError, match="step 4 was written after step 4"):
        sink.write(4, {})
    sink.close()


def test_jsonl_stays_valid_json_when_a_value_is_not_finite(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, 0)
    sink.write(0, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
    sink.close()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    entry = json.loads(path.read_text(), parse_constant=refuse)
    assert entry == {"step": 0, "loss": None, "grad_norm": None, "lr": 0.5}


def test_writer_feeds_every_sink(tmp_path) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=False)
    with MetricsWriter(tmp_path, 0, 3, console) as writer:
        for step in range(3):
            writer.write(step, {"loss": 3.0 - step})
    with MetricsWriter(tmp_path, 2, 3, console) as writer:
        writer.write(2, {"loss": 0.5})

    assert [entry["loss"] for entry in read_jsonl(tmp_path / "metrics.jsonl")] == [3.0, 2.0, 0.5]
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 3.0), (1, 2.0), (2, 0.5)]
    assert [line.split("  ")[0] for line in out.getvalue().splitlines()] == [
        *(f"step {n}/3" for n in (1, 2, 3)),
        "step 3/3",
    ]


def test_writer_closes_its_files_when_the_step_fails(tmp_path) -> None:
    with pytest.raises(RuntimeError), MetricsWriter(tmp_path, 0, 3, Console(file=io.StringIO())) as writer:
        writer.write(0, {"loss": 1.0})
        raise RuntimeError
    with pytest.raises(ValueError, match="closed file"):
        writer.write(1, {"loss": 1.0})
