"""The policy against transformers, in one rank and in several layouts. Each launch runs many checks.

Everything that imports Megatron-Core runs in ranks of its own, so that the CPU shim never reaches the test process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sr1.config import Config, load_config
from megatron_sr1.packing import gather_rows, pack
from megatron_sr1.processing import Processor
from megatron_sr1.types import LogProbs, MicroBatch, Scoring, TokenSequence
from tests.ranks import run_ranks

TOLERANCE = 1e-5  # relative, fp32
STEP_TOLERANCE = 1e-3  # of a weight after a step, in learning rates
LAYOUTS = {
    "TP2": ["layout.tensor=2"],
    "TP2 with sequence parallelism": ["layout.tensor=2", "layout.sequence_parallel=true"],
    "PP2": ["layout.pipeline=2"],
    "DP2, ZeRO-1": [],
    "DP2, plain": ["layout.distributed_optimizer=false"],
}


def _sequences(processor: Processor) -> list[TokenSequence]:
    """Image, several images, text only, and two that share an image; a response may hold an image id as text."""
    generator = torch.Generator().manual_seed(0)

    def picture(width: int, height: int) -> Any:
        from PIL import Image

        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        return processor.encode_image(Image.fromarray(pixels.numpy()))

    def sequence(num_words: int, *images: Any) -> TokenSequence:
        ids = processor.prompt_ids("What is the sum of all digits?", len(images))
        response = torch.randint(0, 300, (num_words,), generator=generator).tolist()
        return TokenSequence(processor.expand(ids, [image.grid_thw for image in images]), response, images)

    wide, tall, square = picture(84, 28), picture(28, 84), picture(56, 56)
    samples = [sequence(9, wide), sequence(13, tall, square), sequence(21), sequence(5, square), sequence(7, square)]
    odd = TokenSequence(samples[2].prompt_ids, (*samples[2].response_ids, processor.image_token_id, 5))
    return [*samples, odd]


def _hf_scores(model: torch.nn.Module, sequences: list[TokenSequence], image_token_id: int) -> list[Tensor]:
    """transformers' log-probs and entropies [2, n] of each response, one sequence at a time. The entropy is made of
    the logits of the whole vocabulary, so that equal entropies mean equal logits."""
    results = []
    for sequence in sequences:
        prompt, response = torch.tensor(sequence.prompt_ids), torch.tensor(sequence.response_ids)
        ids = torch.cat([prompt, response])[None]
        vision = {}
        marks = torch.zeros_like(ids)
        if sequence.images:
            marks[0, : len(prompt)] = (prompt == image_token_id).long()
            vision = {
                "pixel_values": torch.cat([image.pixel_values for image in sequence.images]),
                "image_grid_thw": torch.tensor([image.grid_thw for image in sequence.images]),
                "mm_token_type_ids": marks.int(),
            }
        scores = model(input_ids=ids, **vision).logits[0].log_softmax(-1)
        scores = scores[len(prompt) - 1 : -1]
        entropy = -(scores.exp() * scores).sum(-1)
        results.append(torch.stack([scores.gather(1, response[:, None])[:, 0], entropy]))
    return results


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@contextmanager
def _built(model_dir: str, overrides: list[str], **options: Any) -> Iterator[tuple[Any, Config]]:
    from megatron_sr1.platform import start_platform

    platform = start_platform()
    from megatron_sr1.policy import Policy

    # with the usual eps of 1e-8, AdamW's first step is the sign of the gradient, and the sign of a gradient that should
    # be 0 is noise
    optimizer = ["optimizer.lr=1e-3", "optimizer.eps=1e-3"]
    config = load_config(None, [f"model.hf_dir={model_dir}", f"nproc={platform.world_size}", *optimizer, *overrides])
    yield Policy(config, platform, num_optimizer_steps=10, **{"keep_reference": False, **options}), config


def _rows(policy: Any, config: Config, processor: Processor, budget: int = 64) -> tuple[list[MicroBatch], list[int]]:
    """This replica's packed share (every second sequence under DP2) and which sequences it holds."""
    sequences = _sequences(processor)
    replicas = policy.groups.data
    mine = list(range(replicas.rank(), len(sequences), replicas.size()))
    multiple = config.layout.tensor if config.layout.sequence_parallel else 1
    batches = pack(
        [sequences[index] for index in mine],
        max_tokens=budget,
        pad_multiple=multiple,
        image_token_id=processor.image_token_id,
        merge_size=processor.merge_size,
    )
    return batches, mine


