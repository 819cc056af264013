"""The main job for real: shards, Megatron-Core over two ranks, vLLM, rewards, resume after a kill, export, report."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sr1.metrics.watching import look, written
from megatron_sr1.prompts import CAPTION_REASONER, extract_boxed
from megatron_sr1.report.starts import read_starts
from megatron_sr1.rewards import grade
from megatron_sr1.training.rollout_files import rollouts_file, step_files, step_lines, steps_in
from megatron_sr1.training.token_files import read_tokens
from tests.commands import ForkedError, run_forked
from tests.judge_server import serve
from tests.test_report import Page
from tests.workspace import PHASES, REPOSITORY, RUN_TIMEOUT, Workspace, untimed

START_TIMEOUT = 300  # seconds
PARTS = ("response", "description", "think", "answer")


def test_the_cold_start_learned_the_layouts(finished: Workspace) -> None:
    losses = [entry["loss/sft/nll"] for entry in finished.metrics("sft")]
    assert losses[-1] < 0.3 * losses[0] and len(losses) == 60, "4.8 epochs of 400 samples, 32 a step"
    assert finished.summary("whole", "before")["format"] > 0.5


def test_step_one_has_ratio_one_and_kl_zero(finished: Workspace) -> None:
    first = finished.metrics("whole")[0]
    for stream in ("answer", "visual"):
        assert first[f"loss/{stream}/kl"] == 0.0
        assert first[f"loss/{stream}/ratio_mean"] == pytest.approx(first[f"loss/{stream}/weight"], abs=1e-12)
        assert first[f"loss/{stream}/clip_fraction"] == 0.0
    later = finished.metrics("whole")[-1]
    assert later["loss/answer/kl"] > 0 and later["loss/visual/kl"] > 0


def test_the_parts_of_a_step_are_the_phases_that_are_planned(finished: Workspace) -> None:
    """`tests/test_recipes.py` finds these phases in the plans."""
    entries = finished.metrics("whole")
    timed = {name.removeprefix("seconds/") for entry in entries for name in entry if name.startswith("seconds/")}
    assert timed - {"first_pass", "second_pass"} == PHASES.keys(), "the passes run within the rollout"
    assert all("seconds/save" in entry for entry in entries[1:]) and "seconds/save" not in entries[0]


def test_what_masking_the_image_changes_is_measured_in_every_step(finished: Workspace) -> None:
    """Little: so short a cold start has not learned to read digits. What others draw is compared below."""
    gaps = {part: [entry[f"dependency/masked/{part}"] for entry in finished.metrics("whole")] for part in PARTS}
    assert all(len(set(values)) == 8 and all(0 < abs(value) < 1 for value in values) for values in gaps.values()), gaps


def test_trainer_and_generator_agree_after_every_update(finished: Workspace) -> None:
    """Sampled responses with images and without, eight updates at a large learning rate; the mean over a step's
    tokens. Stale weights in the engine would show here at once."""
    gaps = [entry["logprob_gap"] for entry in finished.metrics("whole")]
    assert len(gaps) == 8 and max(gaps) < 1e-5


def test_a_step_that_was_traced_has_its_parts_by_name(finished: Workspace) -> None:
    with gzip.open(finished.folder / "whole" / "profile" / "step_000003_rank_00000.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
    assert names["rollout"] == names["train"] == names["sync"] == names["reference"] == 1
    assert names["rollout/first"] and names["rollout/second"] and names["save"]
    assert names["rollout/first"] + names["rollout/second"] == names["engine step"]


def test_a_run_says_what_its_steps_have_computed_and_how_it_went(finished: Workspace) -> None:
    entries = finished.metrics("whole")
    assert all(entry["flops"] > 1e8 and entry["trained_tokens_per_second"] > 0 for entry in entries)
    assert not any("mfu" in entry or "memory/peak_gib" in entry for entry in entries), "nobody knows these of a CPU"
    streams = {name for name in entries[0] if name.startswith("reward/stream/")}
    assert len(streams) == 2 and sum(entries[0][name] for name in streams) == pytest.approx(entries[0]["reward/total"])
    view = look(finished.folder / "whole")
    assert view.is_over and view.status is not None and view.status.done == view.status.steps == 8
    stages = [name for name, _ in view.status.stages]
    assert stages[:6] == ["ranks", "data", "model", "engines", "canary", "preflight"] and "export" in stages
    assert stages.count("evaluation") == 4 and "evaluated after step 8" in view.evaluation
    (last, *_) = (line for line in written(view) if line.startswith("step 8/8"))
    assert "reward" in last and "left" not in last
    events = EventAccumulator(str(finished.folder / "whole" / "tensorboard" / "samples"), {"images": 0})
    events.Reload()
    rollouts, evaluations = (events.Images(f"samples/{name}/0/image_0") for name in ("rollouts", "eval"))
    assert [event.step for event in rollouts] == [0, 3, 6] and [event.step for event in evaluations] == [0, 3, 6, 8]


def test_every_sampled_token_agrees_to_a_thousandth(finished: Workspace) -> None:
    """The exported policy's rollouts, scored again by the policy itself, token by token."""
    from tests.ranks import run_ranks

    rollouts = finished.folder / "whole" / "rollouts" / "step_000000.jsonl"
    run_ranks(1, _check_rollouts, str(finished.folder / "sft" / "hf"), str(rollouts), str(finished.folder / "data"))


