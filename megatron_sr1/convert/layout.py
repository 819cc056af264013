"""Where a Megatron checkpoint keeps each parameter of a model, and which Hugging Face tensors belong there.

Megatron-Core's own model says it: it is built without memory for its weights, as one rank would hold it, and asked for
its sharded state. So keys, stacked layers and experts are never guessed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, apply_factories

from megatron_sr1.config import HfConfig
from megatron_sr1.policy import Architecture
from megatron_sr1.policy.build import meta_model
from megatron_sr1.weights.name_table import WeightRule, hf_from_shards, language_rules, vision_rule

HF_FOLDER = "hf"  # in a checkpoint: configuration, tokenizer and processor files, so that it needs no other folder
HF_LAYOUT = "hf_layout.json"
T = TypeVar("T")


@dataclass(frozen=True)
class HfLayout:
    """What a model's Hugging Face tensors looked like, where there are several ways. A checkpoint that was not made of
    any has the first."""

    published_experts: bool = True  # experts lie [in, out], as published; else [out, in], as transformers saves them
    stores_tied_head: bool = False  # the head is stored although it is the embedding

    @staticmethod
    def read(folder: Path) -> HfLayout:
        path = folder / HF_LAYOUT
        return HfLayout(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else HfLayout()

    def write(self, folder: Path) -> None:
        (folder / HF_LAYOUT).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")


def config_dir(folder: Path, hf_dir: str | None) -> str:
    """The folder of the config.json of a Megatron checkpoint: the one it brings along, else `hf_dir`.

    Raises:
        ValueError: there is neither.
    """
    own = folder / HF_FOLDER
    if (own / "config.json").is_file():
        return str(own)
    if hf_dir is None:
        raise ValueError(f"{folder} has no {HF_FOLDER}/config.json. Give --hf DIR, the model it was started from.")
    return hf_dir


@dataclass(frozen=True)
class ParameterSlot:
    """A parameter of the whole model, and its place in a tensor of the checkpoint."""

    rule: WeightRule
    key: str  # the checkpoint's tensor
    leading: tuple[int, ...]  # its first axes, which count layers and experts
    index: tuple[int, ...]  # the parameter's place on them
    shape: tuple[int, ...]  # of the parameter

    def offsets(self, row: int) -> tuple[int, ...]:
        """Of a piece that starts at a row of the parameter, in the checkpoint's tensor."""
        return (*self.index, row, *(0 for _ in self.shape[1:])) if self.shape else self.index

    def sizes(self, num_rows: int) -> tuple[int, ...]:
        """Of a piece of so many rows, in the checkpoint's tensor."""
        return (*(1 for _ in self.leading), num_rows, *self.shape[1:]) if self.shape else tuple(1 for _ in self.leading)


@dataclass(frozen=True)
class ModelSlots:
    """All parameters of a model in checkpoint order."""

    architecture: Architecture
    parameters: tuple[ParameterSlot, ...]

    @property
    def keys(self) -> set[str]:
        """The checkpoint's tensors."""
        return {slot.key for slot in self.parameters}

    def by_hf(self) -> dict[str, list[tuple[ParameterSlot, int]]]:
        """For each Hugging Face tensor its parameters, one or one for each expert, each with the tensor's number among
        those that the parameter is made of."""
        found: dict[str, list[tuple[ParameterSlot, int]]] = {}
        for slot in self.parameters:
            for number, name in enumerate(slot.rule.hf):
                found.setdefault(name, []).append((slot, number))
        return found


def model_slots(hf_dir: str) -> ModelSlots:
    """Reads the model's config.json; no weights are read.

    Raises:
        ValueError: no config.json, or a model class that is not supported.
    """
    if not (Path(hf_dir) / "config.json").is_file():
        raise ValueError(f"{hf_dir} holds no config.json. Give a model folder in Hugging Face format.")
    chunks, architecture = meta_model(hf_dir)
    rules = {rule.megatron: rule for rule in language_rules(architecture)}
    slots: dict[tuple[str, tuple[int, ...]], ParameterSlot] = {}
    for chunk in chunks:
        state = {
            name: value
            for name, value in chunk.sharded_state_dict().items()
            if isinstance(value, ShardedTensor | ShardedTensorFactory)
        }
        shapes = {name: tuple(value.data.shape) for name, value in state.items()}
        apply_factories(state)  # a gated projection becomes two tensors, one behind the other under the same key
        for name, value in state.items():
            rule = rules[name] if name in rules else vision_rule(name, architecture)
            slot = _slot(rule, shapes[name], list(nested_values([value])))
            slots.setdefault((slot.key, slot.index), slot)  # a tied head is the embedding
    return ModelSlots(architecture, tuple(slots.values()))


def _slot(rule: WeightRule, shape: tuple[int, ...], shards: Sequence[ShardedTensor]) -> ParameterSlot:
    first = shards[0]
    num_leading = first.prepend_axis_num
    leading, index = first.global_shape[:num_leading], first.global_offset[:num_leading]
    assert {shard.key for shard in shards} == {first.key}
    assert sum(math.prod(shard.local_shape) for shard in shards) == math.prod(shape)
    assert first.global_shape[num_leading:] == shape, (rule.megatron, first.global_shape, shape)
    return ParameterSlot(rule, first.key, tuple(leading), tuple(index), shape)


def hf_shapes(slots: ModelSlots) -> dict[str, list[tuple[int, ...]]]:
    """The shapes that each Hugging Face tensor may have: one, or two where experts may lie either way."""
    return {name: _hf_shapes(owners, slots.architecture) for name, owners in slots.by_hf().items()}


def _hf_shapes(owners: list[tuple[ParameterSlot, int]], sizes: HfConfig) -> list[tuple[int, ...]]:
    slot, number = owners[0]
    meta = torch.empty(slot.shape, device="meta")
    ways = (True,) if slot.rule.expert is None else (True, False)
    parts = [hf_from_shards(slot.rule, [meta], sizes, published_experts=way)[number].shape for way in ways]
    leading = () if slot.rule.expert is None else (len(owners),)
    return [(*leading, *part) for part in dict.fromkeys(parts)]


def assign(items: Sequence[T], sizes: Sequence[int], num_ranks: int) -> list[list[T]]:
    """Shares items among ranks, the largest first, each to the rank that has the least. Every rank gets the same."""
    shares: list[list[T]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for number in sorted(range(len(items)), key=lambda n: (-sizes[n], n)):
        rank = loads.index(min(loads))
        shares[rank].append(items[number])
        loads[rank] += sizes[number]
    return shares
