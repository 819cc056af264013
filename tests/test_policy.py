"""What a policy does beyond its layout: optimizer steps against transformers and torch's AdamW, the reference, banned
ids, the vision tower's own learning rate, a frozen tower, bf16. One launch runs all of it.

Everything that imports Megatron-Core runs in ranks of its own, so that the CPU shim never reaches the test process.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sr1.packing import gather_rows
from megatron_sr1.processor import Processor
from megatron_sr1.types import LogProbs, MicroBatch, Scoring, TokenSequence
from tests import trainer_cases
from tests.policy_cases import (
    LEARNING_RATE,
    STEP_TOLERANCE,
    TOLERANCE,
    MeanLoss,
    built,
    make_sequences,
    packed_rows,
    relative_error,
)
from tests.ranks import run_ranks


def _hf_scores(model: torch.nn.Module, sequence: TokenSequence, image_token_id: int) -> Tensor:
    """transformers' log-probs [n] of the response."""
    prompt, response = torch.tensor(sequence.prompt_ids), torch.tensor(sequence.response_ids)
    ids = torch.cat([prompt, response])[None]
    vision = {}
    if sequence.images:
        marks = torch.zeros_like(ids)
        marks[0, : len(prompt)] = (prompt == image_token_id).long()
        vision = {
            "pixel_values": torch.cat([image.pixel_values for image in sequence.images]),
            "image_grid_thw": torch.tensor([image.grid_thw for image in sequence.images]),
            "mm_token_type_ids": marks.int(),
        }
    scores = model(input_ids=ids, **vision).logits[0].log_softmax(-1)
    return scores[len(prompt) - 1 : -1].gather(1, response[:, None])[:, 0]


def _hf_model(model_dir: str) -> torch.nn.Module:
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32)


def _check_steps(model_dir: str, folder: str, *overrides: str, vision_lr: float = LEARNING_RATE) -> None:
    """Two optimizer steps equal torch's AdamW on transformers' gradients; the reference stays what it was."""
    with built(model_dir, overrides, keep_reference=True) as (policy, config):
        processor = Processor.from_pretrained(model_dir)
        sequences = make_sequences(processor)
        num_tokens = sum(len(sequence.response_ids) for sequence in sequences)
        batches, _ = packed_rows(policy, config, processor)
        assert len(batches) > 1, "the budget should make several rows"
        hf = _hf_model(model_dir)
        optimizer = _adamw(hf, config, vision_lr)
        before = policy.logprobs(batches, Scoring())
        for _ in range(2):
            loss = -sum(_hf_scores(hf, item, processor.image_token_id).sum() for item in sequences) / num_tokens
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_([p for p in hf.parameters() if p.requires_grad], 1.0)
            optimizer.step()
            result = policy.train_step(batches, MeanLoss(num_tokens), Scoring())
            assert result.metrics["loss"] == pytest.approx(loss.item(), rel=TOLERANCE)
            assert result.grad_norm == pytest.approx(norm.item(), rel=TOLERANCE)
            assert result.learning_rate == LEARNING_RATE
        hf.save_pretrained(f"{folder}/stepped")
        from megatron_sr1.weights import HfTensors

        wanted = HfTensors(f"{folder}/stepped")
        for name, tensor in policy.hf_weights():
            assert (tensor - wanted[name]).abs().max() < STEP_TOLERANCE * LEARNING_RATE, name
        reference = policy.reference_logprobs(batches, Scoring())
        assert all(torch.equal(a.logprobs, b.logprobs) for a, b in zip(before, reference, strict=True))
        assert not torch.equal(policy.logprobs(batches, Scoring())[0].logprobs, before[0].logprobs)


def _adamw(hf: torch.nn.Module, config: Any, vision_lr: float) -> torch.optim.AdamW:
    """A learning rate of 0 stands for a frozen tower; biases and norms are not decayed."""
    groups = []
    for name, parameter in hf.named_parameters():
        rate = vision_lr if ".visual." in f".{name}" else LEARNING_RATE
        parameter.requires_grad_(rate > 0)
        decay = config.optimizer.weight_decay if parameter.dim() > 1 else 0.0
        groups.append({"params": [parameter], "lr": rate, "weight_decay": decay})
    settings = config.optimizer
    return torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps)