class _MeanLoss:
    """-mean of all response log-probs of the step; the denominator is global."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def __call__(self, index: int, logprobs: LogProbs) -> tuple[Tensor, dict[str, Tensor]]:
        loss = -logprobs.logprobs.sum() / self.num_tokens
        return loss, {"loss": loss}


def _check_one_rank(rank: int, num_ranks: int, model_dir: str, folder: str) -> None:
    """Logits, loss and gradient norm equal transformers'; one AdamW step equals torch's; writes the reference."""
    with _built(model_dir, [], keep_reference=True) as (policy, config):
        from transformers import Qwen2_5_VLForConditionalGeneration

        processor = Processor.from_pretrained(model_dir)
        sequences = _sequences(processor)
        batches, _ = _rows(policy, config, processor)
        assert len(batches) > 1, "the budget should make several rows"
        hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32)
        theirs = _hf_scores(hf, sequences[:-1], processor.image_token_id)
        expected = [score[0] for score in theirs]

        scores = policy.logprobs(batches, Scoring())
        found = gather_rows([score.logprobs for score in scores], batches, len(sequences))
        entropies = gather_rows([score.entropy for score in scores], batches, len(sequences))
        for logprobs, entropy, score in zip(found[:-1], entropies[:-1], theirs, strict=True):
            assert _relative_error(logprobs, score[0].detach()) < TOLERANCE
            assert _relative_error(entropy, score[1].detach()) < TOLERANCE
        # an image id that the policy sampled is scored as text, and changes nothing before it
        assert torch.isfinite(found[-1]).all()
        assert _relative_error(found[-1][:-2], found[2]) < TOLERANCE

        reference = policy.reference_logprobs(batches, Scoring())
        assert all(torch.equal(a.logprobs, b.logprobs) for a, b in zip(scores, reference, strict=True))

        _check_ban(policy, batches, hf, processor)
        _check_unsupported(folder)

        num_tokens = sum(len(sequence.response_ids) for sequence in sequences)
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in hf.parameters() if p.dim() > 1], "weight_decay": config.optimizer.weight_decay},
                {"params": [p for p in hf.parameters() if p.dim() == 1], "weight_decay": 0.0},
            ],
            lr=config.optimizer.lr,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            eps=config.optimizer.eps,
        )
        five = pack(
            sequences[:-1],
            max_tokens=64,
            pad_multiple=1,
            image_token_id=processor.image_token_id,
            merge_size=processor.merge_size,
        )
        loss = -torch.cat(expected).sum() / num_tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(hf.parameters(), config.optimizer.clip_grad)
        optimizer.step()
        result = policy.train_step(five, _MeanLoss(num_tokens), Scoring())
        assert result.metrics["loss"] == pytest.approx(loss.item(), rel=TOLERANCE)
        assert result.grad_norm == pytest.approx(norm.item(), rel=TOLERANCE)
        stepped = dict(policy.hf_weights())
        hf.save_pretrained(f"{folder}/hf_stepped")
        from megatron_sr1.convert.weights import HfTensors

        wanted = HfTensors(f"{folder}/hf_stepped")
        for name, tensor in stepped.items():
            assert (tensor - wanted[name]).abs().max() < STEP_TOLERANCE * config.optimizer.lr, name

        # the frozen reference is still what the policy started from
        after = policy.reference_logprobs(batches, Scoring())
        assert all(torch.equal(a.logprobs, b.logprobs) for a, b in zip(scores, after, strict=True))
        moved = policy.logprobs(batches, Scoring())
        assert not torch.equal(moved[0].logprobs, scores[0].logprobs)

    with _built(model_dir, []) as (policy, config):
        result = policy.train_step(_rows(policy, config, processor)[0], _MeanLoss(num_tokens), Scoring())
        torch.save({"logprobs": found, "result": result, "weights": dict(policy.hf_weights())}, f"{folder}/one_rank.pt")


def _check_unsupported(folder: str) -> None:
    from megatron_sr1.policy import read_architecture

    (Path(folder) / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is not supported\. Supported: Qwen2_5_VL"):
        read_architecture(folder)


def _check_ban(policy: Any, batches: list[MicroBatch], hf: torch.nn.Module, processor: Processor) -> None:
    """Banned ids have no probability, so what remains is renormalised; temperature divides the logits."""
    text = [batch for batch in batches if batch.pixel_values is None][:1]
    scoring = Scoring(temperature=0.7, banned_ids=processor.media_ids)
    (score,) = policy.logprobs(text, scoring)
    batch = text[0]
    lengths = torch.diff(batch.cu_seqlens).tolist()
    logits = torch.cat([hf(input_ids=ids[None]).logits[0] for ids in batch.input_ids.split(lengths)])
    logits[:, list(processor.media_ids)] = -torch.inf
    expected = (logits / scoring.temperature).log_softmax(-1)[batch.loss_rows].gather(1, batch.targets[:, None])[:, 0]
    allowed = torch.tensor([target not in processor.media_ids for target in batch.targets.tolist()])
    assert _relative_error(score.logprobs[allowed], expected.detach()[allowed]) < TOLERANCE
    assert torch.isfinite(score.logprobs).all()


def _check_layouts(rank: int, num_ranks: int, model_dir: str, folder: str, layouts: dict[str, list[str]]) -> None:
    reference = torch.load(f"{folder}/one_rank.pt", weights_only=False)
    processor = Processor.from_pretrained(model_dir)
    num_tokens = sum(len(sequence.response_ids) for sequence in _sequences(processor))
    for name, overrides in layouts.items():
        with _built(model_dir, overrides) as (policy, config):
            original = {key: value.clone() for key, value in policy.hf_weights()}
            batches, mine = _rows(policy, config, processor)
            scores = policy.logprobs(batches, Scoring())
            for index, found in zip(
                mine, gather_rows([score.logprobs for score in scores], batches, len(mine)), strict=True
            ):
                assert _relative_error(found, reference["logprobs"][index]) < TOLERANCE, name
            result = policy.train_step(batches, _MeanLoss(num_tokens), Scoring())
            assert result.metrics["loss"] == pytest.approx(reference["result"].metrics["loss"], rel=TOLERANCE), name
            assert result.grad_norm == pytest.approx(reference["result"].grad_norm, rel=TOLERANCE), name
            weights = dict(policy.hf_weights())
            assert weights.keys() == reference["weights"].keys() == original.keys(), name
            for key, weight in weights.items():
                gap = (weight - reference["weights"][key]).abs().max().item()
                assert gap < STEP_TOLERANCE * config.optimizer.lr, f"{name}: {key} differs by {gap}"


def _check_checkpoints(rank: int, num_ranks: int, model_dir: str, folder: str) -> None:
    """Saved in TP2: the same layout goes on to the same bits, PP2 to the same numbers; other data is refused."""
    from megatron_sr1.checkpoint import Checkpointer, Progress

    processor = Processor.from_pretrained(model_dir)
    loss = _MeanLoss(100)
    path = Path(folder) / "checkpoints"
    with _built(model_dir, ["layout.tensor=2"]) as (policy, config):
        checkpoints = Checkpointer(path, 2, policy.platform)
        assert checkpoints.restore(policy, "data", "model") is None
        batches, _ = _rows(policy, config, processor)
        for step in range(1, 4):
            policy.train_step(batches, loss, Scoring())
            checkpoints.save(policy, Progress(step, 8 * step, "data", "model"))
        assert checkpoints.steps() == [2, 3], "only the newest two are kept"
        wanted = [policy.train_step(batches, loss, Scoring()) for _ in range(2)]
        weights = {name: tensor.clone() for name, tensor in policy.hf_weights()}

    with _built(model_dir, ["layout.tensor=2"]) as (policy, config):
        assert checkpoints.restore(policy, "data", "model") == Progress(3, 24, "data", "model")
        assert [policy.train_step(batches, loss, Scoring()) for _ in range(2)] == wanted
        assert all(torch.equal(tensor, weights[name]) for name, tensor in policy.hf_weights())
        with pytest.raises(ValueError, match="dataset_fingerprint 'data', but this run has 'other'"):
            checkpoints.restore(policy, "other", "model")

    with _built(model_dir, ["layout.pipeline=2"]) as (policy, config):
        checkpoints.restore(policy, "data", "model")
        results = [policy.train_step(batches, loss, Scoring()) for _ in range(2)]
        for found, expected in zip(results, wanted, strict=True):
            assert found.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=TOLERANCE)
            assert found.learning_rate == expected.learning_rate
        for name, tensor in policy.hf_weights():
            assert (tensor - weights[name]).abs().max() < STEP_TOLERANCE * config.optimizer.lr, name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("policy"))


def test_one_rank_equals_transformers(tiny_model_dir: str, folder: str) -> None:
    run_ranks(1, _check_one_rank, tiny_model_dir, folder)


def _check_two_ranks(rank: int, num_ranks: int, model_dir: str, folder: str) -> None:
    _check_layouts(rank, num_ranks, model_dir, folder, LAYOUTS)
    _check_checkpoints(rank, num_ranks, model_dir, folder)


def test_two_ranks_equal_one_and_checkpoints_move_between_layouts(tiny_model_dir: str, folder: str) -> None:
    run_ranks(2, _check_two_ranks, tiny_model_dir, folder)


def test_four_ranks_equal_one(tiny_model_dir: str, folder: str) -> None:
    layout = ["layout.tensor=2", "layout.pipeline=2", "layout.sequence_parallel=true"]
    run_ranks(4, _check_layouts, tiny_model_dir, folder, {"TP2 PP2 SP": layout})