def _check_rollouts(rank: int, num_ranks: int, hf_dir: str, rollouts: str, data: str) -> None:
    from megatron_sr1.platform import start_platform

    platform = start_platform()
    from megatron_sr1.config import load_config
    from megatron_sr1.data import ShardDataset, expand_shards
    from megatron_sr1.packing import gather_rows, pack
    from megatron_sr1.policy import Policy
    from megatron_sr1.processor import Processor
    from megatron_sr1.types import Scoring, TokenSequence

    processor = Processor.from_pretrained(hf_dir)
    dataset = ShardDataset(expand_shards([f"{data}/train-*.tar"], "data.train"))
    prompts = {prompt.key: prompt for prompt in (dataset.read(index) for index in range(len(dataset)))}
    sequences, expected = [], []
    for sample in step_lines(Path(rollouts)):
        images = tuple(processor.encode_image(image) for image in prompts[sample["key"]].images)
        for rollout, seen in ((sample["first"], images), (sample["second"], ())):
            if rollout is not None:
                sequences.append(TokenSequence(rollout["prompt_ids"], rollout["response_ids"], seen))
                expected.append(rollout["generator_logprobs"])
    policy = Policy(
        load_config(None, [f"model.hf_dir={hf_dir}"]), platform, num_optimizer_steps=1, keep_reference=False
    )
    places = {"image_token_id": processor.image_token_id, "merge_size": processor.merge_size}
    batches = pack(sequences, max_tokens=2048, row_multiple=1, **places)
    scores = policy.logprobs(batches, Scoring(1.0, processor.media_ids))
    found = gather_rows([score.logprobs for score in scores], batches, len(sequences))
    gaps = [
        abs(ours - theirs)
        for ours_row, theirs_row in zip(found, expected, strict=True)
        for ours, theirs in zip(ours_row.tolist(), theirs_row, strict=True)
    ]
    assert len(gaps) > 400 and max(gaps) < 1e-3


def test_the_run_folder_holds_everything(finished: Workspace) -> None:
    run = finished.folder / "whole"
    assert "preset: vision_sr1" in (run / "config.yaml").read_text()
    assert any((run / "tensorboard").iterdir())
    assert {path.name for path in (run / "checkpoints").iterdir()} >= {"step_000006", "step_000008"}
    steps = steps_in(run / "rollouts")
    assert [len(step_files(path)) for path in steps] == [2] * 8, "each engine writes what it has made"
    assert len(step_lines(steps[7])) == 16
    assert [finished.summary("whole", label)["num_prompts"] for label in ("before", "after")] == [12, 12]


