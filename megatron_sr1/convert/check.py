"""Do the tensors of a Hugging Face folder fit a checkpoint of its model?"""

from __future__ import annotations

import torch

from megatron_sr1.convert.layout import ModelSlots, hf_shapes
from megatron_sr1.weights.hf_dir import HfTensors
from megatron_sr1.weights.name_table import has_published_experts


def check_shapes(slots: ModelSlots, tensors: HfTensors) -> None:
    """Compares the shapes of the model's tensors, all of which are there, with what its config.json calls for.

    Raises:
        ValueError: a tensor has another shape.
    """
    found = tensors.tensors
    for name, allowed in hf_shapes(slots).items():
        if found[name].shape not in allowed:
            raise ValueError(
                f"{tensors.slot(name).file}: {name} has the shape {list(found[name].shape)}, but config.json calls for "
                f"{' or '.join(str(list(shape)) for shape in allowed)}. They do not belong together."
            )


def published_experts(slots: ModelSlots, tensors: HfTensors) -> bool:
    """Whether experts lie as in published checkpoints; true where there are none."""
    found = tensors.tensors
    return all(
        has_published_experts(slot.rule, found[slot.rule.hf[0]].shape, slots.architecture)
        for slot in slots.parameters
        if slot.rule.expert is not None
    )


def stored_dtypes(slots: ModelSlots, tensors: HfTensors) -> dict[str, torch.dtype]:
    """The types of the checkpoint's tensors: those of the Hugging Face tensors they are made of.

    Raises:
        ValueError: these differ among each other.
    """
    found = tensors.tensors
    types: dict[str, tuple[torch.dtype, str]] = {}
    for slot in slots.parameters:
        for name in slot.rule.hf:
            dtype, first = types.setdefault(slot.key, (found[name].dtype, name))
            if found[name].dtype != dtype:
                raise ValueError(
                    f"{tensors.folder}: {name} is {found[name]}, {first} is {found[first]}: the checkpoint's "
                    f"{slot.key} can have only one type. Convert one of them."
                )
    return {key: dtype for key, (dtype, _) in types.items()}
