"""New weights for vLLM's model, in place, into the layout that its kernels want."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from megatron_sr1.rollout.vllm.arguments import NO_WEIGHTS
from megatron_sr1.rollout.vllm.private import pack_experts

_CPU_EXPERT_MULTIPLE = 32  # vLLM pads an expert's width to it on a CPU


def register_no_weights() -> None:
    """Teaches vLLM the load format NO_WEIGHTS: parameters are zeros until `reload_weights`, and no file is read.

    vLLM's own "dummy" format also draws the buffers, which no update brings back: the normalisation of pixels, the
    scales of the KV cache. And it takes a model for tied that is not.
    """
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    @register_model_loader(NO_WEIGHTS)
    class _NoWeights(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            """There is nothing to download."""

        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()


def check_reloadable(model: torch.nn.Module) -> None:
    """
    Raises:
        ValueError: vLLM padded experts when it loaded them, and cannot load others in their place.
    """
    for name, module in _experts(model):
        width = module.intermediate_size_per_partition
        if module.w13_weight.device.type == "cpu" and width % _CPU_EXPERT_MULTIPLE:
            raise ValueError(
                f"{name}: experts of width {width} on an engine rank cannot take weight updates on a CPU, where the "
                f"width must be a multiple of {_CPU_EXPERT_MULTIPLE}. Change rollout.engine_tensor, or "
                "moe_intermediate_size of the model."
            )


def reload_weights(engine: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Streams all `weights` into vLLM's `engine`, layer by layer."""
    engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    (model,) = engine.collective_rpc("get_model")
    _repack_output_head(model)
    _repack_experts(model)


def _repack_output_head(model: torch.nn.Module) -> None:
    """Makes the output head compute with the embedding that was just loaded, where the two are tied.

    On a CPU vLLM computes with a packed copy of each weight. A reload packs the layers named in the checkpoint again; a
    tied head is not named there, and would keep the copy of the old weights.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def _repack_experts(model: torch.nn.Module) -> None:
    """Gives loaded experts the order that the CPU kernel reads.

    vLLM reorders them when a model is first loaded, and leaves new weights as the checkpoint has them.
    """
    for _, module in _experts(model):
        if module.w13_weight.device.type == "cpu":
            pack_experts(module)


def _experts(model: torch.nn.Module) -> list[tuple[str, Any]]:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    return [(name, module) for name, module in model.named_modules() if isinstance(module, RoutedExperts)]
