"""What leaves the device while engines generate: its memory is gone, and the training is the same to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sr1.config import OffloadConfig
from megatron_sr1.types import Scoring
from tests.model_zoo import create_family
from tests.policy_cases import MeanLoss, built, packed_rows, processor_of
from tests.ranks import run_ranks

EVERYTHING = tuple(f"offload.{name}=true" for name in ("gradients", "optimizer", "reference"))
LAYOUTS = (
    ("qwen2_5_vl_tied", ("layout.tensor=2",)),
    ("qwen2_5_vl_tied", ("precision.dtype=bf16",)),
    ("qwen2_5_vl_tied", ("precision.dtype=bf16", "layout.distributed_optimizer=false", "layout.pipeline=2")),
    ("qwen3_vl_moe", ("precision.dtype=bf16", "layout.expert=2")),
)


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _state(policy: Any) -> dict[str, list[torch.Tensor]]:
    """What a rank holds, asked of Megatron and torch themselves."""
    weights = [parameter.data for chunk in policy.chunks for parameter in chunk.parameters()]
    chained = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
    inner = [part.optimizer for part in chained if part.optimizer is not None]
    moments = [value for one in inner for state in one.state.values() for value in state.values() if value.numel() > 1]
    places = {weight.untyped_storage().data_ptr() for weight in weights}
    stepped = [parameter.data for one in inner for group in one.param_groups for parameter in group["params"]]
    return {
        "weights": weights,
        "gradients": [parameter.main_grad for chunk in policy.chunks for parameter in chunk.parameters()],
        "optimizer": moments + [data for data in stepped if data.untyped_storage().data_ptr() not in places],
        "reference": list(policy._reference),
    }


def _train(folder: str, layout: tuple[str, ...], leaves: bool) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Two steps, each with the reference's log-probs; before each, the state leaves and returns."""
    found = []
    with built(folder, (*layout, *EVERYTHING), keep_reference=True) as (policy, config):
        batches, _ = packed_rows(policy, config, processor_of(folder))
        for _ in range(2):
            if leaves:
                _check_absence(policy, batches)
            reference = policy.reference_logprobs(batches, Scoring())
            found.append([scores.logprobs.clone() for scores in reference])
            found.append(policy.train_step(batches, MeanLoss(87), Scoring()))
        return found, {name: tensor.clone() for name, tensor in policy.hf_weights()}


def _check_absence(policy: Any, batches: Any) -> None:
    state = _state(policy)
    before = {name: _bytes(tensors) for name, tensors in state.items()}
    assert all(before.values()), before
    scores = policy.logprobs(batches, Scoring())
    policy.leave_device()
    policy.leave_device()  # what is away stays away
    now = {name: _bytes(tensors) for name, tensors in state.items()}
    assert now == {**dict.fromkeys(before, 0), "weights": before["weights"]}, now
    again = policy.logprobs(batches, Scoring())
    assert all(torch.equal(one.logprobs, other.logprobs) for one, other in zip(scores, again, strict=True))
    for touch in (
        lambda: policy.train_step(batches, MeanLoss(87), Scoring()),
        lambda: policy.reference_logprobs(batches, Scoring()),
        lambda: policy.sharded_state(loading=False),
    ):
        with pytest.raises(RuntimeError, match=r"call return_to_device\(\) first"):
            touch()
    policy.return_to_device()
    policy.return_to_device()
    assert {name: _bytes(tensors) for name, tensors in state.items()} == before
    assert not any(gradient.any() for gradient in state["gradients"])


def _compare(rank: int, num_ranks: int, folder: str) -> None:
    for number, (family, layout) in enumerate(LAYOUTS):
        kept, left = (_train(f"{folder}/{family}", layout, leaves) for leaves in (False, True))
        for one, other in zip(kept[0], left[0], strict=True):
            same = one == other if not isinstance(one, list) else all(map(torch.equal, one, other))
            assert same, (number, one, other)
        assert all(torch.equal(tensor, left[1][name]) for name, tensor in kept[1].items()), layout


def test_the_state_leaves_and_comes_back_to_the_same_bits(tmp_path: Path) -> None:
    for family in {family for family, _ in LAYOUTS}:
        create_family(tmp_path / family, family)
    run_ranks(2, _compare, str(tmp_path))


def test_by_default_it_leaves_accelerators_alone() -> None:
    from megatron_sr1.policy.offload import Offload

    for device, leaves in (("cpu", False), ("cuda", True)):
        offload = Offload(OffloadConfig(), torch.device(device))
        assert offload._takes(None) is leaves and offload._takes(True) and not offload._takes(False)
