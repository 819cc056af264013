"""Which experts the engine sends each token to.

On an accelerator vLLM returns it with a finished request (`enable_return_routed_experts`). Its model runner for CPUs
lacks that: there the routers are listened to, and what they say is noted by request and by KV slot, so that tokens
whose keys and values come from the prefix cache have the experts of whoever computed them.

Shape legend: n tokens of a request, M layers with experts, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_sr1.config import HfConfig
from megatron_sr1.rollout.request import EngineFault

Ids = np.ndarray[Any, np.dtype[Any]]


def told_experts(completion: Any, moe_layers: Sequence[bool]) -> bytes:
    """Of a completion of vLLM that comes with them, as `Rollout` has them.

    Raises:
        EngineFault: they are not there.
    """
    ids = completion.routed_experts  # [n, layers, k] uint8 or uint16
    if ids is None:
        raise EngineFault("vLLM did not say which experts it sent a request to.")
    return ids[:, np.flatnonzero(moe_layers)].tobytes()


class NotedExperts:
    """Of one vLLM engine on a CPU, whose core runs in this process."""

    def __init__(self, engine: Any, model: torch.nn.Module, sizes: HfConfig) -> None:
        """Listens from now on."""
        from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

        (self._runner,) = engine.collective_rpc(_runner_of)
        layers = [number for number, is_moe in enumerate(sizes.moe_layers) if is_moe]
        places = {layer: place for place, layer in enumerate(layers)}
        self._said: list[Tensor | None] = [None] * len(layers)  # of one forward pass, [tokens, k] each
        for module in model.modules():
            if isinstance(module, MoERunner):
                module.router.set_capture_fn(partial(self._hear, places[module.layer_id]))
        self._group, self._block_size = _attention_blocks(self._runner.kv_cache_config.kv_cache_groups)
        num_slots = self._runner.kv_cache_config.num_blocks * self._block_size
        kind = np.uint8 if sizes.num_experts <= 256 else np.uint16
        self._of_slots = np.zeros((num_slots, len(layers), sizes.experts_per_token), dtype=kind)
        self._of_requests: dict[str, Ids] = {}  # [n, M, k] each
        self._execute = self._runner.execute_model
        self._runner.execute_model = self._listened

    def take(self, request_id: str, num_tokens: int) -> bytes:
        """Of a finished request's tokens, but the last; it is forgotten.

        Raises:
            EngineFault: some are not known.
        """
        (known,) = [name for name in self._of_requests if name.rpartition("-")[0] == request_id]  # vLLM adds to an id
        ids = self._of_requests.pop(known)
        if len(ids) != num_tokens - 1:
            raise EngineFault(f"request {request_id!r}: the experts of {len(ids)} tokens are known of {num_tokens}.")
        return ids.tobytes()

    def _hear(self, place: int, ids: Tensor) -> None:
        self._said[place] = ids

    def _listened(self, scheduled: Any, *arguments: Any, **options: Any) -> Any:
        """`execute_model` of vLLM's model runner."""
        found = self._execute(scheduled, *arguments, **options)
        if scheduled.total_num_scheduled_tokens:
            self._note(scheduled)
        return found

    def _note(self, scheduled: Any) -> None:
        for source, target in scheduled.kv_cache_block_copies or ():
            self._of_slots[self._slots([target], self._block_size)] = self._of_slots[
                self._slots([source], self._block_size)
            ]
        said = [ids for ids in self._said if ids is not None]
        assert len(said) == len(self._said), "every layer with experts has routed the tokens"
        rows = torch.stack(said, 1).numpy().astype(self._of_slots.dtype)  # [tokens, M, k]
        end = 0
        for name in self._runner.input_batch.req_ids:
            number = scheduled.num_scheduled_tokens[name]
            start, end = end, end + number
            request = self._runner.requests[name]
            before = request.num_computed_tokens
            slots = self._slots(request.block_ids[self._group], before + number)
            self._of_slots[slots[before:]] = rows[start:end]
            known = self._of_requests.get(name)
            if known is None or len(known) != before:  # new, or computed anew: the rest is in the prefix cache
                known = self._of_slots[slots[:before]]
            self._of_requests[name] = np.concatenate([known, rows[start:end]])

    def _slots(self, blocks: Sequence[int], number: int) -> Ids:
        """[number] of the first tokens in these blocks."""
        places = np.arange(number)
        return np.asarray(blocks)[places // self._block_size] * self._block_size + places % self._block_size


def _attention_blocks(groups: Sequence[Any]) -> tuple[int, int]:
    """The number of a group of layers whose blocks hold keys and values, and tokens of such a block. A request also has
    blocks that hold the recurrent state of other layers."""
    from vllm.v1.kv_cache_interface import AttentionSpec

    kinds = [(number, group.kv_cache_spec) for number, group in enumerate(groups)]
    return next((number, kind.block_size) for number, kind in kinds if isinstance(kind, AttentionSpec))


def _runner_of(worker: Any) -> Any:
    return worker.model_runner
