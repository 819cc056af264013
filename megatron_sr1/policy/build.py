"""The chunks of the policy that a rank holds, built from a configuration."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from megatron_sr1.config import Config, ModelConfig
from megatron_sr1.platform import Platform, start_platform
from megatron_sr1.policy.architecture import Architecture
from megatron_sr1.policy.frozen import read_frozen
from megatron_sr1.policy.groups import ParallelGroups, build_groups
from megatron_sr1.policy.layers.deepstack import DeepstackLayer
from megatron_sr1.policy.layers.self_attention import PackedSelfAttention
from megatron_sr1.policy.layers.specs import block_spec, layer_spec_name
from megatron_sr1.policy.model import QwenVLModel
from megatron_sr1.policy.read import read_architecture
from megatron_sr1.policy.transformer_config import transformer_config


def build_chunks(
    architecture: Architecture, config: Config, platform: Platform, groups: ParallelGroups, device: torch.device
) -> list[QwenVLModel]:
    """This rank's chunks of the layers in order, one without a virtual pipeline. Their weights are not initialised;
    those that `model.freeze` names are marked.

    Args:
        device: where the parameters are made; "meta" makes none.

    Raises:
        ConfigError: see `read_frozen`.
    """
    spec = layer_spec_name(config.model.layer_spec, platform, config.precision.dtype)
    on_host = platform.on_cpu or device.type == "meta"
    megatron_config = transformer_config(architecture, config, spec=spec, on_cpu=on_host)
    frozen = read_frozen(architecture, config)
    linear = [architecture.linear if is_linear else None for is_linear in architecture.linear_layers]
    chunks = []
    with torch.device(device):
        for number in range(config.layout.virtual):
            vp_stage = number if config.layout.virtual > 1 else None
            layers = get_num_layers_to_build(megatron_config, vp_stage=vp_stage, pp_rank=groups.pipeline.rank())
            block = block_spec(spec, megatron_config, layers, vp_stage, linear)
            for layer in block.layer_specs:
                layer.module = DeepstackLayer
                layer.params = {**layer.params, "adds_gradients": spec == "te" and config.model.fused}
                parts: Any = layer.submodules
                if parts.self_attention.module is SelfAttention:
                    parts.self_attention.module = PackedSelfAttention
            chunks.append(
                QwenVLModel(
                    architecture,
                    megatron_config,
                    block,
                    groups,
                    config,
                    frozen,
                    vp_stage=vp_stage,
                    is_first=groups.is_first_stage and number == 0,
                    is_last=groups.is_last_stage and number == config.layout.virtual - 1,
                )
            )
    frozen.apply(chunks, architecture, groups)
    return chunks


def meta_model(hf_dir: str) -> tuple[list[QwenVLModel], Architecture]:
    """The whole model on one rank without memory for its weights: names, shapes and checkpoint layout.

    It starts the platform where that has not happened, and splits the process group into single ranks: every rank
    that calls it has the whole model.
    """
    platform = start_platform()
    config = Config(model=ModelConfig(hf_dir=hf_dir, layer_spec="torch"), nproc=platform.world_size)
    architecture = read_architecture(hf_dir)
    chunks = build_chunks(architecture, config, platform, build_groups(config.layout), torch.device("meta"))
    return chunks, architecture
