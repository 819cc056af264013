"""Exports a rank's chunks of the policy as whole Hugging Face tensors, bucket by bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_sr1.config import HfConfig
from megatron_sr1.weights.load import EXPERT_KINDS, Groups, local_parameters
from megatron_sr1.weights.name_table import WeightRule, hf_from_shards

DEFAULT_BUCKET_BYTES = 256 * 2**20
_ALIGNMENT = 16  # bytes: a view of a bucket must start at a multiple of its element size


@torch.no_grad()
def export_hf_weights(
    chunks: Sequence[torch.nn.Module],
    sizes: HfConfig,
    groups: Groups,
    read: Callable[[torch.nn.Parameter], Tensor] = torch.Tensor.detach,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the whole model under its Hugging Face name, on every rank. All ranks iterate together.

    Parameters travel in buckets: each rank that has a part of a bucket broadcasts it once, however many tensors are in
    it, straight into the others' bucket (a gather would take a second one with some back ends). Memory beyond the
    model: one bucket, and the Hugging Face tensors of the one parameter that is being yielded; a vocabulary's matrix
    that is a bucket of its own is yielded as it lies there. A tensor is the receiver's to keep: it never holds on to
    other tensors of its bucket.

    Args:
        read: what of a parameter is exported, in its shape: its value, or for example its gradient.
        bucket_bytes: the most a bucket holds; a tensor (with experts: all experts' part) that is larger is a bucket of
            its own.
    """
    local = {
        rule: read(parameter) if parameter.requires_grad else parameter.detach()
        for rule, parameter in local_parameters(chunks, sizes, groups).values()
    }
    mine = {rule: (value.shape, value.dtype) for rule, value in local.items()}
    stages = [mine] * groups.pipeline.size()
    torch.distributed.all_gather_object(stages, mine, group=groups.pipeline)
    device = next(chunks[0].parameters()).device
    seen: set[str] = set()
    for owner, contents in enumerate(stages):
        fresh = [rules for rules in _by_tensors(contents) if seen.isdisjoint(rules[0].hf)]  # a tied head was sent
        seen.update(name for rules in fresh for name in rules[0].hf)
        for bucket in _buckets(fresh, contents, groups, bucket_bytes):
            yield from _exchanged(bucket, local, owner, sizes, groups, device)


def _by_tensors(rules: Iterable[WeightRule]) -> list[list[WeightRule]]:
    """Rules that name the same tensors together: one, or those of a rank's experts in order."""
    groups: dict[tuple[str, ...], list[WeightRule]] = {}
    for rule in rules:
        groups.setdefault((rule.kind, *rule.hf), []).append(rule)
    return list(groups.values())


@dataclass(frozen=True)
class _Piece:
    """Where a parameter lies in the part of the bucket that each rank of `group` fills."""

    rule: WeightRule
    shape: torch.Size
    dtype: torch.dtype
    group: ProcessGroup | None  # whose ranks hold shards of the tensor; None: this rank has it whole
    start: int  # bytes

    @property
    def stop(self) -> int:
        return self.start + self.shape.numel() * self.dtype.itemsize


_Bucket = list[list[_Piece]]  # one list for each parameter, or for the experts of one tensor


def _buckets(
    tensors: Iterable[list[WeightRule]],
    contents: Mapping[WeightRule, tuple[torch.Size, torch.dtype]],
    groups: Groups,
    bucket_bytes: int,
) -> Iterator[_Bucket]:
    """Neighbouring tensors together, as many as fit."""
    bucket: _Bucket = []
    filled: dict[ProcessGroup | None, int] = {}
    for rules in tensors:
        group = _shard_group(rules[0], groups)
        room = sum(_aligned(contents[rule]) for rule in rules)
        taken = sum(size * _ranks(of) for of, size in filled.items())
        if bucket and taken + room * _ranks(group) > bucket_bytes:
            yield bucket
            bucket, filled = [], {}
        pieces = []
        for rule in rules:
            shape, dtype = contents[rule]
            pieces.append(_Piece(rule, shape, dtype, group, filled.get(group, 0)))
            filled[group] = filled.get(group, 0) + _aligned(contents[rule])
        bucket.append(pieces)
    if bucket:
        yield bucket


