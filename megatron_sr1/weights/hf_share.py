"""A Hugging Face folder that ranks write together, each some of its files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from megatron_sr1.ranks import Ranks
from megatron_sr1.weights.hf_shards import MAX_SHARD_BYTES, FileSizes, PlannedShards, sync_file
from megatron_sr1.weights.safetensors import TensorInfo


class HfShare:
    """A rank's files: every so many of them, copied to the host, so that the weights may change before they are
    written. A rank holds its share of the model, up to a file."""

    def __init__(
        self, weights: Iterable[tuple[str, Tensor]], ranks: Ranks, max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        """
        Args:
            weights: all tensors of the model by name, in the same order on every rank.
        """
        self._rank, self._num_ranks, self._max_shard_bytes = ranks.rank, ranks.num_ranks, max_shard_bytes
        self._tensors: dict[str, TensorInfo] = {}
        self._own: dict[str, Tensor] = {}
        files = FileSizes(max_shard_bytes)
        for name, tensor in weights:
            self._tensors[name] = TensorInfo(tensor.dtype, tuple(tensor.shape))
            if files.place(self._tensors[name].nbytes) % self._num_ranks == self._rank:
                self._own[name] = tensor.detach().to("cpu", copy=True)

    @property
    def num_bytes(self) -> int:
        """Of this rank's tensors."""
        return sum(tensor.nbytes for tensor in self._own.values())

    def write(self, folder: Path) -> None:
        """This rank's files. Raises OSError."""
        folder.mkdir(exist_ok=True)
        shards = self._shards(folder)
        for number, file in enumerate(shards.headers):
            if number % self._num_ranks == self._rank:
                shards.create_file(file)
        for name, tensor in self._own.items():
            shards.write(name, tensor)
        for file in {shards.slots[name].file for name in self._own}:
            sync_file(file)

    def write_index(self, folder: Path) -> None:
        """Which file holds which tensor, once all are written. Raises OSError."""
        self._shards(folder).write_index()

    def _shards(self, folder: Path) -> PlannedShards:
        return PlannedShards(folder, self._tensors, self._max_shard_bytes)
