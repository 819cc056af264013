"""The distributed optimizer's state as a checkpoint has it: whole tensors, which any layout can load.

Replicas share the optimizer's state by cutting the buffers of the gradients into equal parts, without regard to where
a parameter begins. Here each parameter gets one replica as its owner, whose parts the others send it: a replica holds,
sends and writes its share, however many there are. Loading, a replica reads the parameters that it has a part of.

The names on disk are those of Megatron-Core's `fully_reshardable` format, whose own way has two faults: every replica
receives the state of all, and where a bucket of gradients is padded (its size must divide by the number of replicas)
all parameters behind it are written shifted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_sr1.policy.optimizer import optimizer_parts

_KINDS = ("param", "exp_avg", "exp_avg_sq")  # AdamW's; its counters of steps are in the groups of parameters
_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}


def sharded_optimizer_state(optimizer: MegatronOptimizer, model: dict[str, Any], *, loading: bool) -> dict[str, Any]:
    """What Megatron-Core's distributed checkpointing saves, or fills. Collective.

    Args:
        model: the sharded state of the model's weights.
    """
    with ExitStack() as stack:
        for part in optimizer_parts(optimizer):
            if isinstance(part, DistributedOptimizer):
                stack.enter_context(_gives(part, partial(_wanted if loading else _owned, part)))
        return optimizer.sharded_state_dict(model, is_loading=loading, metadata=_FORMAT)


@contextmanager
def _gives(part: DistributedOptimizer, state: Callable[..., dict[int, Any]]) -> Iterator[None]:
    """Has the optimizer take the moments from a function."""
    megatrons: Any = part
    megatrons.sharded_param_state_fully_reshardable = lambda model, *_, **__: state(model)
    try:
        yield
    finally:
        del megatrons.sharded_param_state_fully_reshardable


@dataclass(frozen=True)
class _Place:
    """A parameter of a bucket, in elements from the bucket's beginning."""

    index: int  # among the optimizer's parameters, in the order in which Megatron counts them
    parameter: torch.nn.Parameter
    start: int
    stop: int

    def part(self, replica: int, length: int) -> int:
        """Elements that a replica has of it."""
        return max(0, min(self.stop, (replica + 1) * length) - max(self.start, replica * length))


@dataclass(frozen=True)
class _Bucket:
    """What replicas cut into equal parts of `length` elements."""

    places: list[_Place]
    length: int
    tensors: Mapping[torch.nn.Parameter, Mapping[str, Tensor]]  # of this replica's part, for the places that it meets

    def of(self, wanted: Callable[[torch.nn.Parameter], bool]) -> _Bucket:
        """Without the parameters that are not wanted."""
        return replace(self, places=[place for place in self.places if wanted(place.parameter)])


def _owned(part: DistributedOptimizer, model: dict[str, Any]) -> dict[int, Any]:
    """The parameters that this replica writes, by index. Collective."""
    group = part.data_parallel_group
    weights = _weights(model)
    # what tensor-parallel ranks or stages have alike, the replicas of one of them write
    buckets = [bucket.of(lambda parameter: not any(weights[parameter].replica_id[:-1])) for bucket in _buckets(part)]
    owners = _owners([place for bucket in buckets for place in bucket.places], group.size())
    found: dict[int, Any] = {}
    for bucket in (bucket for bucket in buckets if bucket.places):
        own = [place for place in bucket.places if owners[place.index] == group.rank()]
        whole = {kind: _gathered(bucket, owners, own, kind, group) for kind in _KINDS}
        for number, place in enumerate(own):
            tensors = {kind: whole[kind][number] for kind in _KINDS}
            found[place.index] = _sharded(tensors, weights[place.parameter], 0)
    return found


def _wanted(part: DistributedOptimizer, model: dict[str, Any]) -> dict[int, Any]:
    """The parameters that this replica has a part of, by index, empty."""
    rank, weights, found = part.data_parallel_group.rank(), _weights(model), {}
    for bucket in _buckets(part):
        for place in bucket.places:
            if place.part(rank, bucket.length):
                first = place.start // bucket.length  # one of those that read it counts as the main one
                tensors = {kind: torch.empty(place.stop - place.start) for kind in _KINDS}
                found[place.index] = _sharded(tensors, weights[place.parameter], rank - first)
    return found


