"""What the engine asks of vLLM for GPUs: methods of the engine and of its worker, fields, routes.

Arguments of EngineArgs are compared by tests/test_engine_arguments.py, private names by tests/test_private_names.py;
both run here, too.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest

from tests.contracts.library_calls import misfit
from tests.source_tree import REPOSITORY, Module, read_modules

ENGINES = {"self._engine", "engine"}  # what rollout/vllm calls vLLM's LLMEngine
RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")  # the older one, and GPUs' default
LAYERS = {  # class of vLLM: what placement.py, checksums.py and reload.py read of its instances
    "model_executor.layers.linear:QKVParallelLinear": "num_heads num_kv_heads head_size num_kv_head_replicas",
    "model_executor.layers.linear:ColumnParallelLinear": "tp_rank tp_size input_size",
    "model_executor.layers.linear:MergedColumnParallelLinear": "output_sizes",
    "model_executor.layers.linear:RowParallelLinear": "tp_rank tp_size input_size_per_partition",
    "model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding": "shard_indices quant_method",
    "model_executor.layers.fused_moe.routed_experts:RoutedExperts": (
        "moe_config quant_method is_fused_checkpoint_transposed"
    ),
    "model_executor.layers.mamba.gdn.qwen_gdn_linear_attn:QwenGatedDeltaNetAttention": (
        "key_dim value_dim num_k_heads num_v_heads head_v_dim tp_rank tp_size prefix "
        "in_proj_qkvz in_proj_ba conv1d A_log dt_bias norm out_proj"
    ),
}
FIELDS = {  # class of vLLM: what is read of what it hands out
    "outputs:RequestOutput": "request_id prompt_token_ids outputs finished",
    "outputs:CompletionOutput": "token_ids logprobs finish_reason",
    "logprobs:FlatLogprobs": "logprobs",
    "model_executor.layers.fused_moe.config:FusedMoEParallelConfig": "tp_rank tp_size",
    "model_executor.layers.fused_moe.config:FusedMoEConfig": "moe_parallel_config",
    "model_executor.layers.vocab_parallel_embedding:VocabParallelEmbeddingShardIndices": (
        "org_vocab_start_index org_vocab_end_index"
    ),
}


@pytest.fixture(scope="module", autouse=True)
def vllm_environment() -> None:
    from megatron_sr1.rollout.vllm.engine import prepare_environment

    prepare_environment()


def find(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"vllm.{module}"), name)


def our_files() -> list[Module]:
    return [module for module in read_modules(REPOSITORY) if module.lies_in("rollout/vllm")]


def uses_of_engine() -> Iterator[tuple[str, ast.Call | None]]:
    """Each attribute that is taken of vLLM's engine; the call, where it is called at once."""
    for module in our_files():
        if module.parts[-1] == "private":
            continue
        calls = {id(node.func): node for node in ast.walk(module.tree) if isinstance(node, ast.Call)}
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ENGINES:
                yield node.attr, calls.get(id(node))


def assigned(cls: type) -> set[str]:
    """Names that the methods of a class, or of one it inherits from, give to an instance; and its own."""
    names = set()
    for base in cls.__mro__:
        if base.__module__.split(".")[0] == "vllm":
            tree = ast.parse(inspect.getsource(importlib.import_module(base.__module__)))
            (body,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == base.__name__)
            for node in ast.walk(body):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    names.add(node.attr)
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    names.add(node.target.id)
            names |= set(vars(base))
    return names


def test_the_engine_has_what_is_asked_of_it() -> None:
    """Methods with their arguments, and attributes."""
    from vllm.v1.engine.llm_engine import LLMEngine

    uses = list(uses_of_engine())
    assert {"step", "add_request", "sleep", "wake_up", "collective_rpc", "renderer"} <= {name for name, _ in uses}
    wrong = []
    for name, call in uses:
        if name not in assigned(LLMEngine):
            wrong.append(f"LLMEngine has no {name}")
        elif call is not None:
            signature = inspect.signature(getattr(LLMEngine, name))
            unbound = signature.replace(parameters=list(signature.parameters.values())[1:])
            wrong += [f"{ast.unparse(call)}: {why}"] if (why := misfit(call, unbound)) else []
    assert not wrong, "\n".join(["", *wrong])


