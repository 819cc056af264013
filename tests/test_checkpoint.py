"""Checkpoints: the same layout goes on to the same bits, any other to the same numbers; other data is refused."""

from __future__ import annotations

import gc
import logging
import os
import pickle
import resource
import shutil
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sr1.cli.command import one_line_for_mistakes
from megatron_sr1.config import ConfigError, load_config
from megatron_sr1.types import Scoring
from tests.commands import call_forked
from tests.model_zoo import create_family
from tests.policy_cases import LEARNING_RATE, STEP_TOLERANCE, TOLERANCE, MeanLoss, built, packed_rows, processor_of
from tests.ranks import run_ranks, start_forked

LOSS = MeanLoss(87)
# family, the layout that saves, and those that load
MOVES = [
    (
        "qwen2_5_vl_tied",
        ["layout.tensor=2"],
        [["layout.pipeline=2", "layout.virtual=2"], ["layout.context=2"]],
    ),
    (  # two replicas share the optimizer's state; many buckets of gradients, each padded
        "qwen2_5_vl_tied",
        ["layout.gradient_bucket=1000"],
        [["layout.tensor=2"], []],
    ),
    (
        "qwen3_vl_moe",
        ["layout.expert=2"],
        [["layout.tensor=2", "layout.sequence_parallel=true"], ["layout.pipeline=2", "layout.stage_layers=[1,3]"]],
    ),
]


def _steps(policy: Any, config: Any, model_dir: str, number: int) -> list[Any]:
    batches, _ = packed_rows(policy, config, processor_of(model_dir))
    return [policy.train_step(batches, LOSS, Scoring()) for _ in range(number)]


def _check_moves(rank: int, num_ranks: int, folder: str) -> None:
    from megatron_sr1.training.checkpointer import Checkpointer, Progress

    _check_shares(rank, folder)
    _check_frozen(folder)
    for number, (family, saving, loading) in enumerate(MOVES):
        model_dir, path = f"{folder}/{family}", Path(folder) / f"checkpoints_{number}"
        with built(model_dir, saving) as (policy, config):
            checkpoints = Checkpointer(path, 2, policy.platform, in_background=True)
            assert checkpoints.newest() is None
            for step in range(1, 5):
                (first,) = _steps(policy, config, model_dir, 1)  # changes the policy while it is written
                if step < 4:
                    checkpoints.save(policy, Progress(step, 8 * step, "data", "model"))
                    assert checkpoints.steps() == [1, 2][: step - 1], "the one before is finished"
            checkpoints.settle()
            assert checkpoints.steps() == [2, 3], "only the newest two are kept"
            wanted = [first, *_steps(policy, config, model_dir, 1)]
            weights = {name: tensor.clone() for name, tensor in policy.hf_weights()}

        with built(model_dir, saving) as (policy, config):
            newest = checkpoints.newest()
            assert newest == Progress(3, 24, "data", "model")
            checkpoints.restore(policy, newest)
            assert _steps(policy, config, model_dir, 2) == wanted
            assert all(torch.equal(tensor, weights[name]) for name, tensor in policy.hf_weights())

        with built(model_dir, [*saving, *OTHER_SETTINGS], num_optimizer_steps=6) as (policy, config):
            checkpoints.restore(policy, newest)
            _check_settings(policy, config.optimizer)
            (step,) = _steps(policy, config, model_dir, 1)
            assert step.learning_rate == pytest.approx(HALFWAY * 0.25), "halfway through six steps of cosine"

        plain = [*saving, "layout.distributed_optimizer=false"]
        refused = pytest.raises(
            ValueError, match=r"saved with layout\.distributed_optimizer=True, but this run has False"
        )
        with built(model_dir, plain) as (policy, _), refused:
            checkpoints.restore(policy, newest)

        for overrides in loading:
            name = f"{family}: {' '.join(saving)} into {' '.join(overrides)}"
            with built(model_dir, overrides) as (policy, config):
                checkpoints.restore(policy, newest)
                for found, expected in zip(_steps(policy, config, model_dir, 2), wanted, strict=True):
                    assert found.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=TOLERANCE), name
                    assert found.learning_rate == expected.learning_rate
                for key, tensor in policy.hf_weights():
                    assert (tensor - weights[key]).abs().max() < STEP_TOLERANCE * LEARNING_RATE, f"{name}: {key}"

        _check_damage(rank, checkpoints)
        torch.distributed.barrier()
        if rank == 0:
            (path / "step_000003" / ".metadata").write_bytes(pickle.dumps(Intruder(f"{folder}/ran")))
        torch.distributed.barrier()
        with pytest.raises(ValueError, match=r"\.metadata asks for"):
            checkpoints.newest()
        with built(model_dir, saving) as (policy, _), pytest.raises(ValueError, match=r"\.metadata asks for"):
            checkpoints.restore(policy, newest)
        assert not Path(folder, "ran").exists(), "code of a checkpoint has run"


