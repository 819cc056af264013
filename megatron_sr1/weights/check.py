"""Does a Hugging Face folder hold exactly the tensors that its config.json calls for?

Whoever reads weights asks here first, converter and training alike: what the model has no place for would be lost in
silence, and numbers that need scales would be taken for the weights themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from megatron_sr1.config import HfConfig
from megatron_sr1.ranks import Ranks
from megatron_sr1.weights.hf_dir import HfTensors, check_finite
from megatron_sr1.weights.name_table import language_rules

HEAD = "lm_head.weight"
_EXPERT_ALONE = re.compile(r"\.mlp\.experts\.\d+\.")


def check_tensors(tensors: HfTensors, sizes: HfConfig, vision: Iterable[str]) -> None:
    """Looks at headers, and at the values of a head that is stored although it is the embedding.

    Args:
        vision: names of the vision tower's parameters, as its module has them.

    Raises:
        ValueError: a tensor is missing, is no part of the model (adapters, value heads, scales, biases), or holds
            numbers of less than 16 bit.
    """
    expected = {name for rule in language_rules(sizes) for name in rule.hf}
    expected |= {sizes.family.vision_prefix + name for name in vision}
    found = tensors.tensors
    missing = sorted(expected - found.keys())
    extra = sorted(name for name in found.keys() - expected if not sizes.family.is_kept(name))
    quantised = sorted(name for name in expected & found.keys() if not _is_plain(found[name].dtype))
    if quantised:
        raise ValueError(
            f"{tensors.slot(quantised[0]).file}: {quantised[0]} is {found[quantised[0]]}, and so are {len(quantised)} "
            "tensors of less than 16 bit in all: the checkpoint is quantised. Take the model in bfloat16."
        )
    alone = [name for name in extra if _EXPERT_ALONE.search(name)]
    if missing and alone:
        raise ValueError(
            f"{tensors.folder} holds experts one by one, first {alone[0]}; those of a layer must be one tensor, "
            f"{missing[0]} for one, as published checkpoints have them. Give the published folder, or join them."
        )
    if missing:
        raise ValueError(
            f"{tensors.folder} has no tensor {_some(missing)}, which the model's config.json calls for. Copy the "
            "missing files, or correct config.json."
        )
    if extra == [HEAD] and stores_tied_head(tensors, sizes):
        _check_tied(tensors, f"{sizes.family.language_prefix}embed_tokens.weight")
    elif extra:
        raise ValueError(
            f"{tensors.folder} holds {_some(extra)}, which the model's config.json has no place for. Merge an adapter "
            "into its model, correct config.json, or remove the tensors: they would be lost."
        )


def check_values(tensors: HfTensors, ranks: Ranks) -> None:
    """Reads every tensor, each on one of the ranks. Collective.

    Raises:
        ValueError: on every rank: a value is not finite; the message names the first of each tensor.
    """
    wrong = []
    for name in sorted(tensors.tensors)[ranks.rank :: ranks.num_ranks]:
        try:
            for start, piece in tensors.pieces(name):
                check_finite(piece, name, tensors.slot(name).file, start)
        except ValueError as error:
            wrong.append(str(error))
    wrong = ranks.gather(wrong)
    if wrong:
        raise ValueError("\n".join(sorted(wrong)))


def stores_tied_head(tensors: HfTensors, sizes: HfConfig) -> bool:
    """Whether the head is there although it is the embedding."""
    return sizes.tied and HEAD in tensors.tensors


def _is_plain(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _check_tied(tensors: HfTensors, embedding: str) -> None:
    """A head that is stored although it is the embedding must be the embedding, or it would be lost."""
    pairs = zip(tensors.pieces(embedding), tensors.pieces(HEAD), strict=True)
    if tensors.tensors[embedding] != tensors.tensors[HEAD] or not all(torch.equal(a, b) for (_, a), (_, b) in pairs):
        raise ValueError(
            f"{tensors.folder}: config.json says tie_word_embeddings, but {HEAD} differs from {embedding}. Set "
            "tie_word_embeddings to false, or remove the tensor that is wrong."
        )