def test_the_worker_has_what_is_sent_to_it() -> None:
    """By name, over collective_rpc; what the worker passes on, both of its model runners take."""
    from vllm.v1.worker.gpu_worker import Worker

    sent = {}
    for name, call in uses_of_engine():
        if name == "collective_rpc":
            assert call is not None and isinstance(call.args[0], ast.Constant)
            passed = [keyword.value for keyword in call.keywords if keyword.arg == "kwargs"]
            keys = [key for value in passed if isinstance(value, ast.Dict) for key in value.keys if key]
            sent[call.args[0].value] = [ast.literal_eval(key) for key in keys]
    assert sent.keys() == {"get_model", "reload_weights"}
    for method, keys in sent.items():
        inspect.signature(getattr(Worker, method)).bind(None, **dict.fromkeys(keys))
        for runner in RUNNERS:
            function = getattr(importlib.import_module(runner).GPUModelRunner, method)
            inspect.signature(function).bind(None, **dict.fromkeys(keys))


def test_sleep_drops_weights_and_wakes_in_two_parts() -> None:
    """The tags that the engine wakes by are those that the worker allocates under."""
    from vllm.v1.worker.gpu_worker import Worker

    tags = {
        element.value
        for name, call in uses_of_engine()
        if name == "wake_up" and call is not None
        for element in ast.walk(call.args[0])
        if isinstance(element, ast.Constant)
    }
    allocated = {
        node.value
        for method in (Worker.load_model, Worker.initialize_from_config)
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method))))
        if isinstance(node, ast.Constant)
    }
    assert tags == {"weights", "kv_cache"} and tags <= allocated
    assert "level" in inspect.signature(Worker.sleep).parameters


def test_resetting_the_prefix_cache_says_whether_it_did() -> None:
    from vllm.v1.engine.llm_engine import LLMEngine

    assert inspect.signature(LLMEngine.reset_prefix_cache).return_annotation in (bool, "bool")


@pytest.mark.parametrize("place", LAYERS)
def test_a_layer_has_what_the_weight_check_reads(place: str) -> None:
    assert set(LAYERS[place].split()) <= assigned(find(place))


@pytest.mark.parametrize("place", FIELDS)
def test_a_result_has_the_fields_that_are_read(place: str) -> None:
    assert set(FIELDS[place].split()) <= assigned(find(place))


def test_experts_have_the_weights_by_their_names() -> None:
    """Where RoutedExperts' weights are made, which placement.py names."""
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as module

    assert {"w13_weight", "w2_weight"} <= {
        node.value for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Constant)
    }


@pytest.mark.parametrize(
    "place",
    [
        "model_executor.models.qwen2_5_vl:Qwen2_5_VLForConditionalGeneration",
        "model_executor.models.qwen3_vl:Qwen3VLForConditionalGeneration",
        "model_executor.models.qwen3_vl_moe:Qwen3VLMoeForConditionalGeneration",
        "model_executor.models.qwen3_5:Qwen3_5ForConditionalGeneration",
        "model_executor.models.qwen3_5:Qwen3_5MoeForConditionalGeneration",
    ],
)
def test_the_models_are_there_and_map_names(place: str) -> None:
    from vllm import ModelRegistry

    model = find(place)
    assert model.__name__ in ModelRegistry.models
    assert ModelRegistry.models[model.__name__].load_model_cls() is model
    (mapped,) = model.hf_to_vllm_mapper.apply_list(["model.language_model.layers.0.mlp.down_proj.weight"])
    assert mapped.startswith("language_model.")


def test_the_served_model_has_the_judge_s_route() -> None:
    """`vllm serve` as the judge of an evaluation: the OpenAI client's route, and the parameters sent by default."""
    from openai.resources.chat.completions import Completions
    from vllm.entrypoints.openai.chat_completion import api_router
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    from megatron_sr1.config import EvaluateConfig

    routes = {route.path: route.methods for route in api_router.router.routes}
    assert '"/chat/completions"' in inspect.getsource(Completions.create) and "POST" in routes["/v1/chat/completions"]
    sent = {"model", "messages", *EvaluateConfig().judge_parameters}
    assert sent <= ChatCompletionRequest.model_fields.keys()
