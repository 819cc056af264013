"""Every layout gives the log-probs, the loss and all gradients of one rank.

One rank writes the expectation for each family of models; each launch of several ranks then walks through many layouts.
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
from tests.model_zoo import create_family
from tests.ranks import run_ranks

TOLERANCE = 1e-5  # relative, fp32
# with the usual eps of 1e-8, AdamW's first step is the sign of the gradient, and the sign of a gradient that should be
# 0 is noise
OPTIMIZER = ("optimizer.lr=1e-3", "optimizer.eps=1e-3")
BUDGET = 96  # tokens of a row: several sequences share one, and there are several rows
STEP_TOLERANCE = 1e-3  # of a weight after a step, in learning rates

TP, PP, VPP, CP, EP = (f"layout.{name}" for name in ("tensor", "pipeline", "virtual", "context", "expert"))
SP = "layout.sequence_parallel=true"
PLAIN = "layout.distributed_optimizer=false"
DENSE, DEEPSTACK, MIXTURE = "qwen2_5_vl_tied", "qwen3_vl", "qwen3_vl_moe"
UNTIED = "qwen2_5_vl_untied"
EVERY = (DENSE, DEEPSTACK, MIXTURE)

# number of ranks -> (families, overrides); a mixture under tensor parallelism needs sequence parallelism
LAYOUTS: dict[int, list[tuple[tuple[str, ...], tuple[str, ...]]]] = {
    1: [
        (EVERY, ("recompute.mode=full", "recompute.vision=true")),
        (EVERY, ("recompute.mode=block", "recompute.layers=2")),
        (EVERY, ("recompute.mode=selective", "recompute.modules=[core_attn,mlp]")),
    ],
    2: [
        ((DENSE, UNTIED, DEEPSTACK), (f"{TP}=2",)),
        (EVERY, (f"{TP}=2", SP)),
        ((UNTIED, *EVERY), (f"{PP}=2",)),
        (EVERY, (f"{PP}=2", "layout.stage_layers=[1,3]", "recompute.mode=full")),
        (EVERY, (f"{PP}=2", f"{VPP}=2")),
        (EVERY, (f"{CP}=2",)),
        (EVERY, ()),
        (EVERY, (PLAIN,)),
        ((MIXTURE,), (f"{EP}=2",)),
        ((MIXTURE,), (f"{EP}=2", f"{TP}=2", SP, PLAIN)),
    ],
    4: [
        ((DENSE, UNTIED, DEEPSTACK), (f"{TP}=4",)),  # of 2 key/value heads
        ((UNTIED, *EVERY), (f"{PP}=4",)),
        ((DENSE, DEEPSTACK), (f"{TP}=2", f"{PP}=2")),
        (EVERY, (f"{TP}=2", f"{CP}=2", SP, "recompute.mode=full", "recompute.vision=true")),
        (EVERY, (f"{PP}=2", f"{CP}=2")),
        ((MIXTURE,), (f"{PP}=2", f"{VPP}=2", f"{EP}=2")),
        ((MIXTURE,), (f"{TP}=2", f"{EP}=4", SP)),
    ],
    8: [
        ((DENSE, DEEPSTACK), (f"{TP}=2", f"{PP}=2")),  # and DP2
        ((MIXTURE,), (f"{TP}=2", f"{PP}=2", f"{EP}=2", SP)),
        ((DEEPSTACK,), (f"{TP}=2", f"{PP}=2", f"{VPP}=2", f"{CP}=2", SP)),
    ],
}


def _sequences(processor: Processor) -> list[TokenSequence]:
    """One image, several, none; images that sequences share; odd sizes; long and short responses."""
    generator = torch.Generator().manual_seed(0)
    side = 28

    def picture(columns: float, rows: float) -> Any:
        from PIL import Image

        size = (int(rows * side), int(columns * side), 3)
        pixels = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        return processor.encode_image(Image.fromarray(pixels.numpy()))

    def sequence(num_words: int, *images: Any) -> TokenSequence:
        ids = processor.prompt_ids("What is the sum of all digits?", len(images))
        response = torch.randint(0, 300, (num_words,), generator=generator).tolist()
        return TokenSequence(processor.expand(ids, [image.grid_thw for image in images]), response, images)

    wide, tall, odd = picture(3, 1), picture(1, 4), picture(3.3, 2.6)
    return [
        sequence(9, wide),
        sequence(13, tall, odd),
        sequence(21),
        sequence(5, odd),
        sequence(7, odd),
        sequence(30),
        sequence(2, wide, tall),
    ]


@contextmanager
def _built(model_dir: str, overrides: tuple[str, ...]) -> Iterator[tuple[Any, Config]]:
    from megatron_sr1.platform import start_platform

    platform = start_platform()
    from megatron_sr1.policy import Policy

    config = load_config(None, [f"model.hf_dir={model_dir}", f"nproc={platform.world_size}", *OPTIMIZER, *overrides])
    yield Policy(config, platform, num_optimizer_steps=10, keep_reference=False), config


def _rows(policy: Any, config: Config, processor: Processor, budget: int) -> tuple[list[MicroBatch], list[int]]:
    """This replica's packed share (every n-th sequence) and which sequences it holds."""
    sequences = _sequences(processor)
    replicas = policy.groups.data
    mine = list(range(replicas.rank(), len(sequences), replicas.size()))
    batches = pack(
        [sequences[index] for index in mine],
        max_tokens=budget,
        row_multiple=config.row_multiple,
        sequence_multiple=config.sequence_multiple,
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


def _gradients(policy: Any) -> dict[str, Tensor]:
    """Of the last step, under their Hugging Face names. Complete on every rank without a distributed optimizer."""
    from megatron_sr1.convert import export_hf_weights

    exported = export_hf_weights(
        policy.chunks, policy.architecture, policy.groups, read=lambda parameter: parameter.main_grad
    )
    return {name: tensor.clone() for name, tensor in exported}


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def _one_step(model_dir: str, overrides: tuple[str, ...], budget: int) -> dict[str, Any]:
    """Log-probs by sequence (of this replica), and loss, gradients and weights of a step."""
    processor = Processor.from_pretrained(model_dir)
    num_tokens = sum(len(sequence.response_ids) for sequence in _sequences(processor))
    with _built(model_dir, overrides) as (policy, config):
        batches, mine = _rows(policy, config, processor, budget)
        scores = policy.logprobs(batches, Scoring())
        logprobs = gather_rows([score.logprobs for score in scores], batches, len(mine))
        entropies = gather_rows([score.entropy for score in scores], batches, len(mine))
        result = policy.train_step(batches, _MeanLoss(num_tokens), Scoring())
        return {
            "logprobs": dict(zip(mine, logprobs, strict=True)),
            "entropies": dict(zip(mine, entropies, strict=True)),
            "result": result,
            "gradients": {} if config.layout.distributed_optimizer else _gradients(policy),
            "weights": {name: tensor.clone() for name, tensor in policy.hf_weights()},
            "num_rows": len(batches),
        }


def _check(found: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    for kind in ("logprobs", "entropies"):
        for index, values in found[kind].items():
            error = _relative_error(values, expected[kind][index])
            assert error < TOLERANCE, f"{name}: {kind} of sequence {index} differ by {error}"
    assert found["result"].metrics["loss"] == pytest.approx(expected["result"].metrics["loss"], rel=TOLERANCE), name
    assert found["result"].grad_norm == pytest.approx(expected["result"].grad_norm, rel=TOLERANCE), name
    assert found["weights"].keys() == expected["weights"].keys(), name
    for key, gradient in found["gradients"].items():
        error = _relative_error(gradient, expected["gradients"][key])
        assert error < TOLERANCE, f"{name}: the gradient of {key} differs by {error}"
    lr = float(OPTIMIZER[0].split("=")[1])
    for key, weight in found["weights"].items():
        gap = (weight - expected["weights"][key]).abs().max().item()
        assert gap < STEP_TOLERANCE * lr, f"{name}: {key} differs by {gap} after a step"


def _walk(rank: int, num_ranks: int, folder: str) -> None:
    """All layouts of this number of ranks. One rank also writes what the others are compared with."""
    if num_ranks == 1:
        for family in (UNTIED, *EVERY):
            torch.save(_one_step(f"{folder}/{family}", (PLAIN,), BUDGET), f"{folder}/{family}.pt")
        _check_packing(folder)
    for families, overrides in LAYOUTS[num_ranks]:
        for family in families:
            expected = torch.load(f"{folder}/{family}.pt", weights_only=False)
            # with a distributed optimizer a rank has only its share of the gradients; weights are compared in each case
            for options in ((*overrides, PLAIN), overrides) if PLAIN not in overrides else (overrides,):
                if options is overrides and num_ranks > 2:
                    continue
                name = f"{family} on {num_ranks} ranks, {' '.join(options)}"
                _check(_one_step(f"{folder}/{family}", options, BUDGET), expected, name)


def _check_packing(folder: str) -> None:
    """Rows of one sequence each, and one row of all, are the same to the policy as the rows between."""
    expected = torch.load(f"{folder}/{DEEPSTACK}.pt", weights_only=False)
    counts = [expected["num_rows"]]
    for budget in (56, 1024):
        found = _one_step(f"{folder}/{DEEPSTACK}", (PLAIN,), budget)
        counts.append(found["num_rows"])
        _check(found, expected, f"rows of {budget} tokens")
    assert len(set(counts)) == 3 and counts[2] == 1, counts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("layouts")
    for family in (UNTIED, *EVERY):
        create_family(folder / family, family)
    return str(folder)


@pytest.mark.parametrize("num_ranks", sorted(LAYOUTS))
def test_a_layout_changes_no_number(num_ranks: int, folder: str) -> None:
    run_ranks(num_ranks, _walk, folder)
