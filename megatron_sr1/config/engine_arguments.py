"""`rollout.engine`: arguments of vLLM's engine that no key of its own stands for."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sr1.config.rollout import RolloutConfig
from megatron_sr1.config.rules import ConfigError, Range, require, require_number

_BATCHED, _CHUNKED = "max_num_batched_tokens", "enable_chunked_prefill"
_LEAST_BATCHED = 8192  # tokens of a forward pass, where nobody says how many
_NO_CHUNKS = "false or null on a CPU: a prompt that is cut has its generator of draws rewound, which a CPU's cannot"
_FIXED = "It is fixed, because"
_TENSOR_ALONE = f"{_FIXED} an engine's ranks are tensor-parallel alone."
_EVERY_EXPERT = f"{_FIXED} each rank of an engine holds a part of every expert, and new weights are checked there."
_EVERY_PROMPT = f"{_FIXED} first passes are asked with images."
# what decides the tokens, the memory or the ranks, and what else may not come from a configuration
_OWNED = {
    "model": "Set model.hf_dir.",
    "tokenizer": "It is that of model.hf_dir.",
    "seed": "Set seed.",
    "tensor_parallel_size": "Set rollout.engine_tensor.",
    "max_model_len": "Set rollout.max_model_tokens.",
    "max_num_seqs": "Set rollout.max_running_requests.",
    "kv_cache_memory_bytes": "Set rollout.kv_cache_gib.",
    "gpu_memory_utilization": "Set rollout.kv_cache_gib, which counts the bytes.",
    "limit_mm_per_prompt": "Set rollout.max_images.",
    "enable_sleep_mode": "Set rollout.sleep.",
    "enforce_eager": "Set rollout.cuda_graphs.",
    "compilation_config": "Set rollout.cuda_graphs.",
    "cudagraph_capture_sizes": "Set rollout.cuda_graphs: they reach up to rollout.max_running_requests.",
    "max_cudagraph_capture_size": "Set rollout.cuda_graphs: they reach up to rollout.max_running_requests.",
    "dtype": f"{_FIXED} the trainer computes log-probs in it: bf16, and fp32 on a CPU.",
    "quantization": f"{_FIXED} weights arrive as the trainer has them.",
    "load_format": f"{_FIXED} weights arrive from the trainer.",
    "hf_overrides": f"{_FIXED} trainer and engine read the same config.json.",
    "mm_processor_kwargs": "Set model.min_pixels and model.max_pixels, which the trainer reads too.",
    "mm_processor_cache_gb": f"{_FIXED} images come to the engine prepared.",
    "logprobs_mode": f"{_FIXED} the log-probs must be of the distribution that was drawn from.",
    "generation_config": f"{_FIXED} no default of the model directory may change how tokens are drawn.",
    "override_generation_config": f"{_FIXED} no default may change how tokens are drawn.",
    "scheduling_policy": f"{_FIXED} second passes go before first ones.",
    "enable_return_routed_experts": "Set objective.router_replay.",
    "aux_output_config": "Set objective.router_replay.",
    "distributed_executor_backend": f"{_FIXED} engines live in the training ranks.",
    **dict.fromkeys(("pipeline_parallel_size", "prefill_context_parallel_size", "nnodes"), _TENSOR_ALONE),
    **dict.fromkeys(("enable_expert_parallel", "enable_eplb", "enable_elastic_ep"), _EVERY_EXPERT),
    **dict.fromkeys(("language_model_only", "mm_encoder_only"), _EVERY_PROMPT),
    "enable_lora": f"{_FIXED} the policy has no adapters: weights arrive whole.",
    "data_parallel_size": f"{_FIXED} nproc / rollout.engine_tensor engines share the prompts.",
    "trust_remote_code": f"{_FIXED} no code of a model directory is run.",
    "worker_cls": f"{_FIXED} weights are put into vLLM's own worker.",
    "worker_extension_cls": f"{_FIXED} no code is imported by a configuration.",
    "hf_token": f"{_FIXED} a secret belongs into no configuration, and nothing is downloaded.",
    "allowed_local_media_path": f"{_FIXED} pictures come from shards alone.",
}


def check_engine_arguments(arguments: Mapping[str, Any]) -> None:
    """
    Raises:
        ConfigError: the installed vLLM has no such argument, or this project sets it; where vLLM is not installed, only
            the second can be told.
    """
    known = _names_of_vllm()
    for name, value in arguments.items():
        refused = f"rollout.engine.{name}={value!r} is not allowed: "
        if name in _OWNED:
            raise ConfigError(f"{refused}{_OWNED[name]}")
        if known and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else "Leave it out."
            raise ConfigError(f"{refused}the installed vLLM's EngineArgs has no such argument. {hint}")


def batched_tokens(max_model_tokens: int, engine: Mapping[str, Any]) -> int:
    """Of a forward pass of an engine, at most: what `rollout.engine` says, or so many that the longest prompt fits."""
    return engine.get(_BATCHED, max(_LEAST_BATCHED, max_model_tokens))


def check_batched_tokens(rollout: RolloutConfig, requests: int = 1, *, on_cpu: bool = False) -> None:
    """
    Args:
        requests: that an engine decodes at a time.
        on_cpu: its engines take every prompt whole.

    Raises:
        ConfigError: a forward pass that has not a token for each request, or none that holds a prompt that is not cut.
    """
    chunked = rollout.engine.get(_CHUNKED)
    require(not (on_cpu and chunked), f"rollout.engine.{_CHUNKED}", chunked, _NO_CHUNKS, "Leave it out.")
    whole = on_cpu or chunked is False
    reason = "it takes prompts whole, up to rollout.max_model_tokens" if whole else "each request has a token in it"
    least = max(requests, rollout.max_model_tokens if whole else 0)
    remedy = f"An engine's forward pass has so many tokens; {reason}."
    batched = batched_tokens(rollout.max_model_tokens, rollout.engine)
    require_number(f"rollout.engine.{_BATCHED}", batched, Range(least, 10**9), whole=True, remedy=remedy)


@functools.cache
def _names_of_vllm() -> tuple[str, ...]:
    """Of the arguments of the vLLM that is installed, () where there is none. Read from its source: to import it takes
    longer than a mistake may."""
    found = importlib.util.find_spec("vllm")
    folders = found.submodule_search_locations if found is not None else None
    for folder in folders or ():
        source = Path(folder) / "engine" / "arg_utils.py"
        if source.is_file():
            for node in ast.parse(source.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and node.name == "EngineArgs":
                    return tuple(
                        part.target.id
                        for part in node.body
                        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
                    )
    return ()