def _check_shares(rank: int, folder: str) -> None:
    """Two replicas write half of the checkpoint each, and go on with other settings."""
    from megatron_sr1.training.checkpointer import Checkpointer, Progress

    path = Path(folder) / "shares"
    model_dir = f"{folder}/qwen2_5_vl_tied"
    with built(model_dir, ["layout.distributed_optimizer=false"]) as (policy, config):
        _steps(policy, config, model_dir, 1)
        Checkpointer(path, 1, policy.platform).save(policy, Progress(1, 8, "data", "model"))
    made = path / "step_000001"
    written = [sum(file.stat().st_size for file in made.glob(f"__{rank}_*.distcp")) for rank in range(2)]
    assert min(written) > 0.8 * max(written), written
    others = ["layout.distributed_optimizer=false", *OTHER_SETTINGS]
    with built(model_dir, others, num_optimizer_steps=2) as (policy, config):
        checkpoints = Checkpointer(path, 1, policy.platform)
        checkpoints.restore(policy, Progress(1, 8, "data", "model"))
        assert {group["max_lr"] for group in policy.optimizer.param_groups} == {config.optimizer.lr}
        stays = Checkpointer(path, 1, policy.platform, keep_every=2)
        for step in range(2, 6):
            stays.save(policy, Progress(step, 8, "data", "model"))
        assert stays.steps() == [2, 4, 5], "every second one, and the newest"
        given: list[Any] = []
        best = Checkpointer(path, 1, policy.platform, best=lambda steps: given.append(list(steps)) or 2)
        collects, sync = [], os.fsync
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda file: collects.append(gc.isenabled()) or sync(file))
            for step in range(6, 9):
                best.save(policy, Progress(step, 8, "data", "model"))
        assert collects and all(collects), "a thread that writes does not stop the rank's collection of garbage"
        assert best.steps() == [2, 8], "the best, and the newest"
        assert given == ([[2, 4, 5], [2, 6], [2, 7]] if rank == 0 else []), "the newest is not measured yet"
        if rank == 0:
            (path / "step_000007.partial-0").mkdir()
        best.prune()
        assert not list(path.glob("*.partial*")), "what a killed run has left"
        assert given[3:] == ([[2, 8]] if rank == 0 else [])


def _check_frozen(folder: str) -> None:
    """What is frozen has no state to save; the rest goes on in another layout. Megatron-Core could not save where a
    stage trains nothing, so that is refused."""
    from megatron_sr1.training.checkpointer import Checkpointer, Progress

    model_dir, freeze = f"{folder}/qwen2_5_vl_tied", "model.freeze=['.*layers[.][012][.].*',vision,embeddings]"
    checkpoints = None
    with built(model_dir, ["layout.tensor=2", freeze]) as (policy, config):
        checkpoints = Checkpointer(Path(folder) / "frozen", 1, policy.platform)
        _steps(policy, config, model_dir, 1)
        checkpoints.save(policy, Progress(1, 8, "data", "model"))
        wanted = _steps(policy, config, model_dir, 1)
        weights = {name: tensor.clone() for name, tensor in policy.hf_weights()}
    with built(model_dir, ["layout.pipeline=2", freeze]) as (policy, config):
        checkpoints.restore(policy, checkpoints.newest())
        (found,) = _steps(policy, config, model_dir, 1)
        assert found.grad_norm == pytest.approx(wanted[0].grad_norm, rel=TOLERANCE)
        for key, tensor in policy.hf_weights():
            assert (tensor - weights[key]).abs().max() < STEP_TOLERANCE * LEARNING_RATE, key
    refused = pytest.raises(ConfigError, match=r"rank 1 of 2 has nothing to train .* Lower layout\.pipeline")
    with refused, built(model_dir, ["layout.pipeline=2", "model.freeze=[language,embeddings]"]):
        pass


# learning rates, schedule and all else of the optimizer, other than what the checkpoint was saved with
OTHER_SETTINGS = (
    "optimizer.lr=0.25",
    "optimizer.schedule=cosine",
    "optimizer.weight_decay=0.3",
    "optimizer.beta1=0.7",
    "optimizer.beta2=0.8",
    "optimizer.eps=0.01",
    "train.steps=6",
)
HALFWAY = 0.5  # (1 + cos(pi / 2)) / 2


