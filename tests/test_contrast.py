"""First passes under other contexts: whole steps against transformers, and layouts against one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import trainer_cases
from tests.contrast_cases import CASES
from tests.model_zoo import create_family
from tests.policy_cases import LEARNING_RATE, STEP_TOLERANCE, TOLERANCE, built, processor_of, relative_error
from tests.ranks import run_ranks

LAYOUTS: tuple[tuple[str, ...], ...] = (
    (),
    ("layout.tensor=2", "layout.sequence_parallel=true"),
    ("layout.pipeline=2",),
    ("layout.context=2",),
)
# of two ranks, too: experts of several replicas, which meet in every row; the chunks of an interleaved pipeline
FAMILIES = {
    "qwen3_vl_moe": ("layout.expert=2",),
    "qwen3_vl": ("layout.pipeline=2", "layout.virtual=2", "recompute.mode=full"),
}


def _check_transformers(model_dir: str) -> None:
    """The second of two steps has transformers' gradients, and reports its numbers."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    from megatron_sr1.weights import export_hf_weights

    processor = processor_of(model_dir)
    for name, (overrides, plain) in CASES.items():
        with built(model_dir, overrides) as (policy, config):
            steps = trainer_cases.two_updates(policy, config, processor, Path(f"{model_dir}.tokens"))
            hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32)
            prefixes = policy.architecture.family

            def ours(key: str, prefixes: Any = prefixes) -> str:
                key = key.replace("model.language_model.", prefixes.language_prefix)
                return key.replace("model.visual.", prefixes.vision_prefix)

            for key, parameter in hf.named_parameters():
                parameter.data.copy_(steps.between[ours(key)])
            loss, numbers = plain(hf, processor)
            loss.backward()
            for key, value in numbers.items():
                assert steps.second.metrics[key] == pytest.approx(value, rel=1e-3, abs=1e-6), (name, key)
            exported = export_hf_weights(
                policy.chunks, policy.architecture, policy.groups, read=lambda parameter: parameter.main_grad
            )
            found = dict(exported)
            errors = {key: relative_error(found[ours(key)], p.grad) for key, p in hf.named_parameters()}
            assert max(errors.values()) < TOLERANCE, (name, errors)


def _steps(model_dir: str, overrides: tuple[str, ...]) -> trainer_cases.Steps:
    with built(model_dir, overrides) as (policy, config):
        return trainer_cases.two_updates(policy, config, processor_of(model_dir), Path(f"{model_dir}.tokens"))


def _check(found: trainer_cases.Steps, expected: trainer_cases.Steps, where: Any) -> None:
    assert found.second.metrics.keys() == expected.second.metrics.keys(), where
    assert found.second.metrics == pytest.approx(expected.second.metrics, rel=1e-3, abs=1e-6), where
    assert found.second.grad_norm == pytest.approx(expected.second.grad_norm, rel=TOLERANCE), where
    trainer_cases.check_tokens(found, expected, where)
    for key, weight in found.between.items():
        gap = (weight - expected.between[key]).abs().max().item()
        assert gap < STEP_TOLERANCE * LEARNING_RATE, (where, key, gap)


def _walk(rank: int, num_ranks: int, model_dir: str, folder: str) -> None:
    steps = [(name, model_dir, overrides, LAYOUTS) for name, (overrides, _) in CASES.items()]
    for case in ("papo", "whole"):
        overrides = (*CASES[case][0], "train.micro_batch_tokens=512")  # their tokenizers know less
        steps += [
            (f"{family}_{case}", f"{folder}/{family}", overrides, (layout,)) for family, layout in FAMILIES.items()
        ]
    if num_ranks == 1:
        _check_transformers(model_dir)
    for name, place, overrides, layouts in steps:
        if num_ranks == 1:
            torch.save(_steps(place, overrides), f"{folder}/{name}.pt")
            continue
        expected = torch.load(f"{folder}/{name}.pt", weights_only=False)
        for layout in layouts:
            found = _steps(place, (*overrides, "train.micro_batch_tokens=1024", *layout))
            _check(found, expected, (name, layout))


def test_a_step_is_that_of_transformers_in_every_layout(tiny_model_dir: str, tmp_path: Path) -> None:
    for family in FAMILIES:
        create_family(tmp_path / family, family)
    for num_ranks in (1, 2):
        run_ranks(num_ranks, _walk, tiny_model_dir, str(tmp_path))
