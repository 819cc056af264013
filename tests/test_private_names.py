"""Every name of a library that it may move without notice, asked of the installed libraries.

An upgrade that fails here has moved what it names: the package's file that gathers the library's private names is the
place to look.
"""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import version
from typing import Any

import pytest
from packaging.version import Version

from tests.source_tree import PACKAGE, REPOSITORY, imports, private_names, read_modules

_IS_NEWER = Version(version("megatron-core")) >= Version("0.19")
_QUEUE_GETTER = "get_write_results_queue" if _IS_NEWER else "_get_write_results_queue"
LIBRARIES = ("torch", "megatron", "vllm", "transformers", "triton")
DEFINED = [  # module:name
    "torch.cuda.memory:_dump_snapshot",
    "torch.cuda.memory:_record_memory_history",
    "torch.distributed.checkpoint.filesystem:_StorageInfo",
    "torch.distributed.checkpoint.filesystem:_StoragePrefix",
    "torch.distributed.checkpoint.metadata:_MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.utils:_create_file_view",
    "torch.distributed.distributed_c10d:AllgatherOptions.timeout",
    "torch.distributed.distributed_c10d:_get_default_store",
    "torch.distributed:ProcessGroup.allgather",
    "torch.nn.modules.module:_EXTRA_STATE_KEY_SUFFIX",
    "torch.nn:Module._apply",
    "torch.serialization:_get_layout",
    "torch.testing._internal.distributed.fake_pg:FakeStore",
    "torch.utils._device:_device_constructors",
    "torch:ops.aten._flash_attention_backward",
    "torch:ops.aten._flash_attention_forward",
    "torch:ops.aten._scaled_dot_product_flash_attention_for_cpu",
    "torch:ops.aten._scaled_dot_product_flash_attention_for_cpu_backward",
    "megatron.core.parallel_state:_global_process_group_list",
    "megatron.core.pipeline_parallel.p2p_communication:_p2p_ops",
    "vllm._custom_ops:cpu_prepack_moe_weight",
    "vllm.model_executor.layers.fused_moe.modular_kernel:FusedMoEKernel.fused_experts",
    "vllm.model_executor.layers.fused_moe.modular_kernel:FusedMoEExperts.process_weights_after_loading",
    "vllm.model_executor.layers.fusion.mm_input_norm:FusedMMInputNorm.forward",
    "vllm.model_executor.model_loader.reload.layerwise:logger",
]
USED = [  # names that are replaced, or that instances alone have: module:function of the library, the name it uses
    ("torch.utils._device:DeviceContext.__torch_function__", "_device_constructors"),
    ("torch.nn:Module.add_module", "_modules"),
    ("megatron.core.parallel_state:create_group", "_global_process_group_list"),
    ("megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator._communicate", "_communicate_shapes"),
    (
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.sharded_state_dict",
        "sharded_param_state_fully_reshardable",
    ),
    ("megatron.core.tensor_parallel.random:CudaRNGStatesTracker.add", "_get_cuda_rng_state"),
    ("megatron.core.tensor_parallel.random:CudaRNGStatesTracker.add", "_set_cuda_rng_state"),
    ("megatron.core.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher.__init__", "cuda_dtoh_stream"),
    ("megatron.core.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher.__init__", "cuda_dtoh_point"),
    ("megatron.core.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher.preprocess", "input_splits"),
    ("megatron.core.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher.preprocess", "output_splits"),
    (
        "megatron.core.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher.token_dispatch",
        "_maybe_dtoh_and_synchronize",
    ),
    ("megatron.core.transformer.moe.moe_utils:RouterGatingLinearFunction.forward", "te_general_gemm"),
    (
        f"megatron.core.dist_checkpointing.strategies.filesystem_async:{_QUEUE_GETTER}",
        "_results_queue",
    ),
    ("vllm.distributed.device_communicators.cpu_communicator:_CPUSHMDistributed.__init__", "make_group_name"),
    ("vllm.model_executor.models.qwen2_5_vl:Qwen2_5_VLForConditionalGeneration.__init__", "visual"),
    ("vllm.model_executor.models.qwen2_5_vl:Qwen2_5_VisionTransformer.forward", "input_norm"),
    ("vllm.model_executor.models.qwen3_vl:Qwen3VLForConditionalGeneration.__init__", "visual"),
    ("vllm.model_executor.models.qwen3_vl:Qwen3_VisionTransformer.forward", "input_norm"),
    ("vllm.model_executor.models.qwen3_5:Qwen3_5ForConditionalGeneration.__init__", "visual"),
    ("vllm.model_executor.models.qwen3_5:Qwen3_5MoeForConditionalGeneration.__init__", "visual"),
    (
        "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn:QwenGatedDeltaNetAttention.forward",
        "_forward_method",
    ),
    ("vllm.v1.engine.core_client:InprocClient.shutdown", "_finalizer"),
    ("vllm.v1.engine.llm_engine:LLMEngine.__init__", "engine_core"),
    ("vllm.model_executor.layers.fused_moe.experts.cpu_moe:CPUUnquantizedExperts.process_weights_after_loading", "isa"),
    (
        "vllm.model_executor.layers.fused_moe.experts.cpu_moe:CPUUnquantizedExperts.process_weights_after_loading",
        "_use_zentorch",
    ),
]


