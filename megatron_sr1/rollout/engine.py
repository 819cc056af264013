"""The engine: vLLM in this process, one copy of the weights per rank. The only file that imports vllm.

vLLM is imported when an engine is made, so that importing this package stays cheap. Where torch.distributed is already
initialised, the engine joins that job's process group with tensor-parallel size 1 (vLLM's "external_launcher"): all
ranks must then construct their engines together, and afterwards each works on its own requests.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from safetensors import safe_open

from megatron_sr1.platform.torchvision_ops import define_missing_torchvision_ops
from megatron_sr1.rollout.request import Draw, Generation
from megatron_sr1.types import BANNED_LOGIT_BIAS

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_GIB = 2**30
_MIN_BATCHED_TOKENS = 8192  # of one forward pass


def prepare_environment() -> None:
    """The environment variables vLLM reads, all in one place. Called before vllm is imported."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the scheduler runs in this process, in the order requests are added
        VLLM_NO_USAGE_STATS="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",  # ranks of one machine would all be bound to the same first cores
        HF_HUB_OFFLINE="1",
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if torch.distributed.is_initialized():
        rank = str(torch.distributed.get_rank())
        os.environ.setdefault("RANK", rank)
        os.environ.setdefault("LOCAL_RANK", rank)
    define_missing_torchvision_ops()


