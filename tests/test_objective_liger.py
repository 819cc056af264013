"""Answer-only GRPO against an independent implementation: liger-kernel's fused linear GRPO loss, on plain torch.

It takes hidden states and the output matrix, so the two are compared from the loss down to the gradients of both: each
with ours in float64, within float32's error, since two float32 results may be apart by more on one CPU than on another.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

from megatron_sr1.objective import stream_advantages, stream_loss, token_weights
from megatron_sr1.streams import PRESETS
from megatron_sr1.types import Clip, LossInputs
from tests.logprob_cases import assert_relative

LENGTHS = torch.tensor([7, 3, 9, 1, 5, 6])
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])
REWARDS = {
    "acc": torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0]),
    "fmt": torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0]),
}
NUM_ROLLOUTS, LONGEST, HIDDEN, VOCAB = 6, 9, 16, 32
LOW, HIGH, BETA = 0.2, 0.28, 0.04
ERROR = 1e-6  # of a loss, of its gradients in the norm


def draw() -> dict[str, torch.Tensor]:
    """An off-policy batch: the old policy is far enough away that both bounds and the dual clip are active."""
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, matrix = normal(NUM_ROLLOUTS, LONGEST, HIDDEN), normal(VOCAB, HIDDEN) / HIDDEN**0.5
    targets = torch.randint(0, VOCAB, (NUM_ROLLOUTS, LONGEST), generator=generator)
    logprobs = torch.log_softmax(hidden @ matrix.T, dim=-1).gather(-1, targets[..., None])[..., 0]
    return {
        "hidden": hidden.requires_grad_(),
        "matrix": matrix.requires_grad_(),
        "targets": targets,
        "mask": torch.arange(LONGEST) < LENGTHS[:, None],
        "old": logprobs.detach() + 0.7 * normal(NUM_ROLLOUTS, LONGEST),
        "ref": logprobs.detach() + 0.5 * normal(NUM_ROLLOUTS, LONGEST),
    }


def in_float64(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same batch, hidden states and matrix as leaves of their own."""
    wide = {name: value.detach().double() if value.is_floating_point() else value for name, value in batch.items()}
    return wide | {name: wide[name].requires_grad_() for name in ("hidden", "matrix")}


REFERENCE = stream_loss  # what is under test may be put in the place of `stream_loss`


def ours(
    batch: dict[str, torch.Tensor], aggregation: str, dual: float | None, *, exact: bool = False
) -> tuple[torch.Tensor, dict]:
    stream = replace(PRESETS["see_think"].streams[0], kl_coef=BETA, clip=Clip(LOW, HIGH, dual))
    mask = batch["mask"]
    per_rollout = stream_advantages(stream, REWARDS, GROUPS, 1e-6)
    logits = batch["hidden"][mask] @ batch["matrix"].T  # [R, V]
    trainer = torch.log_softmax(logits, dim=-1).gather(-1, batch["targets"][mask][:, None])[:, 0]
    inputs = LossInputs(
        trainer_logprobs=trainer,
        old_logprobs=batch["old"][mask],
        ref_logprobs=batch["ref"][mask],
        advantages=per_rollout.repeat_interleave(LENGTHS)[None],
        token_weights=token_weights(LENGTHS, aggregation).repeat_interleave(LENGTHS)[None],
        streams=(stream,),
    )
    loss, metrics = (REFERENCE if exact else stream_loss)(inputs)
    return loss, dict(metrics)


def theirs(batch: dict[str, torch.Tensor], loss_type: str, delta: float | None) -> tuple[torch.Tensor, tuple]:
    # torch.std per group, written with plain torch calls: not our advantages
    totals = (REWARDS["acc"] + 0.1 * REWARDS["fmt"]).reshape(2, 3)
    advantages = (totals - totals.mean(1, keepdim=True)) / (totals.std(1, keepdim=True) + 1e-6)
    module = LigerFusedLinearGRPOLoss(
        beta=BETA, compiled=False, epsilon_low=LOW, epsilon_high=HIGH, loss_type=loss_type, delta=delta
    )
    return module(
        batch["hidden"],
        batch["matrix"],
        batch["targets"],
        batch["mask"].float(),
        advantages.reshape(-1),
        ref_per_token_logps=batch["ref"],
        old_per_token_logps=batch["old"],
    )


@pytest.mark.parametrize("dual", [None, 1.6])
@pytest.mark.parametrize(("aggregation", "loss_type"), [("token_mean", "dapo"), ("sequence_mean", "grpo")])
def test_loss_and_gradients_equal(aggregation: str, loss_type: str, dual: float | None) -> None:
    batch = draw()
    wide = in_float64(batch)
    exact_loss, _ = ours(wide, aggregation, dual, exact=True)
    exact = torch.autograd.grad(exact_loss, (wide["hidden"], wide["matrix"]))
    our_loss, metrics = ours(batch, aggregation, dual)
    their_loss, _ = theirs(batch, loss_type, dual)
    for loss in (our_loss, their_loss):
        torch.testing.assert_close(loss.double(), exact_loss, rtol=ERROR, atol=0)
        for gradient, wanted in zip(torch.autograd.grad(loss, (batch["hidden"], batch["matrix"])), exact, strict=True):
            assert wanted.abs().max() > 1e-2
            assert_relative(gradient, wanted, ERROR)
    assert 0.1 < metrics["loss/answer/clip_fraction"] < 0.9
    assert (metrics["loss/answer/dual_clip_fraction"] > 0) == (dual is not None)


def test_metrics_equal() -> None:
    batch = draw()
    _, exact = ours(in_float64(batch), "token_mean", None)
    _, metrics = ours(batch, "token_mean", None)
    _, (kl, clip_fraction) = theirs(batch, "dapo", None)
    for found in (metrics["loss/answer/kl"], kl):
        torch.testing.assert_close(found.double(), exact["loss/answer/kl"].double(), rtol=ERROR, atol=0)
    for found in (metrics["loss/answer/clip_fraction"], clip_fraction):
        torch.testing.assert_close(found.double(), exact["loss/answer/clip_fraction"].double(), rtol=ERROR, atol=0)