def _check_settings(policy: Any, settings: Any) -> None:
    """Of every group that steps, as torch's AdamW has them."""
    groups = policy.optimizer.param_groups
    assert len(groups) >= 2 and {group["max_lr"] for group in groups} == {settings.lr}
    for group in groups:
        assert group["betas"] == (settings.beta1, settings.beta2)
        assert group["eps"] == settings.eps
        assert group["lr"] == pytest.approx(HALFWAY * settings.lr)
        assert group["weight_decay"] == settings.weight_decay * group["wd_mult"]


def _check_damage(rank: int, checkpoints: Any) -> None:
    """A newest checkpoint that is broken is left out, on every rank; where all are, the run is refused."""
    newest = checkpoints.folder / "step_000003"
    largest = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size).name
    for name, part in (
        (largest, 0.5),
        *([("common.pt", 0.5)] if (newest / "common.pt").exists() else []),  # newer ones have it among the tensors
        (".metadata", 0.5),
        ("progress.json", 0.0),
        (".metadata", None),
        (largest, "flipped"),
        ("checksums.json", 0.5),
        ("checksums.json", "flipped"),
    ):
        kept = (newest / name).read_bytes()
        torch.distributed.barrier()
        if rank == 0 and part is None:
            (newest / name).unlink()
        elif rank == 0 and part == "flipped":
            place = len(kept) // 2
            (newest / name).write_bytes(kept[:place] + bytes([kept[place] ^ 4]) + kept[place + 1 :])
        elif rank == 0:
            (newest / name).write_bytes(kept[: int(len(kept) * float(part))])
        torch.distributed.barrier()
        assert checkpoints.newest().step == 2, name
        torch.distributed.barrier()
        if rank == 0:
            (newest / name).write_bytes(kept)
        assert checkpoints.newest().step == 3
    torch.distributed.barrier()
    if rank == 0:
        (newest / "checksums.json").rename(newest / "kept")
    torch.distributed.barrier()
    from megatron_sr1.training import checksums

    told: list[logging.LogRecord] = []
    checksums.logger.addFilter(lambda record: told.append(record) or True)
    assert checkpoints.newest().step == 3 and len(told) == (rank == 0), "of an earlier release, perhaps: it is said"
    torch.distributed.barrier()
    if rank == 0:
        (newest / "kept").rename(newest / "checksums.json")
        (newest / "progress.json").rename(newest / "kept")
        (newest.with_name("step_000002") / "progress.json").rename(newest / "older")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read: .*step_000003.*step_000002"):
        checkpoints.newest()
    torch.distributed.barrier()
    if rank == 0:
        (newest / "kept").rename(newest / "progress.json")
        (newest / "older").rename(newest.with_name("step_000002") / "progress.json")