class Engine:
    """Implements `request.TokenEngine` on vLLM."""

    def __init__(
        self,
        hf_dir: str,
        *,
        max_model_tokens: int,
        max_running_requests: int,
        kv_cache_gib: float,
        max_images: int,
        seed: int,
    ) -> None:
        """Loads the weights of `hf_dir`; `max_images` is per prompt. Raises what vLLM raises for a bad model."""
        prepare_environment()
        from vllm import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine

        _register_architectures(hf_dir)
        set_num_threads = torch.set_num_threads
        # At each reload it warns of every layer that has no weights of its own. _complete() watches what matters.
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
        on_cpu = current_platform.is_cpu()
        in_job = torch.distributed.is_initialized()
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=hf_dir,
                dtype="float32" if on_cpu else "bfloat16",
                enforce_eager=True,
                seed=seed,
                max_model_len=max_model_tokens,
                max_num_seqs=max_running_requests,
                max_num_batched_tokens=max(_MIN_BATCHED_TOKENS, max_model_tokens),
                # A seeded request whose prompt is split has its generator rewound, which a CPU generator cannot do.
                enable_chunked_prefill=not on_cpu,
                kv_cache_memory_bytes=int(kv_cache_gib * _GIB),
                enable_prefix_caching=True,
                limit_mm_per_prompt={"image": max_images, "video": 0},
                # PIL's resizing, as in processing.py: torchvision's differs by up to 0.2 in normalised pixel values.
                mm_processor_kwargs={"use_fast": False},
                logprobs_mode="processed_logprobs",  # of the distribution that was drawn from
                generation_config="vllm",  # no sampling default of the model directory is applied
                distributed_executor_backend="external_launcher" if in_job else None,
                disable_log_stats=True,
                use_tqdm_on_load=False,
            )
        )
        if in_job:  # vLLM's shutdown destroys the process groups, which are the job's
            self._engine.engine_core._finalizer.detach()
        torch.set_num_threads = set_num_threads  # vLLM replaces it on a CPU by one that only warns
        # vLLM compiles a few small functions even when it runs eagerly. On a CPU that takes 20 s and a C++ compiler.
        self._stance = "force_eager" if on_cpu else "default"
        self._weight_names = _checkpoint_names(hf_dir)
        self._max_model_tokens = max_model_tokens
        self._weight_version = 0

    @property
    def max_model_tokens(self) -> int:
        return self._max_model_tokens

    @property
    def weight_version(self) -> int:
        return self._weight_version

    def prepare(self, prompt_ids: Sequence[int], images: Sequence[Image]) -> object:
        """Runs the model's image processor and expands the image placeholders, one per image in `prompt_ids`.

        The result may be added any number of times before the next `update_weights`.
        """
        prompt: dict[str, Any] = {"prompt_token_ids": list(prompt_ids)}
        if images:
            prompt["multi_modal_data"] = {"image": list(images)}
        (prepared,) = self._engine.renderer.render_cmpl([prompt])
        return prepared

    def add(self, request_id: str, prepared: Any, draw: Draw) -> None:
        """Queues a request; it starts with the next `step`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=draw.temperature,
            max_tokens=draw.max_tokens,
            seed=draw.seed if draw.temperature > 0 else None,
            stop_token_ids=[draw.end_of_turn_id],
            ignore_eos=True,  # the end-of-turn id alone ends a response, whatever the tokenizer calls eos
            logit_bias=dict.fromkeys(draw.banned_ids, BANNED_LOGIT_BIAS),
            logprobs=0,  # the sampled token's alone
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._engine.add_request(request_id, prepared, params)

    def step(self) -> list[Generation]:
        """One forward pass over what is running; returns the requests it finished."""
        with torch.compiler.set_stance(self._stance):
            return [_generation(output) for output in self._engine.step() if output.finished]

    def has_unfinished(self) -> bool:
        return self._engine.has_unfinished_requests()

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replaces the weights in place by tensors named as in the model directory's safetensors.

        Everything computed with the old weights goes: the KV prefixes, the processed images and the image embeddings.

        Raises:
            ValueError: requests are still running; they would mix two policies.
            ValueError: a tensor of the model directory is missing, or one is not in it. Old weights are gone by then.
        """
        if self.has_unfinished():
            raise ValueError(
                f"weights of version {version} arrived while requests of version {self._weight_version} are running. "
                "Finish them with step() first."
            )
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": self._complete(weights)})
        self._engine.collective_rpc(_repack_output_head)
        self._engine.reset_prefix_cache()
        self._engine.reset_mm_cache()
        self._engine.reset_encoder_cache()
        self._weight_version = version

    def _complete(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Passes on what the model has, all of it: a tensor that never came would stay as it was, in silence."""
        remedy = "Stream exactly the tensors that the model directory's safetensors name."
        missing = set(self._weight_names)
        for name, tensor in weights:
            if name not in self._weight_names:
                raise ValueError(f"weight update: the model directory has no tensor {name!r}. {remedy}")
            missing.discard(name)
            yield name, tensor
        if missing:
            raise ValueError(f"weight update: {len(missing)} tensors are missing, first {min(missing)!r}. {remedy}")


def _generation(output: Any) -> Generation:
    (completion,) = output.outputs
    assert completion.finish_reason in ("stop", "length"), completion.finish_reason
    return Generation(
        request_id=output.request_id,
        prompt_ids=tuple(output.prompt_token_ids),
        response_ids=tuple(completion.token_ids),
        logprobs=tuple(completion.logprobs.logprobs),
        finish_reason=completion.finish_reason,
    )


def _repack_output_head(worker: Any) -> None:
    """Makes the output head compute with the embedding that was just loaded, where the two are tied.

    On a CPU vLLM computes with a packed copy of each weight. A reload packs the layers named in the checkpoint anew; a
    tied head is not named there, and would keep the copy of the old weights.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in worker.get_model().modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def _checkpoint_names(hf_dir: str) -> set[str]:
    names: set[str] = set()
    for path in Path(hf_dir).glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            names.update(tensors.keys())
    return names


def _register_architectures(hf_dir: str) -> None:
    """Imports the model's class here, where its dependencies are known to load.

    vLLM otherwise imports it in a fresh process, to learn its properties without touching an accelerator.
    """
    from vllm import ModelRegistry

    config = json.loads((Path(hf_dir) / "config.json").read_text(encoding="utf-8"))
    for name in config["architectures"]:
        if name in ModelRegistry.models:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
