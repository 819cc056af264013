"""The parameters that are not trained, by `model.freeze`: no gradient, no optimizer state, on every rank alike.

The layers still pass gradients on to what is trained before them. Where the layers are recomputed a reentrant
checkpoint gives its parameters gradients only if its input asks for one, and where no language layer is trained a row
of text would have no graph at all: then the hidden states that enter the first layer ask for one (`needs_root`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_sr1.config import Config, ConfigError
from megatron_sr1.config.rules import require
from megatron_sr1.policy.architecture import Architecture
from megatron_sr1.policy.groups import ParallelGroups
from megatron_sr1.policy.read import vision_names
from megatron_sr1.weights.frozen import frozen_tensors, has_trained_language
from megatron_sr1.weights.load import local_parameters


@dataclass(frozen=True)
class Frozen:
    """What is frozen of the whole model."""

    tensors: frozenset[str]  # by their Hugging Face names
    trains_vision: bool  # the tower, a merger or a part of them
    needs_root: bool

    def apply(self, chunks: Sequence[torch.nn.Module], architecture: Architecture, groups: ParallelGroups) -> None:
        """Marks this rank's parameters."""
        if not self.tensors:
            return
        for rule, parameter in local_parameters(chunks, architecture, groups).values():
            parameter.requires_grad_(not self.tensors.issuperset(rule.hf))


def check_shares(freeze: Sequence[str], shares: Sequence[Sequence[int]], whose: str) -> None:
    """Whether everybody has something to train of what anybody trains. Megatron-Core's optimizer takes its counter of
    steps from its parameters, and writes the first rank's into a checkpoint.

    Args:
        shares: of each `whose`, in order, how many parameters it trains; a number for each kind (of experts, others).

    Raises:
        ConfigError: somebody has none; the message names the first.
    """
    for of_kind in zip(*shares, strict=True):
        if any(of_kind) and not all(of_kind):
            raise ConfigError(
                f"model.freeze={list(freeze)!r} is not allowed here: {whose} {of_kind.index(0)} of {len(of_kind)} has "
                "nothing to train of what others train, and could not write a checkpoint. Lower layout.pipeline (1 "
                "always goes), cut the layers otherwise by layout.stage_layers, or freeze less."
            )


def read_frozen(architecture: Architecture, config: Config) -> Frozen:
    """
    Raises:
        ConfigError: see `frozen_tensors`; a learning rate of the vision tower where nothing of it is trained.
    """
    if not config.model.freeze:
        return Frozen(frozenset(), trains_vision=True, needs_root=False)
    names = vision_names(architecture)
    tensors = frozen_tensors(config.model.freeze, architecture, names)
    trains_vision = not tensors.issuperset(architecture.family.vision_prefix + name for name in names)
    require(
        trains_vision or config.optimizer.vision_lr is None,
        "optimizer.vision_lr",
        config.optimizer.vision_lr,
        f"null with model.freeze={list(config.model.freeze)!r}, which freezes all that it is for",
        "Leave one of them out.",
    )
    return Frozen(
        tensors,
        trains_vision,
        needs_root=config.recompute.mode != "none" or not has_trained_language(tensors, architecture),
    )