def test_checkpoints_bring_their_weights_and_the_best_stays(finished: Workspace) -> None:
    run = finished.folder / "whole"
    measured = {finished.summary("whole", label)["accuracy"]: step for step, label in ((6, "step-6"), (3, "step-3"))}
    last = finished.summary("whole", "after")["accuracy"]
    best = measured[max(measured)] if max(measured) >= last else 8  # of equal ones the first
    kept = {f"step_{step:06d}" for step in (6, 8, best)}
    assert {path.name for path in (run / "checkpoints").iterdir()} == kept
    beside, exported = run / "checkpoints" / "step_000008" / "hf", run / "hf"
    assert {path.name for path in beside.iterdir()} == {path.name for path in exported.iterdir()}
    assert (beside / "config.json").read_bytes() == (exported / "config.json").read_bytes()
    weights = [load_file(folder / "model.safetensors") for folder in (beside, exported)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_transformers_answers_like_the_run(finished: Workspace) -> None:
    """Checked by the run itself, on all held-out prompts; a difference would have failed it."""
    report = json.loads((finished.folder / "whole" / "export.json").read_text())
    assert report["identical_greedy_answers"] == 12


def test_evaluating_the_export_gives_the_same_numbers(finished: Workspace) -> None:
    """Under torchrun, one rank without model parallelism."""
    overrides = (f"model.hf_dir={finished.folder / 'whole' / 'hf'}", "layout.tensor=1", "nproc=1")
    command = finished.command("evaluate", "again", *overrides)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "--standalone"]
    words = [*torchrun, *command[1:]]
    done = subprocess.run(words, cwd=REPOSITORY, check=True, timeout=RUN_TIMEOUT, capture_output=True, text=True)
    assert "Held-out evaluation" in done.stdout
    assert finished.summary("again", "evaluate") == finished.summary("whole", "after")


