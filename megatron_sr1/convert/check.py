"""Does a Hugging Face folder hold exactly the tensors that its config.json calls for?"""

from __future__ import annotations

import torch

from megatron_sr1.convert.layout import HEAD, ModelSlots, ParameterSlot, hf_shapes
from megatron_sr1.weights.hf_dir import HfTensors
from megatron_sr1.weights.name_table import has_published_experts


def check_tensors(slots: ModelSlots, tensors: HfTensors) -> None:
    """Compares names and shapes with what the model's config.json calls for.

    Raises:
        ValueError: a tensor is missing, is no part of the model or has another shape.
    """
    expected = slots.by_hf()
    found = tensors.tensors
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        raise ValueError(
            f"{tensors.folder} has no tensor {_some(missing)}, which the model's config.json calls for. Copy the "
            "missing files, or correct config.json."
        )
    if extra == [HEAD] and stores_tied_head(slots, tensors):
        _check_tied(tensors, next(slot for slot in slots.parameters if slot.rule.kind == "vocabulary"))
    elif extra:
        raise ValueError(
            f"{tensors.folder} holds {_some(extra)}, which the model's config.json has no place for. Correct "
            "config.json, or remove the tensors: they would be lost."
        )
    for name, allowed in hf_shapes(slots).items():
        if found[name].shape not in allowed:
            raise ValueError(
                f"{tensors.slot(name).file}: {name} has the shape {list(found[name].shape)}, but config.json calls for "
                f"{' or '.join(str(list(shape)) for shape in allowed)}. They do not belong together."
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _check_tied(tensors: HfTensors, embedding: ParameterSlot) -> None:
    """A head that is stored although it is the embedding must be the embedding, or it would be lost."""
    name = embedding.rule.hf[0]
    pairs = zip(tensors.pieces(name), tensors.pieces(HEAD), strict=True)
    if tensors.tensors[name] != tensors.tensors[HEAD] or not all(torch.equal(a, b) for (_, a), (_, b) in pairs):
        raise ValueError(
            f"{tensors.folder}: config.json says tie_word_embeddings, but {HEAD} differs from {name}. Set "
            "tie_word_embeddings to false, or remove the tensor that is wrong."
        )


def stores_tied_head(slots: ModelSlots, tensors: HfTensors) -> bool:
    """Whether the head is there although it is the embedding."""
    return slots.architecture.tied and HEAD in tensors.tensors


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
