"""A Megatron checkpoint into a Hugging Face folder, piece by piece, by several processes at once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor

from megatron_sr1.config import PixelLimits
from megatron_sr1.convert.layout import assign, config_dir
from megatron_sr1.convert.load import MegatronSource
from megatron_sr1.platform import Platform
from megatron_sr1.weights.hf_dir import check_finite, copy_side_files
from megatron_sr1.weights.hf_shards import MAX_SHARD_BYTES, PlannedShards
from megatron_sr1.weights.safetensors import TensorInfo

_DTYPE_KEYS = ("dtype", "torch_dtype")  # of a config.json; the second is the older name


def megatron_to_hf(
    megatron_dir: str,
    hf_dir: str | None,
    out_dir: Path,
    platform: Platform,
    advance: Callable[[int, int], None],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the model of a checkpoint into `out_dir`, an empty folder. All ranks call it and share the work.

    Args:
        hf_dir: for configuration, tokenizer and processor files; None: those that the checkpoint brings along. The
            image processor's get the pixel limits of the run whose checkpoint it is.
        advance: told the bytes that this rank has done, and those it has to do.
        dtype: of the floating-point tensors; None: as stored.

    Raises:
        ValueError: naming the file and the tensor: missing, extra, misshaped, truncated, not finite, unsafe to open.
    """
    source = MegatronSource(Path(megatron_dir), hf_dir if hf_dir is not None else config_dir(Path(megatron_dir), None))
    tensors = {name: _cast(info, dtype) for name, info in source.tensors.items()}
    shards = PlannedShards(out_dir, tensors, max_shard_bytes)
    if platform.is_main:
        shards.create()
        copy_side_files(source.hf_dir, out_dir, pixels=_trained_pixels(Path(megatron_dir)))
        if dtype is not None:
            _name_dtype(out_dir / "config.json", dtype)
    torch.distributed.barrier()
    names = list(tensors)
    mine = assign(names, [tensors[name].nbytes for name in names], platform.world_size)[platform.rank]
    total = sum(tensors[name].nbytes for name in mine)
    for name in mine:
        for row, piece in source.pieces(name):
            check_finite(piece, name, source.folder, row)
            shards.write(name, _fitted(piece, tensors[name].dtype, name), row)
            advance(piece.numel() * tensors[name].dtype.itemsize, total)
    shards.sync()
    gathered: list[dict[str, int]] = [{} for _ in range(platform.world_size)]
    torch.distributed.all_gather_object(gathered, shards.written)
    written = sum((Counter(part) for part in gathered), Counter())
    assert all(written[name] == info.nbytes for name, info in tensors.items())


def _trained_pixels(megatron_dir: Path) -> PixelLimits | None:
    """What images were resized to in the run that saved the checkpoint; None: what its model's files say.

    Raises:
        ValueError: its progress.json is damaged.
    """
    path = megatron_dir / "progress.json"
    if not path.is_file():  # converted, not trained
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8")).get("pixels")
        return PixelLimits(int(kept["least"]), int(kept["most"])) if kept else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). Copy the checkpoint again.") from error


def _cast(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    return info if dtype is None or not info.dtype.is_floating_point else TensorInfo(dtype, info.shape)


def _fitted(piece: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The finite piece in the other type, which may have a smaller range."""
    fitted = piece.to(dtype)
    if fitted.is_floating_point() and not torch.isfinite(torch.stack(torch.aminmax(fitted))).all():
        raise ValueError(f"{name} has values that {dtype} cannot hold. Choose a type of larger range: --dtype bf16.")
    return fitted


def _name_dtype(config: Path, dtype: torch.dtype) -> None:
    """Says in config.json what the weights are now, there and in the parts for language and vision."""
    tree = json.loads(config.read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    for part in (tree, *(value for value in tree.values() if isinstance(value, dict))):
        part.update({key: name for key in _DTYPE_KEYS if part.get(key)})
    config.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
