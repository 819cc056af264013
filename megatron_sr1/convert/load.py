"""Tensors out of a Megatron checkpoint, whatever layout has written it, piece by piece and under Hugging Face names."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_sr1.convert.layout import HfLayout, ModelSlots, ParameterSlot, model_slots
from megatron_sr1.platform.torch_private import EXTRA_STATE, file_view
from megatron_sr1.weights.check import HEAD
from megatron_sr1.weights.hf_dir import row_blocks
from megatron_sr1.weights.kept import kept_tensors
from megatron_sr1.weights.name_table import REORDERED, hf_from_shards
from megatron_sr1.weights.pickles import METADATA, check_megatron_dir
from megatron_sr1.weights.safetensors import TensorInfo

_OTHER_KEYS = ("optimizer.", "chained_", "rng_state", "rerun_state")  # of a training checkpoint, beside the model


class MegatronTensors:
    """Reads rows of parameters from the data files of a checkpoint."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError where the folder is no complete checkpoint, or asks for foreign code."""
        self.folder = folder
        self.metadata = check_megatron_dir(folder)

    def tensor(self, key: str) -> TensorStorageMetadata:
        """Raises ValueError where the checkpoint has no such tensor."""
        found = self.metadata.state_dict_metadata.get(key)
        if not isinstance(found, TensorStorageMetadata):
            raise ValueError(f"{self.folder} has no tensor {key!r}, which the model's config.json calls for.")
        return found

    def blocks(self, slot: ParameterSlot, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Ranges that cover rows [start, stop) and begin where stored pieces begin, so that each is read once."""
        axis = len(slot.leading)
        starts = {start}
        for chunk in self.tensor(slot.key).chunks:
            holds = all(
                begin <= at < begin + size
                for begin, size, at in zip(chunk.offsets, chunk.sizes, slot.index, strict=False)
            )
            if holds and slot.shape and start < chunk.offsets[axis] < stop:
                starts.add(chunk.offsets[axis])
        edges = [*sorted(starts), stop]
        yield from itertools.pairwise(edges)

    def rows(self, slot: ParameterSlot, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a parameter.

        Raises:
            ValueError: pieces are missing or cannot be read.
        """
        entry = self.tensor(slot.key)
        wanted = ChunkStorageMetadata(torch.Size(slot.offsets(start)), torch.Size(slot.sizes(stop - start)))
        items = create_read_items_for_chunk_list(slot.key, entry, [wanted])
        if sum(item.lengths.numel() for item in items) != wanted.sizes.numel():
            raise ValueError(f"{self.folder}: stored pieces do not cover {slot.key}{slot.offsets(start)}.")
        shape = (stop - start, *slot.shape[1:]) if slot.shape else ()
        target: Tensor | None = None
        for item in items:
            piece = self._piece(item.storage_index, entry)
            for axis, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                piece = piece.narrow(axis, offset, length)
            if len(items) == 1:
                return piece.reshape(shape)
            if target is None:
                target = torch.empty(wanted.sizes, dtype=piece.dtype, device="cpu")
            place = target
            for axis, (offset, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
                place = place.narrow(axis, offset, length)
            place.copy_(piece)
        assert target is not None
        return target.reshape(shape)

    def _piece(self, index: MetadataIndex, entry: TensorStorageMetadata) -> Tensor:
        """A stored piece, in the axes of the checkpoint's tensor."""
        place = self.metadata.storage_data[index]
        path = self.folder / place.relative_path
        try:
            with path.open("rb") as stream:
                view = file_view(stream, place.offset, place.length)
                piece = torch.load(view, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
            raise ValueError(f"{path}: {index} cannot be read ({error}). Copy the checkpoint again.") from error
        sizes = next(chunk.sizes for chunk in entry.chunks if chunk.offsets == index.offset)
        if piece.numel() != sizes.numel() or piece.dtype != entry.properties.dtype:
            raise ValueError(
                f"{path}: {index.fqn} is {TensorInfo(piece.dtype, tuple(piece.shape))} there, but {METADATA} says "
                f"{TensorInfo(entry.properties.dtype, tuple(sizes))}. Copy the checkpoint again."
            )
        return piece.view(sizes)


class MegatronSource:
    """A checkpoint as the Hugging Face tensors it stands for."""

    def __init__(self, folder: Path, hf_dir: str) -> None:
        """
        Args:
            hf_dir: of the model's config.json.

        Raises:
            ValueError: the folder is no checkpoint; tensors are missing, extra or misshaped.
        """
        self.folder = folder
        self.hf_dir = hf_dir
        self.slots: ModelSlots = model_slots(hf_dir)
        self.stored = MegatronTensors(folder)
        self.layout = HfLayout.read(folder)
        self._check()
        self.owners = self.slots.by_hf()
        if self.layout.stores_tied_head:
            embedding = next(slot for slot in self.slots.parameters if slot.rule.kind == "vocabulary")
            self.owners[HEAD] = [(embedding, 0)]
        family = self.slots.architecture.family  # what no part of the policy is: the checkpoint's, or the model's
        self._kept = kept_tensors(folder, family) or kept_tensors(hf_dir, family)
        own = {name: self._info(name) for name in self.owners}
        self.tensors: Mapping[str, TensorInfo] = own | {name: slot.info for name, slot in self._kept.items()}

    def _check(self) -> None:
        stored = self.stored.metadata.state_dict_metadata
        known = self.slots.keys
        extra = sorted(
            key
            for key in stored.keys() - known
            if not key.startswith(_OTHER_KEYS) and EXTRA_STATE not in key and "/shard_" not in key
        )
        if extra:
            raise ValueError(
                f"{self.folder} holds {', '.join(extra[:5])}, which {self.hf_dir}/config.json has no place for. "
                "Give the --hf folder of the same model."
            )
        for slot in self.slots.parameters:
            shape, expected = tuple(self.stored.tensor(slot.key).size), (*slot.leading, *slot.shape)
            padded = slot.rule.kind == "vocabulary" and shape[1:] == expected[1:] and shape[0] >= expected[0]
            if shape != expected and not padded:
                raise ValueError(
                    f"{self.folder / METADATA}: {slot.key} has the shape {list(shape)}, but config.json calls for "
                    f"{list(expected)}. They do not belong together."
                )

    def _info(self, name: str) -> TensorInfo:
        slot, number = self.owners[name][0]
        meta = torch.empty(slot.shape, device="meta")
        part = tuple(self._parts(slot, meta)[number].shape)
        shape = part if slot.rule.expert is None else (len(self.owners[name]), *part)
        return TensorInfo(self.stored.tensor(slot.key).properties.dtype, shape)

    def _parts(self, slot: ParameterSlot, whole: Tensor) -> list[Tensor]:
        return hf_from_shards(
            slot.rule, [whole], self.slots.architecture, published_experts=self.layout.published_experts
        )

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """The whole Hugging Face tensor, some rows at a time, each piece with the number of its first row.

        Raises:
            ValueError: naming tensor and file where a piece is missing or damaged.
        """
        if name in self._kept:
            kept = self._kept[name]
            yield from ((start, kept.read(start, stop)) for start, stop in row_blocks(kept.info))
            return
        for slot, number in self.owners[name]:
            rule = slot.rule
            if rule.kind in REORDERED or rule.expert is not None:
                whole = self.stored.rows(slot, 0, slot.shape[0])
                part = self._parts(slot, whole)[number]
                yield (0, part) if rule.expert is None else (rule.expert, part[None])
                continue
            info = self.tensors[name]
            first = number * info.num_rows if rule.kind == "gate_up" else 0
            for start, stop in self.stored.blocks(slot, first, first + info.num_rows):
                yield start - first, self.stored.rows(slot, start, stop)