def _check_ban(model_dir: str) -> None:
    """Banned ids have no probability, so what remains is renormalised; temperature divides the logits."""
    with built(model_dir, []) as (policy, config):
        processor = Processor.from_pretrained(model_dir)
        hf = _hf_model(model_dir)
        text = [batch for batch in packed_rows(policy, config, processor, 60)[0] if not batch.images][:1]
        scoring = Scoring(temperature=0.7, banned_ids=processor.media_ids)
        (score,) = policy.logprobs(text, scoring)
        batch = text[0]
        lengths = torch.diff(batch.cu_seqlens).tolist()
        logits = torch.cat([hf(input_ids=ids[None]).logits[0] for ids in batch.input_ids.split(lengths)])
        logits[:, list(processor.media_ids)] = -torch.inf
        whole = (logits / scoring.temperature).log_softmax(-1)
        expected = whole[batch.loss_rows].gather(1, batch.targets[:, None])[:, 0]
        allowed = torch.tensor([target not in processor.media_ids for target in batch.targets.tolist()])
        assert relative_error(score.logprobs[allowed], expected.detach()[allowed]) < TOLERANCE
        assert torch.isfinite(score.logprobs).all()


def _check_frozen_tower(model_dir: str) -> None:
    """A frozen tower's images are encoded once for all passes of a step, and its weights stay."""
    with built(model_dir, ["model.freeze=[vision,merger]"], keep_reference=True) as (policy, config):
        batches, _ = packed_rows(policy, config, Processor.from_pretrained(model_dir))
        vision = {name: value.clone() for name, value in policy.hf_weights() if name.startswith("visual.")}
        shared = policy.chunks[0].shared_vision
        policy.reference_logprobs(batches, Scoring())
        encoded = shared.num_encoded_patches
        assert encoded == sum(len(image.pixel_values) for batch in batches for image in batch.images)
        policy.logprobs(batches, Scoring())
        policy.train_step(batches, MeanLoss(50), Scoring())
        assert shared.num_encoded_patches == encoded
        assert all(torch.equal(value, vision[name]) for name, value in policy.hf_weights() if name in vision)


def _check_text_only_step(model_dir: str) -> None:
    """A step without any image leaves the tower's weights to weight decay alone: its gradient is exactly 0."""
    with built(model_dir, ["optimizer.weight_decay=0"]) as (policy, config):
        batches, _ = packed_rows(policy, config, Processor.from_pretrained(model_dir), 60)
        vision = {name: value.clone() for name, value in policy.hf_weights() if name.startswith("visual.")}
        text: list[MicroBatch] = [batch for batch in batches if not batch.images]
        assert len(text) > 1
        policy.train_step(text, MeanLoss(50), Scoring())
        assert all(torch.equal(value, vision[name]) for name, value in policy.hf_weights() if name in vision)
        policy.train_step(batches[::-1], MeanLoss(50), Scoring())
        assert not all(torch.equal(value, vision[name]) for name, value in policy.hf_weights() if name in vision)


def _check_bf16(model_dir: str) -> None:
    """bf16 weights and activations, fp32 master weights: near fp32's numbers, and steps smaller than bf16's spacing are
    not lost."""
    processor = Processor.from_pretrained(model_dir)
    runs = {}
    for dtype in ("fp32", "bf16"):
        with built(model_dir, [f"precision.dtype={dtype}", "optimizer.lr=1e-4", "optimizer.eps=1e-8"]) as (
            policy,
            config,
        ):
            batches, mine = packed_rows(policy, config, processor)
            start = {name: value.float().clone() for name, value in policy.hf_weights()}
            scores = policy.logprobs(batches, Scoring())
            losses = [policy.train_step(batches, MeanLoss(87), Scoring()).metrics["loss"] for _ in range(6)]
            runs[dtype] = (gather_rows([score.logprobs for score in scores], batches, len(mine)), losses)
            if dtype == "bf16":
                weights = dict(policy.hf_weights())
                assert all(value.dtype == torch.bfloat16 for value in weights.values())
                moved = sum(not torch.equal(value.float(), start[name]) for name, value in weights.items())
                assert moved > len(weights) / 2, "most single steps of 1e-4 are lost in bf16; six in fp32 are not"
    for exact, rounded in zip(runs["fp32"][0], runs["bf16"][0], strict=True):
        assert rounded.dtype == torch.float32
        assert 0 < relative_error(rounded, exact) < 0.02
    (exact, rounded) = (runs[dtype][1] for dtype in ("fp32", "bf16"))
    assert rounded[0] == pytest.approx(exact[0], rel=2e-3)
    assert 0.5 < (rounded[0] - rounded[-1]) / (exact[0] - exact[-1]) < 1.5, (exact, rounded)


