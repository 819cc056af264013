"""The engine: vLLM in this process. Only this file and its neighbours on weights import vllm.

vLLM is imported when an engine is made, so that importing this package stays cheap. Where torch.distributed is already
initialised, the engine joins that job's process group (vLLM's "external_launcher"): every `tensor_parallel` ranks in a
row are one engine. All ranks must then construct their engines together; afterwards each engine works on its own
requests, and the ranks of one engine make the same calls in the same order.
"""

from __future__ import annotations

import gc
import logging
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed

from megatron_sr1.config import read_hf_config
from megatron_sr1.phases import during
from megatron_sr1.platform.torch_private import all_gather_within
from megatron_sr1.platform.torchvision_ops import define_missing_torchvision_ops
from megatron_sr1.rollout.request import Draw, EngineFault, Generation, OwnView
from megatron_sr1.rollout.vllm.arguments import EngineLimits, engine_arguments
from megatron_sr1.rollout.vllm.checksums import WeightCheck
from megatron_sr1.rollout.vllm.delta_rule import use_torch_rule
from megatron_sr1.rollout.vllm.noted_experts import NotedExperts, told_experts
from megatron_sr1.rollout.vllm.private import (
    detach_finalizer,
    name_shared_memory,
    normalised_pixels,
    silence_reload_warnings,
    stop_worker,
)
from megatron_sr1.rollout.vllm.prompts import prepared_prompt
from megatron_sr1.rollout.vllm.reload import check_reloadable, register_no_weights, reload_weights
from megatron_sr1.rollout.vllm.shared_memory import new_job, take_back, take_back_left_behind
from megatron_sr1.types import BANNED_LOGIT_BIAS, EncodedImage
from megatron_sr1.weights import HfTensors

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