def _shard_group(rule: WeightRule, groups: Groups) -> ProcessGroup | None:
    if rule.kind == "replicated":
        return None
    group = groups.expert if rule.kind in EXPERT_KINDS else groups.tensor
    return group if group.size() > 1 else None


def _ranks(group: ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def _aligned(content: tuple[torch.Size, torch.dtype]) -> int:
    shape, dtype = content
    return -(-shape.numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def _exchanged(
    bucket: _Bucket,
    local: Mapping[WeightRule, Tensor],
    owner: int,
    sizes: HfConfig,
    groups: Groups,
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """The bucket's tensors, whole. Pipeline rank `owner` holds its parameters."""
    travels = groups.pipeline.size() > 1
    parts: dict[ProcessGroup | None, Tensor] = {}  # [ranks of the group, bytes of one rank]
    for group in dict.fromkeys(pieces[0].group for pieces in bucket):
        if group is not None or travels:
            mine = [piece for pieces in bucket for piece in pieces if piece.group is group]
            parts[group] = _gathered(mine, local, owner, groups.pipeline, device)
    for pieces in bucket:
        rule, group = pieces[0].rule, pieces[0].group
        if group not in parts:
            shards = [[local[piece.rule] for piece in pieces]]
        elif rule.kind == "vocabulary" and len(bucket) == 1:  # the shards lie one behind the other: nothing to join
            yield rule.hf[0], _joined(parts.pop(group), pieces[0])[: sizes.vocab_size]
            return
        else:
            shards = [[_view(part, piece) for piece in pieces] for part in parts[group]]  # [rank][expert of the rank]
        for name, tensor in zip(rule.hf, _whole(rule, shards, sizes), strict=True):
            shares = group in parts and tensor.untyped_storage().nbytes() > tensor.nbytes
            yield name, tensor.clone() if shares else tensor


def _gathered(
    pieces: list[_Piece], local: Mapping[WeightRule, Tensor], owner: int, pipeline: ProcessGroup, device: torch.device
) -> Tensor:
    """All ranks' bytes of the pieces, which share a group: [ranks, bytes of one]."""
    group = pieces[0].group
    length = -(-pieces[-1].stop // _ALIGNMENT) * _ALIGNMENT
    whole = torch.empty(_ranks(group), length, dtype=torch.uint8, device=device)
    mine = whole[0 if group is None else group.rank()]
    if pipeline.rank() == owner:
        for piece in pieces:
            _view(mine, piece).copy_(local[piece.rule])
    if pipeline.size() > 1:
        torch.distributed.broadcast(mine, torch.distributed.get_process_group_ranks(pipeline)[owner], group=pipeline)
    if group is not None:
        for part, rank in zip(whole, torch.distributed.get_process_group_ranks(group), strict=True):
            torch.distributed.broadcast(part, rank, group=group)
    return whole


def _view(part: Tensor, piece: _Piece) -> Tensor:
    return part[piece.start : piece.stop].view(piece.dtype).view(piece.shape)


def _joined(parts: Tensor, piece: _Piece) -> Tensor:
    """The piece of all ranks along dimension 0; it is all that the parts hold, but for alignment."""
    rows = parts[:, piece.start : piece.stop]
    return rows.reshape(-1).view(piece.dtype).view(-1, *piece.shape[1:])


def _whole(rule: WeightRule, shards: list[list[Tensor]], sizes: HfConfig) -> list[Tensor]:
    """The Hugging Face tensors of a parameter's shards, or of all ranks' experts ([rank][expert of the rank])."""
    if rule.kind not in EXPERT_KINDS:
        return hf_from_shards(rule, [shard for (shard,) in shards], sizes)
    in_order = [expert for rank in shards for expert in rank]
    return [torch.stack([hf_from_shards(rule, [value], sizes)[0] for value in in_order])]
