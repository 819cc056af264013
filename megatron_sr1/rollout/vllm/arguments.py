"""What vLLM's engine is asked for, on a CPU and on an accelerator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_sr1.config import HfConfig, PixelLimits, batched_tokens, graph_sizes

NO_WEIGHTS = "no_weights"  # vLLM's load format of an engine whose weights come later (reload.py)
CPU_BLOCK = 32  # tokens of a KV block, the least that vLLM's CPU kernels like: siblings share whole blocks of a prompt
_GIB = 2**30


@dataclass(frozen=True)
class EngineLimits:
    """See `RolloutConfig` for what is not said here."""

    max_model_tokens: int
    max_running_requests: int
    kv_cache_gib: float
    max_images: int  # of a prompt
    seed: int
    tensor_parallel: int = 1  # ranks that share one copy of the weights
    cuda_graphs: bool = True
    pixels: PixelLimits | None = None  # of an image; None: what the model's files say
    notes_experts: bool = False  # of a mixture: a generation says which experts its tokens were sent to
    more: Mapping[str, Any] = field(default_factory=dict)  # arguments of vLLM by its own names


def engine_arguments(
    hf_dir: str,
    model: HfConfig,
    limits: EngineLimits,
    *,
    on_cpu: bool,
    in_job: bool,
    can_sleep: bool,
    filled_later: bool,
) -> dict[str, Any]:
    """The arguments of `vllm.EngineArgs`.

    Args:
        in_job: torch.distributed is initialised, and the engine's ranks are the job's.
        can_sleep: the engine gives its memory back between the steps.
        filled_later: the weights of `hf_dir` are not read.
    """
    says_experts = limits.notes_experts and not on_cpu  # vLLM does
    return {
        "model": hf_dir,
        "load_format": NO_WEIGHTS if filled_later else "auto",
        "hf_overrides": _missing_keys(model),
        "dtype": "float32" if on_cpu else "bfloat16",
        **(_eager() if on_cpu or not limits.cuda_graphs else _graphs(limits.max_running_requests)),
        # A seeded request whose prompt is split has its generator rewound, which a CPU generator cannot do.
        "enable_chunked_prefill": not on_cpu,
        "gpu_memory_utilization": 0.01,  # a share that must be free at the start; the KV cache's bytes are given
        "kv_cache_memory_bytes": int(limits.kv_cache_gib * _GIB),
        "scheduling_policy": "priority",
        # Of recurrent states vLLM keeps those of prefixes only where it cuts prompts, which a CPU does not. It keeps
        # the experts of tokens by the blocks of prefixes, too, and refuses to say them without.
        "enable_prefix_caching": model.linear is None or says_experts,
        **({"block_size": CPU_BLOCK} if on_cpu else {}),
        "mm_processor_cache_gb": 0,  # images come prepared (prompts.py)
        "mm_processor_kwargs": _image_processor(limits.pixels),
        "logprobs_mode": "processed_logprobs",  # of the distribution that was drawn from
        "generation_config": "vllm",  # no sampling default of the model directory is applied
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "seed": limits.seed,
        "tensor_parallel_size": limits.tensor_parallel,
        "mm_encoder_tp_mode": "data" if limits.tensor_parallel > 1 else "weights",  # ranks share images, not layers
        "max_model_len": limits.max_model_tokens,
        "max_num_seqs": limits.max_running_requests,
        "max_num_batched_tokens": batched_tokens(limits.max_model_tokens, limits.more),
        "limit_mm_per_prompt": {"image": limits.max_images, "video": 0},
        "distributed_executor_backend": "external_launcher" if in_job else None,
        "enable_sleep_mode": can_sleep,
        **({"enable_return_routed_experts": True} if says_experts else {}),
        **limits.more,
    }


def _image_processor(pixels: PixelLimits | None) -> dict[str, Any]:
    """What vLLM's own preparation of images is told, which lays out its memory, and which the trainer's is compared
    with: PIL's resizing, as in processor.py (torchvision's differs by up to 0.2 in normalised pixel values)."""
    limits = {} if pixels is None else {"min_pixels": pixels.least, "max_pixels": pixels.most}
    return {"use_fast": False, **limits}


def _eager() -> dict[str, Any]:
    return {"enforce_eager": True}


def _graphs(max_requests: int) -> dict[str, Any]:
    """Graphs of decoding steps, captured of the same kernels that an eager step launches: nothing is compiled, so that
    the log-probs stay."""
    return {
        "enforce_eager": False,
        "compilation_config": {
            "mode": 0,  # CompilationMode.NONE: no inductor
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": graph_sizes(max_requests),
        },
    }


def _missing_keys(model: HfConfig) -> dict[str, Any]:
    """What vLLM needs in config.json's text_config, and may not be there: transformers 5 no longer writes that weights
    of experts are normalised, which they always are; and of Qwen3.5 vLLM looks there alone whether the head is tied,
    which transformers is told at the top."""
    text: dict[str, Any] = {}
    if model.num_experts and model.norm_topk_prob is None:
        text["norm_topk_prob"] = True
    if model.linear is not None:
        text["tie_word_embeddings"] = model.tied
    return {"text_config": text} if text else {}