def _buckets(part: DistributedOptimizer) -> list[_Bucket]:
    """All, on every replica the same but for its tensors."""
    state: Any = part.get_parameter_state_dp_reshardable()
    found, index = [], 0
    for number, buffer in enumerate(part.buffers):
        places: list[list[_Place]] = [[] for _ in buffer.buckets]
        for parameter, (start, stop, bucket) in buffer.param_index_map.items():
            offset = buffer.buckets[bucket].offset
            places[bucket].append(_Place(index, parameter, start - offset, stop - offset))
            index += 1
        (of_buckets,) = state[number].values()
        (ranges,) = part.gbuf_ranges[number].values()
        for bucket, inside in enumerate(places):
            inside.sort(key=lambda place: place.start)
            tensors = dict(zip(ranges[bucket]["param_map"], of_buckets[bucket], strict=True))
            length = buffer.buckets[bucket].grad_data.numel() // part.data_parallel_group.size()
            found.append(_Bucket(inside, length, tensors))
    return found


def _owners(places: Sequence[_Place], num_replicas: int) -> dict[int, int]:
    """The replica that writes each parameter: the largest first, to the one that has least."""
    loads, owners = [0] * num_replicas, {}
    for place in sorted(places, key=lambda place: (place.start - place.stop, place.index)):
        owners[place.index] = min(range(num_replicas), key=loads.__getitem__)
        loads[owners[place.index]] += place.stop - place.start
    return owners


def _gathered(
    bucket: _Bucket,
    owners: Mapping[int, int],
    own: Sequence[_Place],
    kind: str,
    group: torch.distributed.ProcessGroup,
) -> list[Tensor]:
    """The tensors of one kind that this replica owns, flat, on the host. Collective."""
    rank, replicas = group.rank(), range(group.size())
    here = [place for place in bucket.places if place.part(rank, bucket.length)]
    parts = [bucket.tensors[place.parameter][kind].detach().flatten() for place in here]
    if group.size() == 1:
        return [part.to("cpu", copy=True) for part in parts]
    sent = [[part for place, part in zip(here, parts, strict=True) if owners[place.index] == to] for to in replicas]
    sizes = [[place.part(replica, bucket.length) for place in own] for replica in replicas]
    pieces = [piece for to in sent for piece in to]
    received = torch.empty(sum(map(sum, sizes)), device=bucket.places[0].parameter.device)
    torch.distributed.all_to_all_single(
        received,
        torch.cat(pieces) if pieces else received.new_empty(0),
        [sum(size) for size in sizes],
        [sum(piece.numel() for piece in to) for to in sent],
        group=group,
    )
    found = iter(received.to("cpu").split([size for of_replica in sizes for size in of_replica]))
    by_replica = [[next(found) for _ in own] for _ in replicas]
    return [torch.cat(pieces) for pieces in zip(*by_replica, strict=True)]


def _weights(model: dict[str, Any]) -> dict[torch.nn.Parameter, Any]:
    """How each parameter lies in the whole model."""
    sharded, _ = extract_sharded_tensors_and_factories(model)
    return {weight.data: weight for weight in nested_values(sharded)}


def _sharded(tensors: Mapping[str, Tensor], weight: Any, replica: int) -> dict[str, Any]:
    """Tensors that lie as a weight does. `replica`: of those that hold it, 0 is the one that writes."""
    found, shape, place = {}, weight.data.shape, weight.replica_id[:-1]
    for kind, tensor in tensors.items():
        changes: dict[str, Any] = {
            "key": f"optimizer.state.{kind}.{weight.key}",
            "data": tensor.reshape(shape),
            "replica_id": (*place, replica),
        }
        if not isinstance(weight, ShardedTensorFactory):
            changes["dtype"] = tensor.dtype
        found[kind] = replace(weight, **changes)
    return found
