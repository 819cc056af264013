"""Checkpoints: the same layout goes on to the same bits, any other to the same numbers; other data is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sr1.processor import Processor
from megatron_sr1.types import Scoring
from tests.model_zoo import create_family
from tests.policy_cases import LEARNING_RATE, STEP_TOLERANCE, TOLERANCE, MeanLoss, built, packed_rows
from tests.ranks import run_ranks

LOSS = MeanLoss(87)
# family -> the layout that saves, and those that load
MOVES = {
    "qwen2_5_vl_tied": (
        ["layout.tensor=2"],
        [["layout.pipeline=2", "layout.virtual=2"], ["layout.context=2"]],
    ),
    "qwen3_vl_moe": (
        ["layout.expert=2"],
        [["layout.tensor=2", "layout.sequence_parallel=true"], ["layout.pipeline=2", "layout.stage_layers=[1,3]"]],
    ),
}


def _steps(policy: Any, config: Any, model_dir: str, number: int) -> list[Any]:
    batches, _ = packed_rows(policy, config, Processor.from_pretrained(model_dir))
    return [policy.train_step(batches, LOSS, Scoring()) for _ in range(number)]


def _check_moves(rank: int, num_ranks: int, folder: str) -> None:
    from megatron_sr1.training.checkpointer import Checkpointer, Progress

    for family, (saving, loading) in MOVES.items():
        model_dir, path = f"{folder}/{family}", Path(folder) / f"{family}_checkpoints"
        with built(model_dir, saving) as (policy, config):
            checkpoints = Checkpointer(path, 2, policy.platform)
            assert checkpoints.restore(policy, "data", "model") is None
            for step in range(1, 4):
                _steps(policy, config, model_dir, 1)
                checkpoints.save(policy, Progress(step, 8 * step, "data", "model"))
            assert checkpoints.steps() == [2, 3], "only the newest two are kept"
            wanted = _steps(policy, config, model_dir, 2)
            weights = {name: tensor.clone() for name, tensor in policy.hf_weights()}

        with built(model_dir, saving) as (policy, config):
            assert checkpoints.restore(policy, "data", "model") == Progress(3, 24, "data", "model")
            assert _steps(policy, config, model_dir, 2) == wanted
            assert all(torch.equal(tensor, weights[name]) for name, tensor in policy.hf_weights())
            with pytest.raises(ValueError, match="dataset_fingerprint 'data', but this run has 'other'"):
                checkpoints.restore(policy, "other", "model")

        plain = [*saving, "layout.distributed_optimizer=false"]
        refused = pytest.raises(
            ValueError, match=r"saved with layout\.distributed_optimizer=True, but this run has False"
        )
        with built(model_dir, plain) as (policy, _), refused:
            checkpoints.restore(policy, "data", "model")

        for overrides in loading:
            name = f"{family}: {' '.join(saving)} into {' '.join(overrides)}"
            with built(model_dir, overrides) as (policy, config):
                checkpoints.restore(policy, "data", "model")
                for found, expected in zip(_steps(policy, config, model_dir, 2), wanted, strict=True):
                    assert found.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=TOLERANCE), name
                    assert found.learning_rate == expected.learning_rate
                for key, tensor in policy.hf_weights():
                    assert (tensor - weights[key]).abs().max() < STEP_TOLERANCE * LEARNING_RATE, f"{name}: {key}"

        torch.distributed.barrier()
        if rank == 0:
            (path / "step_000003" / ".metadata").write_bytes(pickle.dumps(Intruder(f"{folder}/ran")))
        torch.distributed.barrier()
        with built(model_dir, saving) as (policy, _), pytest.raises(ValueError, match=r"\.metadata asks for"):
            checkpoints.restore(policy, "data", "model")
        assert not Path(folder, "ran").exists(), "code of a checkpoint has run"


class Intruder:
    """Pickled, a call: it makes a file where it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)


def test_checkpoints_move_between_layouts(tmp_path: Path) -> None:
    for family in MOVES:
        create_family(tmp_path / family, family)
    run_ranks(2, _check_moves, str(tmp_path))
