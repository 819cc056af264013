"""A gradient that is far from the usual is told, with the streams it comes from, as in a run that was never stopped."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from megatron_sr1.metrics import MetricsWriter, SpikeSink


def steps(folder: Path, start: int, end: int, said: list[str]) -> None:
    spikes = SpikeSink(folder, start, clip_grad=1.0, say=said.append)
    with MetricsWriter(folder, start, 40, Console(quiet=True), further=(spikes,)) as writer:
        for step in range(start, end):
            far = step in (5, 20, 30)
            values = {"grad_norm": 40.0 if far else 0.5 + 0.01 * (step % 7), "loss/visual/kl": 0.3 if far else -0.01}
            writer.write(
                step,
                {
                    **values,
                    "loss/answer/kl": 0.02,
                    "loss/answer/ratio_mean": 1.0,
                    "loss/own": 0.1,
                    "entropy": 9.0 * far,
                },
            )


def kept(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "spikes.jsonl").read_text().splitlines()]


def test_a_spike_is_told_with_its_streams_and_a_resumed_run_tells_the_same(tmp_path: Path) -> None:
    said: list[str] = []
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    steps(whole, 0, 40, said)
    assert said == [
        f"step {step}: the gradient norm 40 is 75 times its usual {usual} and was clipped to 1; visual: kl 0.3 "
        "(usually 0.01); answer: as usual; own: as usual"
        for step, usual in ((21, "0.53"), (31, "0.53"))
    ], "not the sixth: too little is known by then"
    found = kept(whole)
    assert [entry["step"] for entry in found] == [20, 30]
    assert found[0]["streams"] == {"visual": {"kl": [0.3, 0.01]}, "answer": {}, "own": {}}
    steps(resumed, 0, 33, said)
    with (resumed / "spikes.jsonl").open("a") as file:
        file.write('{"step": 32, "torn')  # by a kill
    steps(resumed, 18, 40, said)
    assert kept(resumed) == found


def test_a_run_whose_norms_are_no_numbers_or_small_has_no_spikes(tmp_path: Path) -> None:
    said: list[str] = []
    sink = SpikeSink(tmp_path, 0, clip_grad=1.0, say=said.append)
    for step in range(30):
        sink.write(step, {"grad_norm": float("nan") if step % 2 else 1e-3})
    sink.write(30, {"grad_norm": float("inf")})
    sink.write(31, {"grad_norm": 4.9e-3})
    assert not said
    sink.write(32, {"grad_norm": 5.1e-3})
    assert said == ["step 33: the gradient norm 0.0051 is 5 times its usual 0.001"]