class Intruder:
    """Pickled, a call: it makes a file where it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)


def test_a_checkpoint_of_a_newer_megatron_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_sr1.platform import start_platform

    platform = start_platform()
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    from megatron_sr1.training import checkpointer

    def load(folder: str) -> None:
        raise CheckpointingException(f"Common file {folder}/common.pt does not exist")

    monkeypatch.setattr(checkpointer, "check_megatron_dir", lambda path: None)
    monkeypatch.setattr(dist_checkpointing, "load_common_state_dict", load)
    made = checkpointer.Checkpointer(tmp_path, 1, platform)
    with pytest.raises(ValueError, match=r"step_000003 was written by a newer Megatron-Core than \d.*common\.pt"):
        made.restore(None, checkpointer.Progress(3, 24, "data", "model"))  # type: ignore[arg-type]


def test_checkpoints_move_between_layouts(tmp_path: Path) -> None:
    for family in {family for family, _, _ in MOVES}:
        create_family(tmp_path / family, family)
    run_ranks(2, _check_moves, str(tmp_path))


class StandIn:
    """A policy of one tensor."""

    def __init__(self, num_weights: int = 100_000) -> None:
        self.weights = torch.zeros(num_weights)
        self.groups = SimpleNamespace(replicas=torch.distributed.group.WORLD)

    def sharded_state(self, loading: bool) -> dict[str, Any]:
        from megatron.core.dist_checkpointing import ShardedTensor

        return {"a": ShardedTensor.from_rank_offsets("a", self.weights)}

    def folder_weights(self) -> list[tuple[str, torch.Tensor]]:
        return [("a", self.weights)]


def _fill_the_disk(folder: Path) -> None:
    from megatron_sr1.platform import start_platform

    platform = start_platform()
    from megatron_sr1.loops.run import open_run
    from megatron_sr1.training.checkpointer import Checkpointer, HfSource, Progress
    from megatron_sr1.weights.safetensors import TensorInfo, TensorSlot

    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # a write beyond it fails as one to a full disk does
    at_once, behind = (Checkpointer(folder / "checkpoints", 2, platform, in_background=late) for late in (False, True))

    def save_behind() -> None:
        behind.save(StandIn(), Progress(2, 1, "", ""))
        behind.settle()

    def save_hf() -> None:
        behind.save(StandIn(5000), Progress(3, 1, "", ""), HfSource(str(folder / "absent")))
        behind.settle()

    def save_without_room() -> None:
        shutil.disk_usage = lambda path: SimpleNamespace(free=399_999)  # of this process; 400,000 are written
        at_once.save(StandIn(), Progress(4, 1, "", ""))

    def write_weights() -> None:
        (folder / "a.safetensors").touch()
        tensor = torch.zeros(100_000)
        TensorSlot(folder / "a.safetensors", 0, TensorInfo(tensor.dtype, tensor.shape)).write(tensor)

    for name, write in {
        "save": lambda: at_once.save(StandIn(), Progress(1, 1, "", "")),
        "save-behind": save_behind,
        "hf": save_hf,
        "weights": write_weights,
        "metrics": lambda: (folder / "metrics.jsonl").write_text("x" * 100_000),
        "no-room": save_without_room,
    }.items():
        try:
            with one_line_for_mistakes(name), open_run(load_config(None, [f"run_dir={folder}"]), platform, "grpo"):
                write()
        except SystemExit as ended:
            assert ended.code == 2, ended.code


def test_a_full_disk_is_one_line_with_the_path(tmp_path: Path) -> None:
    run = tmp_path / "run"
    printed = call_forked(_fill_the_disk, run)
    said = [line for line in printed.splitlines() if line.startswith("megatron-sr1 ")]
    assert len(said) == 6 and "Traceback" not in printed, printed
    assert said[0].startswith(f"megatron-sr1 save: {run}/checkpoints/step_000001 could not be written (")
    assert "File too large" in said[0] and "__0_0.distcp" in said[0], "the system's own words"
    assert said[1].startswith(f"megatron-sr1 save-behind: {run}/checkpoints/step_000002 could not be written (")
    assert said[2].startswith(f"megatron-sr1 hf: {run}/checkpoints/step_000003 could not be written (")
    assert str(run / "absent") in said[2]
    assert said[3].startswith(f"megatron-sr1 weights: {run}/a.safetensors: File too large. Make room there")
    assert said[4].startswith(f"megatron-sr1 metrics: {run}: File too large. Make room there")
    assert said[5].startswith(
        f"megatron-sr1 no-room: no space left on {run}/checkpoints: 0.4 MiB free, and step_000004 takes 0.4 MiB. Make"
    )
    assert not list((run / "checkpoints").iterdir()), "the half checkpoints give their room back"


def _save_and_stand(folder: Path, step: int, place: str, said: Connection) -> None:
    """Saves, and then again: says so and stands where a file with `place` in its name is to be on the disk."""
    from megatron_sr1.platform import start_platform
    from megatron_sr1.training.checkpointer import Checkpointer, HfSource, Progress

    checkpoints, sync = Checkpointer(folder, 1, start_platform(), in_background=True), os.fsync
    before = checkpoints.newest()
    assert (before is None) == (step == 1) and (before is None or before.step == step - 1), "the one before is whole"
    checkpoints.save(StandIn(), Progress(step, 1, "", ""))
    checkpoints.settle()
    assert [path.name for path in folder.iterdir()] == [f"step_{step:06d}"], "the half one is removed"
    if place == "nowhere":
        return

    def stands(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if place in name:
            said.send(name)
            time.sleep(600)
        sync(descriptor)

    os.fsync = stands
    begin = time.perf_counter()
    checkpoints.save(StandIn(), Progress(step + 1, 2, "", ""), HfSource("."))
    assert time.perf_counter() - begin < 60, "the run goes on"
    checkpoints.settle()


def test_a_run_that_is_killed_while_it_writes_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    """At whichever file: those of the ranks, which a thread writes, and those that say where everything is."""
    folder = tmp_path / "checkpoints"
    for step, place in enumerate((".distcp", "safetensors", ".metadata", "progress.json", "nowhere"), start=1):
        heard, said = Pipe(duplex=False)
        process = start_forked(_save_and_stand, folder, step, place, said)
        said.close()
        if place == "nowhere":
            break
        assert place in heard.recv()  # EOFError: the process has failed, and said why on stderr
        process.kill()
        process.join()
        names = [f"step_{step:06d}", f"step_{step + 1:06d}.partial"]
        assert sorted(path.name.partition("-")[0] for path in folder.iterdir()) == names
    process.join()
    assert process.exitcode == 0, "see stderr"