def _check_trainer(model_dir: str) -> None:
    """A whole step of a trainer, with a KL in the reward and entropy bonuses of both signs, has transformers' gradients
    of the loss in plain torch; at the first the KL is 0."""
    from megatron_sr1.weights import export_hf_weights

    with built(model_dir, trainer_cases.OVERRIDES, keep_reference=True) as (policy, config):
        processor = Processor.from_pretrained(model_dir)
        steps = trainer_cases.two_updates(policy, config, processor, Path(f"{model_dir}.tokens"))
        assert steps.first.metrics["loss/answer/kl_in_reward"] == 0.0
        hf, prefixes = _hf_model(model_dir), policy.architecture.family
        for name, parameter in hf.named_parameters():
            name = name.replace("model.language_model.", prefixes.language_prefix)
            parameter.data.copy_(steps.between[name.replace("model.visual.", prefixes.vision_prefix)])
        loss, taken = trainer_cases.plain_loss(hf, _hf_model(model_dir), processor)
        loss.backward()
        assert abs(taken) > 1e-3
        assert steps.second.metrics["loss/answer/kl_in_reward"] == pytest.approx(taken, rel=1e-3)
        found = dict(export_hf_weights(policy.chunks, policy.architecture, policy.groups, read=_main_grad))
        for name, parameter in hf.named_parameters():
            name = name.replace("model.language_model.", prefixes.language_prefix)
            name = name.replace("model.visual.", prefixes.vision_prefix)
            assert relative_error(found[name], parameter.grad) < TOLERANCE, name


def _main_grad(parameter: Any) -> Tensor:
    return parameter.main_grad


class Spoiled(MeanLoss):
    """One whose value, and so its gradient, is spoilt on some ranks."""

    def __init__(self, num_tokens: int, value: float, *, here: bool) -> None:
        super().__init__(num_tokens)
        self.factor = value if here else 1.0

    def __call__(self, index: int, logprobs: LogProbs) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().__call__(index, logprobs)
        return loss * self.factor, metrics


def _check_bad_steps(rank: int, num_ranks: int, model_dir: str, folder: str) -> None:
    """A gradient that is not finite, on whichever rank: weights and moments keep their bits on all, the schedule goes
    on, and the next step is the one that it would have been."""
    layouts = [[], ["layout.distributed_optimizer=false"]] if num_ranks == 1 else [["layout.tensor=2"], []]
    for overrides in layouts:
        found = []
        for values in ((), (math.nan, math.inf)):
            with built(model_dir, overrides, num_optimizer_steps=4) as (policy, config):
                batches, _ = packed_rows(policy, config, Processor.from_pretrained(model_dir))
                policy.train_step(batches, MeanLoss(100), Scoring())
                before = [tensor.clone() for tensor in _state(policy)]
                for value in values:
                    bad = policy.train_step(batches, Spoiled(100, value, here=rank == num_ranks - 1), Scoring())
                    assert bad.skipped and not math.isfinite(bad.grad_norm)
                    assert all(torch.equal(*pair) for pair in zip(_state(policy), before, strict=True)), overrides
                    assert all(torch.isfinite(each.logprobs).all() for each in policy.logprobs(batches, Scoring()))
                good = policy.train_step(batches, MeanLoss(100), Scoring())
                assert not good.skipped
                found.append(({**good.metrics, "norm": good.grad_norm}, [tensor.clone() for tensor in _state(policy)]))
        (metrics, weights), (others, theirs) = found
        assert metrics == others and all(torch.equal(*pair) for pair in zip(weights, theirs, strict=True)), overrides


def _state(policy: Any) -> list[Tensor]:
    from megatron_sr1.policy.optimizer import inner_optimizers

    weights = [parameter for chunk in policy.chunks for parameter in chunk.parameters()]
    moments = [state for inner in inner_optimizers(policy.optimizer) for state in inner.state.values()]
    return weights + [moment for state in moments for moment in state.values()]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_step_whose_gradient_is_not_finite_leaves_no_trace(
    tiny_model_dir: str, tmp_path: Path, num_ranks: int
) -> None:
    run_ranks(num_ranks, _check_bad_steps, tiny_model_dir, str(tmp_path))


def _check_everything(rank: int, num_ranks: int, model_dir: str, folder: str) -> None:
    _check_steps(model_dir, folder)
    _check_steps(model_dir, folder, "optimizer.vision_lr=3e-4", vision_lr=3e-4)
    _check_steps(model_dir, folder, "model.freeze=[vision,merger]", vision_lr=0.0)
    _check_ban(model_dir)
    _check_frozen_tower(model_dir)
    _check_text_only_step(model_dir)
    _check_bf16(model_dir)
    _check_trainer(model_dir)


def test_one_rank_equals_transformers_and_adamw(tiny_model_dir: str, tmp_path: Path) -> None:
    run_ranks(1, _check_everything, tiny_model_dir, str(tmp_path))