def test_a_run_trained_from_its_saved_rollouts_is_the_run(
    finished: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No engine, where vLLM cannot be imported: all eight steps from the files of the whole run, to the same metrics
    and weights, bit for bit."""
    (tmp_path / "vllm.py").write_text("raise ImportError('there is none')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    saved = finished.folder / "whole" / "rollouts"
    parts = ("--train-only", "--from-rollouts", str(saved))
    printed = finished.run("grpo", "replayed", "train.steps=8", "train.save_every=8", *parts)
    assert "starting the generation engines" not in printed
    assert untimed(finished.metrics("replayed")) == untimed(finished.metrics("whole"))
    weights = [finished.folder / run / "hf" / "model.safetensors" for run in ("replayed", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    replayed, whole = (
        {path.name: path.read_bytes() for path in (finished.folder / run / "rollouts").glob("*.tokens.*")}
        for run in ("replayed", "whole")
    )
    assert replayed == whole and len(whole) == 8, "what is measured of tokens, of eight steps and the only replica"


def test_rollouts_made_alone_are_those_of_the_run(finished: Workspace) -> None:
    """Of the step after a checkpoint, its weights pushed into fresh engines: ids, texts, log-probs and rewards."""
    whole, alone = (finished.folder / run / "checkpoints" for run in ("whole", "alone"))
    shutil.copytree(whole / "step_000006", alone / "step_000006")
    finished.run_forked("grpo", "alone", "train.steps=8", "--rollouts-only")
    paths = [finished.folder / run / "rollouts" / "step_000006.jsonl" for run in ("alone", "whole")]
    assert _untimed_rollouts(paths[0]) == _untimed_rollouts(paths[1])
    assert not read_tokens(finished.folder / "alone" / "rollouts", 6)
    assert not (finished.folder / "alone" / "hf").exists() and len(finished.metrics("alone")) == 2
    (kept,) = (finished.folder / "alone" / "checkpoints").iterdir()
    assert kept.name == "step_000006", "nothing was trained"


def _untimed_rollouts(path: Path) -> list[dict[str, Any]]:
    samples = step_lines(path)
    for rollout in (sample[name] for sample in samples for name in ("first", "second")):
        if rollout is not None:
            assert 0 <= rollout.pop("queued_at") < rollout.pop("finished_at")
    return samples


def test_importance_weights_in_a_run(finished: Workspace) -> None:
    """Generator and trainer agree to 1e-5, so the weights are 1 within that: another run, almost the same numbers."""
    parts = ("--train-only", "--from-rollouts", str(finished.folder / "whole" / "rollouts"))
    weights = ("objective.mismatch=truncate", "objective.mismatch_level=sequence")
    finished.run_forked("grpo", "weighted", "train.steps=1", *parts, *weights)
    (weighted,), plain = finished.metrics("weighted"), finished.metrics("whole")[0]
    assert weighted["mismatch/weight"] == pytest.approx(1.0, abs=1e-3) and weighted["mismatch/bounded"] == 0.0
    assert weighted["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-2)
    parts_of_gap = [value for name, value in plain.items() if name.startswith("mismatch/")]
    assert {"mismatch/text", "mismatch/near_image", "mismatch/position_0"} <= plain.keys()
    assert min(parts_of_gap) <= plain["logprob_gap"] <= max(parts_of_gap)


def test_pipeline_parallel_with_several_updates_per_batch(finished: Workspace) -> None:
    """PP=2, two optimizer steps on each rollout batch (the second is off-policy), leak filter, a round of dynamic
    sampling, engines that take prompts as they get free; GDPO, a stream that credits descriptions with what another
    reader makes of them, with the ratio of whole descriptions, and one of a second pass of two samples; later passes of
    every context and reader."""
    layout = ("layout.tensor=1", "layout.pipeline=2", "train.batch_size=2", "train.steps=2")
    judged = "{name: judged, tokens: description, rewards: {acc_judge: 1.0}, ratio: sequence}"
    seen = "{name: seen, pass: second, rewards: {acc_vis: 1.0, acc_vis@blind: -0.5}}"
    later = "{name: second, samples: 2}", "{name: blind, context: nothing}", "{name: other, context: other_description}"
    readers = "{name: start, reader: reference}", "{name: big, reader: endpoint}"
    gold = "{name: gold, context: metadata, field: facts}"
    passes = f"objective.passes=[{', '.join((*later, *readers, gold))}]"
    streams = f"objective.streams=[{judged}, {seen}]"
    objective = ("objective.preset=gdpo", "objective.leak_filter=true", streams, passes)
    with serve(read_digits) as server:
        judge = (f"rewards.judge.url={server.url}", "rewards.judge.model=reader")
        pulled = ("rollout.pull=true", "rollout.max_running_requests=4")  # a prompt fills an engine
        finished.run_forked("grpo", "pipeline", *layout, *objective, *judge, *pulled, "rollout.dynamic_sampling=1")
    entries = finished.metrics("pipeline")
    assert max(entry["logprob_gap"] for entry in entries) < 1e-5, "it leaves the update out"
    for stream in ("answer", "judged"):
        assert entries[0][f"loss/{stream}/ratio_mean"] != entries[0][f"loss/{stream}/weight"] > 0
    samples = []
    for step, entry in enumerate(entries):
        rounds, *drawn = _rollouts(finished, "pipeline", step)
        assert len(drawn) == 4 * entry["sampling/drawn"] == 4 * (4 + rounds["further_prompts"])
        places = [sample["trained_as"] for sample in drawn if sample["trained_as"] is not None]
        assert places == [place for place in range(4) for _ in range(4)], "the batch is full, in the order of the draw"
        dropped = {sample["key"] for sample in drawn if sample["trained_as"] is None}
        assert len(dropped) == entry["sampling/dead_dropped"] == rounds["further_prompts"]
        measured = read_tokens(finished.folder / "pipeline" / "rollouts", step)
        trained = {(one["group_id"], one["sample"]) for one in drawn if one["trained_as"] is not None}
        assert {(name.group, name.sample) for name in measured} == trained
        assert {name.pass_name for name in measured} == {"first", "second"}
        samples += drawn
    described = sum(sample["description"] is not None for sample in samples)
    evaluated = [sample for label in ("before", "after") for sample in _evaluated(finished, "pipeline", label)]
    read = [sample for sample in evaluated if sample["description"] is not None]
    # the endpoint is asked for a reward, and is a pass itself, in evaluations too
    assert len(server.requests) == 2 * described + len(read) and min(described, len(read)) > 0
    assert all(set(sample["further"]) >= {"second", "blind", "start", "big", "gold"} for sample in read)
    assert {"blind/missing", "other/missing", "reward/acc_vis.start", "loss/seen/kl"} <= entries[1].keys()
    for sample in _rollouts(finished, "pipeline", 1)[1:]:
        _check_passes(sample)
    for sample in samples:
        described = sample["description"] or ""
        answer = extract_boxed(read_digits(CAPTION_REASONER.user_text("", 0, described), 0))
        right = answer is not None and grade(answer, sample["answer"])
        assert sample["rewards"]["acc_judge"] == [float(bool(described) and right)] * 2


def _evaluated(workspace: Workspace, run: str, label: str) -> list[dict[str, Any]]:
    lines = (workspace.folder / run / "eval" / f"{label}.jsonl").read_text().splitlines()
    return [sample for line in lines for sample in json.loads(line)["samples"]]


def _check_passes(sample: dict[str, Any]) -> None:
    """Of the second step: who read what with which weights, and what of it was right."""
    found = {(reading["pass_name"], reading["number"]): reading for reading in sample.get("further", ())}
    versions = {place: reading["rollout"]["weight_version"] for place, reading in found.items()}
    assert all(version == (1 if place[0] not in ("start", "big") else 0) for place, version in versions.items())
    assert (("second", 1) in found) == (sample["second"] is not None) == (("start", 0) in found)
    for name in ("blind", "start", "big", "gold"):
        if (name, 0) in found:
            answer = extract_boxed(found[name, 0]["rollout"]["response_text"])
            right = float(answer is not None and grade(answer, sample["answer"]))
            assert sample["rewards"][f"acc_vis@{name}"] == right
    if ("other", 0) in found:
        assert found["other", 0]["context"] != sample["description"] or sample["description"] is None
    assert len(sample["rewards"]["acc_vis"]) == 2


def read_digits(question: str, attempt: int) -> str:
    """Adds up the digits of the description, and boxes nothing where there are none."""
    described = question.partition("Description of the image: ")[2].partition("\n")[0]
    digits = [int(word) for word in described.split() if word.isdecimal()]
    return rf"\boxed{{{sum(digits)}}}" if digits else "I cannot tell."


def _rollouts(workspace: Workspace, run: str, step: int) -> list[dict[str, Any]]:
    return step_lines(rollouts_file(workspace.folder / run / "rollouts", step))


def test_a_folder_in_use_is_refused(finished: Workspace) -> None:
    import fcntl

    with (finished.folder / "whole" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ForkedError, match="is in use by another process"):
            finished.run_forked("grpo", "whole")


def test_report_of_the_run(finished: Workspace) -> None:
    page = finished.folder / "report.html"
    command = [sys.executable, "-m", "megatron_sr1.cli", "report", str(finished.folder / "whole"), "--out", str(page)]
    printed = run_forked(command)
    assert "before" in printed and "after" in printed
    assert "data:image/png;base64," in page.read_text()
    assert "not shown" not in printed
    _check_viewer(finished, Page(page.read_text()))


def _check_viewer(finished: Workspace, page: Page) -> None:
    """Its advantages are those that training has measured: as many groups are dead to each stream. All have images."""
    (run,) = page.data["index"]["runs"]
    assert [one["name"] for one in run["sets"]] == [*map(str, range(8)), "before", "step-3", "step-6", "after"]
    assert not [one["problem"] for one in run["sets"] if one["problem"]]
    for number, measured in enumerate(finished.metrics("whole")):
        told, table = run["sets"][number], page.data[f"r0-s{number}"]
        assert told["absent"].keys() == {"dropped"} and told["samples"] == 16
        for stream in told["streams"]:
            values = table["advantages"][stream["name"]]
            dead = [not any(values[first : first + 4]) for first in range(0, 16, 4)]
            assert sum(dead) / 4 == measured[f"groups/dead/{stream['name']}"]
        assert told["counts"]["dead"] / 16 == measured["groups/dead"]
        groups = [group for name, chunk in page.data.items() if name.startswith(f"r0-s{number}-") for group in chunk]
        assert len(groups) == 4 and all(len(group["images"]) == 1 for group in groups)
        assert all(image in page.data["images"] for group in groups for image in group["images"])
        _check_measures(groups, measured)
        first = groups[0]["samples"][0]["responses"][0]
        assert len(first["tokens"]) == len(first["surprise"]) == len(first["streams"])
    (start,) = read_starts(finished.folder / "whole")
    assert start["step"] == 0 and start["ranks"] == 2 and "torch" in start["versions"] and start["memory"]


def _check_measures(groups: list[dict[str, Any]], measured: dict[str, float]) -> None:
    """Of every token that was trained; their means are those that training reports."""
    responses = [one for group in groups for sample in group["samples"] for one in sample["responses"]]
    gaps = [abs(value) for one in responses for value in one["measures"]["gap"]]
    entropies = [value for one in responses for value in one["measures"]["entropy"]]
    assert len(gaps) == len(entropies) == sum(len(one["tokens"]) for one in responses)
    assert sum(gaps) / len(gaps) == pytest.approx(measured["logprob_gap"], rel=2e-3, abs=1e-8)  # 16 bits end there
    assert sum(entropies) / len(entropies) == pytest.approx(measured["entropy"], rel=2e-3)
    seen = [one["measures"] for one in responses if one["pass_name"] == "first"]
    dependencies = [value for one in seen for value in one["dependency/masked"]]
    whole = measured["dependency/masked/response"]
    assert sum(dependencies) / len(dependencies) == pytest.approx(whole, rel=2e-3, abs=1e-5)