def prepare_environment() -> None:
    """The environment variables vLLM reads, all in one place. Called before vllm is imported."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the scheduler runs in this process, in the order requests are added
        VLLM_NO_USAGE_STATS="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",  # ranks of one machine would all be bound to the same first cores
        HF_HUB_OFFLINE="1",
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # it speaks before it has read the level
    if torch.distributed.is_initialized():
        rank = str(torch.distributed.get_rank())
        os.environ.setdefault("RANK", rank)
        os.environ.setdefault("LOCAL_RANK", rank)
    define_missing_torchvision_ops()


class Engine:
    """Implements `request.TokenEngine` on vLLM."""

    fault_wait_seconds = 60.0  # for the other ranks of an engine, when one has failed

    def __init__(
        self,
        hf_dir: str,
        limits: EngineLimits,
        *,
        checksum_every: int = 1,
        sleeps: bool = False,
        filled_later: bool = False,
    ) -> None:
        """Loads the weights of `hf_dir`.

        Args:
            checksum_every: the first weight update is checked, and every n-th after it.
            sleeps: give the device memory back in `sleep`, where the platform can.
            filled_later: read no weights; requests are refused until the first `update_weights`.

        Raises:
            ValueError: the ranks do not divide into engines. What vLLM raises for a bad model.
        """
        prepare_environment()
        from vllm.platforms import current_platform

        model = read_hf_config(hf_dir)
        self._hf = model
        self._in_job = torch.distributed.is_initialized()
        self._tensor_parallel = limits.tensor_parallel
        ranks = torch.distributed.get_world_size() if self._in_job else 1
        if ranks % limits.tensor_parallel:
            raise ValueError(f"{ranks} ranks do not divide into engines of {limits.tensor_parallel}: choose a divisor.")
        self._on_cpu = on_cpu = current_platform.is_cpu()
        self._notes_experts, self._listens = limits.notes_experts, limits.notes_experts and on_cpu
        if not on_cpu:  # else vLLM may fall back to its first model runner, which draws seeded tokens one by one
            os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
        self._can_sleep = sleeps and current_platform.is_sleep_mode_available()
        self._filled_later = filled_later
        where = {"on_cpu": on_cpu, "in_job": self._in_job, "can_sleep": self._can_sleep}
        self._arguments = engine_arguments(hf_dir, model, limits, **where, filled_later=filled_later)
        # vLLM compiles a few small functions even when it runs eagerly. On a CPU that takes 20 s and a C++ compiler.
        self._stance = "force_eager" if on_cpu else "default"
        names = HfTensors(hf_dir, model.family).tensors
        self._weight_names = {name for name in names if not model.family.is_kept(name)}
        self._max_model_tokens = limits.max_model_tokens
        self._checksum_every = checksum_every
        self._num_updates = 0
        self._engine = self._start()

    def _start(self) -> Any:
        """A new vLLM engine with the weights of the model directory, or none yet, as version 0."""
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        _register_architecture(self._hf.class_name)
        if self._filled_later:
            register_no_weights()
        shared = _named_shared_memory() if self._in_job and self._tensor_parallel > 1 else []
        silence_reload_warnings()  # _complete() watches what matters
        set_num_threads = torch.set_num_threads
        engine = LLMEngine.from_engine_args(EngineArgs(**self._arguments))
        take_back(shared)  # every rank of this engine has it by now
        if self._in_job:  # vLLM's shutdown destroys the process groups, which are the job's
            detach_finalizer(engine)
        torch.set_num_threads = set_num_threads  # vLLM replaces it on a CPU by one that only warns
        (self._model,) = engine.collective_rpc("get_model")
        check_reloadable(self._model)
        self._noted = NotedExperts(engine, self._model, self._hf) if self._listens else None
        if self._on_cpu:
            use_torch_rule(self._model)
        self._asleep = False
        self._is_filled = not self._filled_later
        self._weight_version = 0
        return engine

    def restart(self) -> None:
        """Drops all requests and everything held, and starts as it was made, as version 0. Refill it with
        `update_weights`. Collective: vLLM's engines of one job agree on their memory when they start."""
        if self._in_job:
            stop_worker(self._engine)
        else:
            self._engine.engine_core.shutdown()
        old = weakref.ref(self._model)
        self._engine = self._model = self._noted = None
        gc.unfreeze()  # vLLM has frozen its engine, which refers to itself
        gc.collect()  # without this, two KV caches would exist at once, and with sleep mode vLLM allows none beside it
        if old() is not None:
            raise RuntimeError("the engine's model is still there after its end: its memory is not free for another.")
        self._num_updates = 0
        self._engine = self._start()

    def meet_after_fault(self, num_open: int) -> None:
        """Waits for the other ranks of this engine, which must have failed at the same place.

        A rank that fails alone leaves the others inside a collective, where they cannot be told; there the run has to
        end, and goes on from its checkpoint.

        Args:
            num_open: requests that are unanswered here.

        Raises:
            EngineFault: another rank did not fail within `fault_wait_seconds`, or has other requests open.
        """
        if self._tensor_parallel == 1:
            return
        from vllm.distributed import get_tp_group

        group = get_tp_group().cpu_group
        counts = [torch.empty(1, dtype=torch.int64) for _ in range(group.size())]
        try:
            # the group's own patience is half an hour
            all_gather_within(group, counts, torch.tensor([num_open]), self.fault_wait_seconds)
        except RuntimeError as error:
            raise EngineFault(f"one rank of an engine failed alone, so the run ends here: {error}") from error
        if len({count.item() for count in counts}) > 1:
            raise EngineFault(
                f"the ranks of an engine failed at different places: {[count.item() for count in counts]} requests are "
                "open there."
            )

    def sleep(self) -> None:
        """Gives up weights and KV cache, so that the trainer has their memory; the next `update_weights` wakes it.

        Where the platform has no such memory (a CPU), or the engine was made without `sleeps`, nothing happens.

        Raises:
            ValueError: requests are still running.
        """
        if self.has_unfinished():
            raise ValueError("the engine cannot sleep while requests are running. Finish them with step() first.")
        if self._can_sleep and not self._asleep:
            self._engine.sleep(level=2)  # weights are dropped, not kept in host memory: new ones come in any case
            self._asleep = True

    @property
    def max_model_tokens(self) -> int:
        return self._max_model_tokens

    @property
    def weight_version(self) -> int:
        return self._weight_version

    def prepare(self, prompt_ids: Sequence[int], images: Sequence[EncodedImage]) -> object:
        """Takes a prompt with a run of placeholders for each image, and the images' patches as they are.

        The result may be added any number of times.

        Raises:
            ValueError: there are not as many runs as images.
        """
        if images:
            model: Any = self._model
            return prepared_prompt(prompt_ids, images, model.config.image_token_id)
        engine: Any = self._engine
        (prepared,) = engine.renderer.render_cmpl([{"prompt_token_ids": list(prompt_ids)}])
        return prepared

    def own_view(self, prompt_ids: Sequence[int], images: Sequence[Image]) -> OwnView:
        """What vLLM's own processing makes of a prompt with one placeholder an image, and of its images."""
        prompt = {"prompt_token_ids": list(prompt_ids), "multi_modal_data": {"image": list(images)}}
        engine: Any = self._engine
        (prepared,) = engine.renderer.render_cmpl([prompt])
        return OwnView(
            tuple(prepared["prompt_token_ids"]),
            [
                (
                    tuple(item["image_grid_thw"].data.tolist()),
                    normalised_pixels(self._model, item["pixel_values"].data),
                )
                for item in prepared["mm_kwargs"]["image"]
            ],
        )

    def add(self, request_id: str, prepared: Any, draw: Draw) -> None:
        """Queues a request; it starts with the next `step`.

        Raises:
            ValueError: the engine sleeps, or has no weights yet.
        """
        if not self._is_filled:
            raise ValueError(f"request {request_id!r} for an engine without weights. Call update_weights() first.")
        if self._asleep:
            raise ValueError(f"request {request_id!r} for an engine that sleeps. Wake it with update_weights() first.")
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
            skip_clone=True,  # these are of this request alone: nothing needs to be copied
        )
        self._engine.add_request(request_id, prepared, params, priority=draw.priority)

    def step(self) -> list[Generation]:
        """One forward pass over what is running; returns the requests it finished."""
        with during("engine step"), torch.compiler.set_stance(self._stance):
            engine: Any = self._engine
            return [self._generation(output) for output in engine.step() if output.finished]

    def _generation(self, output: Any) -> Generation:
        (completion,) = output.outputs
        assert completion.finish_reason in ("stop", "length"), completion.finish_reason
        experts = b""
        if self._noted is not None:
            num_tokens = len(output.prompt_token_ids) + len(completion.token_ids)
            experts = self._noted.take(output.request_id, num_tokens)
        elif self._notes_experts:
            experts = told_experts(completion, self._hf.moe_layers)
        return Generation(
            request_id=output.request_id,
            prompt_ids=tuple(output.prompt_token_ids),
            response_ids=tuple(completion.token_ids),
            logprobs=tuple(completion.logprobs.logprobs),
            finish_reason=completion.finish_reason,
            experts=experts,
        )

    def has_unfinished(self) -> bool:
        return self._engine.has_unfinished_requests()

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replaces the weights in place by tensors named as in the model directory's safetensors.

        Everything computed with the old weights goes: the KV prefixes, the processed images and the image embeddings.

        Raises:
            ValueError: requests are still running; they would mix two policies.
            ValueError: a tensor of the model directory is missing, or one is not in it. Old weights are gone by then.
            RuntimeError: on a checked update, what the engine holds is not what it was sent; KV prefixes stayed.
        """
        if self.has_unfinished():
            raise ValueError(
                f"weights of version {version} arrived while requests of version {self._weight_version} are running. "
                "Finish them with step() first."
            )
        engine: Any = self._engine
        if self._asleep:
            torch.accelerator.empty_cache()  # what training has left there; the engine's memory comes from elsewhere
            engine.wake_up(["weights"])
        check = WeightCheck(self._model) if self._num_updates % self._checksum_every == 0 else None
        reload_weights(engine, self._complete(weights, check))
        if self._asleep:
            engine.wake_up(["kv_cache"])
            self._asleep = False
        if not engine.reset_prefix_cache():
            raise RuntimeError(
                f"weight update {version}: vLLM kept KV prefixes of the old weights, though no request is running. "
                "The next responses would be continued from them."
            )
        engine.reset_encoder_cache()
        wrong = [] if check is None else check.differences()
        if wrong:
            raise RuntimeError(
                f"weight update {version}: the checksums of {len(wrong)} tensors in the engine differ from those that "
                f"were sent, first {wrong[0]!r}. The engine would sample from another policy."
            )
        self._num_updates += 1
        self._is_filled = True
        self._weight_version = version

    def _complete(
        self, weights: Iterable[tuple[str, Tensor]], check: WeightCheck | None
    ) -> Iterator[tuple[str, Tensor]]:
        """Passes on what the model has, all of it: a tensor that never came would stay as it was, in silence."""
        remedy = "Stream exactly the tensors that the model directory's safetensors name."
        missing = set(self._weight_names)
        for name, tensor in weights:
            if name not in self._weight_names:
                raise ValueError(f"weight update: the model directory has no tensor {name!r}. {remedy}")
            missing.discard(name)
            if check is not None:
                check.sent(name, tensor)
            yield name, tensor
        if missing:
            raise ValueError(f"weight update: {len(missing)} tensors are missing, first {min(missing)!r}. {remedy}")


def _named_shared_memory() -> list[str]:
    """Gives the memory through which an engine's ranks reduce on a CPU names of this job. Collective.

    vLLM names it after the address at which the ranks met, which is the same for all jobs where their launcher has
    introduced them: two jobs on a machine would share it, and what a killed job left would keep the next from starting.

    Returns:
        A list that gets this rank's names as an engine starts.
    """
    take_back_left_behind()
    names = [new_job()]
    torch.distributed.broadcast_object_list(names)
    return name_shared_memory(names[0])


def _register_architecture(name: str) -> None:
    """Imports the model's class here, where its dependencies are known to load.

    vLLM otherwise imports it in a fresh process, to learn its properties without touching an accelerator.
    """
    from vllm import ModelRegistry

    if name in ModelRegistry.models:
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
