"""Training with model.freeze against transformers, whose parameters of the same names require no gradient."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sr1.config import Config
from megatron_sr1.packing import pack
from megatron_sr1.processor import Processor
from megatron_sr1.types import LogProbs, Scoring
from tests.model_zoo import ZOO
from tests.policy_cases import BUDGET, TOLERANCE, MeanLoss, relative_error

# part or expression of model.freeze -> whether transformers' parameter of that name is meant
FROZEN_NAMES: dict[str, Callable[[str], bool]] = {
    "vision": lambda name: ".visual." in name and "merger" not in name,
    "merger": lambda name: "merger" in name,
    "language": lambda name: name.startswith(("model.language_model.layers", "model.language_model.norm", "lm_head")),
    "embeddings": lambda name: "embed_tokens" in name,
    "'.*layers[.][01][.].*'": lambda name: "language_model.layers.0." in name or "language_model.layers.1." in name,
    "'.*(visual.blocks.[01]|o_proj|down_proj).*'": lambda name: bool(
        re.search("visual.blocks.[01]|o_proj|down_proj", name)
    ),
}
# with recomputed layers whose inputs carry no gradient, rows of text that nothing trained reads, a tied head
FREEZES = {
    "tower": (("vision",), ("recompute.vision=true",)),
    "only vision": (("language", "embeddings"), ()),
    "only language": (("vision", "merger", "embeddings"), ("recompute.mode=full",)),
    "only mergers": (("vision", "language", "embeddings"), ("recompute.mode=full",)),
    "lower layers": (
        ("'.*layers[.][01][.].*'", "embeddings", "merger"),
        ("recompute.mode=selective", "recompute.modules=[mlp]"),
    ),
    "here and there": (("'.*(visual.blocks.[01]|o_proj|down_proj).*'",), ()),
}
OF_FAMILY = {
    "qwen2_5_vl_tied": ("only vision", "only language", "here and there"),
    "qwen2_5_vl_untied": ("tower", "lower layers"),
    "qwen3_vl": ("tower", "only mergers", "lower layers"),
    "qwen3_vl_moe": ("only vision", "only language"),
    "qwen3_5_tied": ("only language",),
    "qwen3_5": ("lower layers",),
    "qwen3_5_moe": ("only vision",),
}


class _GraphLoss(MeanLoss):
    """A row that nothing trained has touched has a graph, too: `objective.own_loss` asks a user's loss for one."""

    def __call__(self, index: int, logprobs: LogProbs) -> tuple[Tensor, dict[str, Tensor]]:
        assert logprobs.logprobs.requires_grad
        return super().__call__(index, logprobs)


def check_frozen(
    model_dir: str,
    family: str,
    build: Callable[..., tuple[Any, Config]],
    make: Callable[[Processor], list[Any]],
    score: Callable[..., Tensor],
) -> None:
    """Two clipped steps of AdamW: frozen parameters stay to the bit, the others are transformers', whose frozen ones
    require no gradient; so are the gradients of the second step and both norms, which count trained ones alone."""
    import transformers

    processor = Processor.from_pretrained(model_dir)
    sequences = make(processor)[:4]
    num_tokens = sum(len(sequence.response_ids) for sequence in sequences)
    for freeze, recompute in (FREEZES[name] for name in OF_FAMILY[family]):
        options = ["optimizer.eps=1e-3", "optimizer.clip_grad=0.1", f"model.freeze=[{','.join(freeze)}]"]
        policy, config = build(model_dir, *options, *recompute)
        model = getattr(transformers, ZOO[family].class_name).from_pretrained(model_dir, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(FROZEN_NAMES[entry](name) for entry in freeze))
        start = published_tensors(model, policy.architecture, lambda parameter: parameter.detach().clone())
        optimizer = _adamw(model, config)
        batches = pack(
            sequences,
            max_tokens=BUDGET,
            row_multiple=config.row_multiple,
            sequence_multiple=config.sequence_multiple,
            image_token_id=processor.image_token_id,
            merge_size=processor.merge_size,
        )
        assert len(batches) > 1 and not all(batch.images for batch in batches)
        for _ in range(2):
            scores = torch.cat([score(model, sequence, processor.image_token_id)[0] for sequence in sequences])
            optimizer.zero_grad()
            (-scores.sum() / num_tokens).backward()
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            norm = torch.nn.utils.clip_grad_norm_(trained, config.optimizer.clip_grad)
            optimizer.step()
            result = policy.train_step(batches, _GraphLoss(num_tokens), Scoring())
            assert result.grad_norm == pytest.approx(norm.item(), rel=TOLERANCE), (family, freeze)
        _compare_frozen(policy, model, start, f"{family} {freeze}")


def _compare_frozen(policy: Any, model: torch.nn.Module, start: dict[str, Tensor], case: str) -> None:
    from megatron_sr1.weights import export_hf_weights

    wanted = published_tensors(model, policy.architecture, lambda parameter: parameter.detach())
    gradients = published_tensors(model, policy.architecture, lambda parameter: parameter.grad)
    exported = export_hf_weights(
        policy.chunks, policy.architecture, policy.groups, read=lambda parameter: parameter.main_grad
    )
    found = {name: tensor.clone() for name, tensor in exported}
    num_frozen = 0
    for name, weight in policy.hf_weights():
        if gradients[name] is None:
            num_frozen += 1
            assert torch.equal(weight, start[name]), f"{case}: {name} is frozen"
            continue
        gap, error = (weight - wanted[name]).abs().max(), relative_error(found[name], gradients[name])
        assert gap < 1e-6 and not torch.equal(weight, start[name]), f"{case}: {name} differs by {gap}"
        assert error < gradient_tolerance(name), f"{case}: the gradient of {name} differs by {error}"
    assert 0 < num_frozen < len(start)
    buffered = sum(parameter.numel() for parameter in policy.chunks[0].parameters() if hasattr(parameter, "main_grad"))
    assert buffered == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad), case


def gradient_tolerance(name: str) -> float:
    """Of the relative error in fp32. Those of a head's decay are one number each, a sum over tokens of either sign."""
    return 2 * TOLERANCE if name.endswith((".A_log", ".dt_bias")) else TOLERANCE


def published_tensors(model: torch.nn.Module, architecture: Any, read: Callable[[Any], Any]) -> dict[str, Any]:
    """What `read` takes of each parameter, by the names of published checkpoints and lying as in those."""
    found = {}
    for name, parameter in model.named_parameters():
        name = name.replace("model.language_model.", architecture.family.language_prefix)
        name = name.replace("model.visual.", architecture.family.vision_prefix)
        value = read(parameter)
        turned = value is not None and ".mlp.experts." in name and architecture.family.experts_turned
        found[name] = value.transpose(1, 2) if turned else value
    return found


def _adamw(model: torch.nn.Module, config: Config) -> torch.optim.AdamW:
    settings = config.optimizer
    groups = [
        {"params": [p], "weight_decay": settings.weight_decay if p.dim() > 1 else 0.0}
        for p in model.parameters()
        if p.requires_grad
    ]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps)