@pytest.fixture(scope="module", autouse=True)
def platform() -> None:
    """Megatron-Core and vLLM are imported after it."""
    from megatron_sr1.platform import start_platform
    from megatron_sr1.rollout.vllm.engine import prepare_environment

    start_platform()
    prepare_environment()


def knows(place: str, name: str) -> bool:
    """Whether a function of the library uses a name."""
    function = inspect.unwrap(getattr(resolve(place), "__func__", resolve(place)))
    return name in function.__code__.co_names


def resolve(place: str) -> Any:
    module, _, name = place.partition(":")
    found = importlib.import_module(module)
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    return found


def is_importable(name: str) -> bool:
    """Whether an import statement finds a dotted name: some packages make theirs only when asked."""
    module, _, last = name.rpartition(".")
    try:
        exec(f"from {module} import {last}" if module else f"import {name}", {})
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("place", DEFINED)
def test_name_is_defined(place: str) -> None:
    assert resolve(place) is not None or place.endswith(":_global_process_group_list")


@pytest.mark.parametrize(("place", "name"), USED)
def test_name_is_used(place: str, name: str) -> None:
    """A replaced name that the library no longer reads would be replaced in silence."""
    assert knows(place, name)


def test_overrides_take_what_they_are_given() -> None:
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from torch.nn import Module

    from megatron_sr1.platform.megatron_private import OrderedCommunicator
    from megatron_sr1.platform.torch_private import FixedDtypeBuffers

    for ours, theirs in (
        (OrderedCommunicator._communicate_shapes, P2PCommunicator._communicate_shapes),
        (FixedDtypeBuffers._apply, Module._apply),
    ):
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), ours.__qualname__


def test_every_gathered_name_is_asked_for() -> None:
    places = [*DEFINED, *(place for place, _ in USED)]
    asked = {part for place in places for part in place.rpartition(":")[2].split(".")} | {name for _, name in USED}
    gathered = {
        name.rpartition(".")[2]
        for module in read_modules(REPOSITORY)
        if module.parts[-1] in ("torch_private", "megatron_private", "private")
        for _, name in private_names(module)
    }
    assert gathered and not gathered - asked


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_import_is_there(library: str) -> None:
    """Modules deep inside a library move as easily, and imports inside functions fail only when those run."""
    names = {
        name: module
        for module in read_modules(REPOSITORY)
        if module.parts[0] == PACKAGE
        for _, name in imports(module)
        if name.split(".")[0] == library
    }
    missing = sorted(
        f"{'/'.join(module.parts)}.py: {name}" for name, module in names.items() if not is_importable(name)
    )
    assert names and not missing, "\n".join(["", *missing])


def test_moved_name_is_found() -> None:
    with pytest.raises(AttributeError):
        resolve("torch.serialization:_moved")
    with pytest.raises(ModuleNotFoundError):
        resolve("torch._moved:name")
    assert not knows("torch.serialization:_get_layout", "_moved")
    assert not is_importable("torch.serialization._moved")
    assert not is_importable("torch.moved.name")
