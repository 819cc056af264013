"""What vLLM's engine is asked for on either platform, and what a configuration may add to it."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sr1.config import ConfigError, PixelLimits, RolloutConfig, load_config, read_hf_config
from megatron_sr1.config.checks import check_engine
from megatron_sr1.config.engine_arguments import (
    _OWNED,
    _names_of_vllm,
    check_batched_tokens,
    check_engine_arguments,
)
from megatron_sr1.digits.tiny_families import create_family
from megatron_sr1.estimate.engine import engine_bytes
from megatron_sr1.rollout.vllm.arguments import EngineLimits, engine_arguments
from megatron_sr1.rollout.vllm.reload import register_no_weights

LIMITS = EngineLimits(8192, 100, kv_cache_gib=2.0, max_images=3, seed=7, tensor_parallel=2)


def arguments(hf_dir: str, on_cpu: bool, *, filled_later: bool = False, **changes: Any) -> dict[str, Any]:
    limits = dataclasses.replace(LIMITS, **changes)
    where = {"on_cpu": on_cpu, "in_job": True, "can_sleep": not on_cpu}
    return engine_arguments(hf_dir, read_hf_config(hf_dir), limits, **where, filled_later=filled_later)


def test_a_gpu_decodes_from_graphs_that_nothing_was_compiled_for(tiny_model_dir: str) -> None:
    asked = arguments(tiny_model_dir, on_cpu=False)
    assert not asked["enforce_eager"] and asked["dtype"] == "bfloat16" and asked["enable_sleep_mode"]
    compilation = asked["compilation_config"]
    assert (compilation["mode"], compilation["cudagraph_mode"]) == (0, "FULL_DECODE_ONLY")
    sizes = compilation["cudagraph_capture_sizes"]
    assert sizes[:5] == [1, 2, 4, 8, 16] and sizes[-2:] == [96, 100] and sizes == sorted(set(sizes))
    for few in (1, 2, 3, 8, 9):
        sizes = arguments(tiny_model_dir, False, max_running_requests=few)["compilation_config"]
        assert max(sizes["cudagraph_capture_sizes"]) == few


def test_a_cpu_and_whoever_does_not_want_them_have_no_graphs(tiny_model_dir: str) -> None:
    for asked in (arguments(tiny_model_dir, True), arguments(tiny_model_dir, False, cuda_graphs=False)):
        assert asked["enforce_eager"] and "compilation_config" not in asked


def test_the_same_is_asked_for_everywhere_but_for_what_a_platform_decides(tiny_model_dir: str) -> None:
    on_cpu, on_gpu = (arguments(tiny_model_dir, on_cpu, cuda_graphs=False) for on_cpu in (True, False))
    differing = {name for name in on_cpu.keys() | on_gpu.keys() if on_cpu.get(name) != on_gpu.get(name)}
    assert differing == {"dtype", "enable_chunked_prefill", "enable_sleep_mode", "block_size"}
    assert on_cpu["mm_encoder_tp_mode"] == "data" and on_cpu["mm_processor_cache_gb"] == 0
    assert arguments(tiny_model_dir, True, tensor_parallel=1)["mm_encoder_tp_mode"] == "weights"
    assert on_cpu["kv_cache_memory_bytes"] == 2 << 30 and on_cpu["limit_mm_per_prompt"] == {"image": 3, "video": 0}


def test_an_engine_prepares_images_of_the_trainers_pixels(tiny_model_dir: str) -> None:
    """vLLM's own preparation, by which it lays out its memory; what the trainer prepares is sent as it is."""
    assert arguments(tiny_model_dir, False)["mm_processor_kwargs"] == {"use_fast": False}
    asked = arguments(tiny_model_dir, False, pixels=PixelLimits(5000, 6000))["mm_processor_kwargs"]
    assert asked == {"use_fast": False, "min_pixels": 5000, "max_pixels": 6000}


def test_weights_that_come_from_the_trainer_are_not_read_from_the_model_directory(tiny_model_dir: str) -> None:
    formats = {later: arguments(tiny_model_dir, False, filled_later=later)["load_format"] for later in (False, True)}
    assert formats[False] == "auto"

    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    register_no_weights()
    loader = get_model_loader(LoadConfig(load_format=formats[True]))
    model = torch.nn.BatchNorm1d(3)  # of two weights that are ones and zeros, and a buffer of ones
    loader.download_model(None)
    loader.load_weights(model, None)
    assert not model.weight.any() and not model.bias.any() and bool(model.running_var.all())


def test_the_installed_vllm_has_every_argument_and_knows_the_graphs(tiny_model_dir: str) -> None:
    from vllm.config import CompilationConfig
    from vllm.config.compilation import CompilationMode, CUDAGraphMode
    from vllm.engine.arg_utils import EngineArgs

    names = {field.name for field in dataclasses.fields(EngineArgs)}
    assert set(_names_of_vllm()) == names, "read without the import"
    asked = arguments(tiny_model_dir, False, notes_experts=True)
    assert asked["enable_return_routed_experts"] and "enable_return_routed_experts" not in arguments(
        tiny_model_dir, True, notes_experts=True
    )
    assert asked.keys() <= names and _OWNED.keys() <= names
    compilation = CompilationConfig(**asked["compilation_config"])
    assert compilation.mode == CompilationMode.NONE
    assert compilation.cudagraph_mode == CUDAGraphMode.FULL_DECODE_ONLY
    assert not CUDAGraphMode.FULL_DECODE_ONLY.requires_piecewise_compilation()


def test_engines_that_say_experts_keep_prefixes_as_vllm_asks(tmp_path: Path) -> None:
    """Of a mixture with recurrent layers too, whose engines keep none else."""
    from vllm.config import VllmConfig

    model = str(create_family(tmp_path, "qwen3_5_moe"))
    for on_cpu in (True, False):
        for notes in (True, False):
            asked = arguments(model, on_cpu, notes_experts=notes)
            assert asked["enable_prefix_caching"] == asked.get("enable_return_routed_experts", False)
            assert not asked["enable_prefix_caching"] or asked["enable_chunked_prefill"], "vLLM keeps states so alone"
    refuses = inspect.getsource(VllmConfig._verify_aux_output_compatibility)
    assert "requires prefix caching" in refuses, "else recurrent layers need none"


def test_a_configuration_may_add_what_is_not_decided_here(tiny_model_dir: str) -> None:
    overrides = ["rollout.engine.max_num_batched_tokens=16384", "rollout.engine.kv_cache_dtype=fp8"]
    config = load_config(None, [f"model.hf_dir={tiny_model_dir}", *overrides])
    check_engine_arguments(config.rollout.engine)
    asked = arguments(tiny_model_dir, True, more=config.rollout.engine)
    assert (asked["max_num_batched_tokens"], asked["kv_cache_dtype"]) == (16384, "fp8")
    assert arguments(tiny_model_dir, True)["max_num_batched_tokens"] == 8192


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("max_num_batch_tokens", "EngineArgs has no such argument. Did you mean max_num_batched_tokens?"),
        ("qqqq", "EngineArgs has no such argument. Leave it out."),
        *(
            ("max_num_seqs", "Set rollout.max_running_requests."),
            ("hf_token", "a secret belongs into no configuration"),
        ),
        *(("enable_expert_parallel", "a part of every expert"), ("enable_eplb", "a part of every expert")),
        *(("nnodes", "tensor-parallel alone"), ("enable_lora", "no adapters"), ("mm_encoder_only", "with images")),
        *(("dtype", "the trainer computes log-probs in it"), ("trust_remote_code", "no code of a model directory")),
    ],
)
def test_an_argument_that_is_none_or_decided_here_is_refused(name: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_engine_arguments({name: 1})
    assert str(caught.value).startswith(f"rollout.engine.{name}=1 is not allowed: ") and words in str(caught.value)


def test_without_vllm_its_names_are_not_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    _names_of_vllm.cache_clear()
    try:
        check_engine_arguments({"qqqq": 1})
        with pytest.raises(ConfigError, match="Set seed"):
            check_engine_arguments({"seed": 1})
    finally:
        monkeypatch.undo()
        _names_of_vllm.cache_clear()


@pytest.mark.parametrize(
    ("engine", "on_cpu", "text"),
    [
        ("{max_num_batched_tokens: 4096}", True, "=4096 is not allowed: it must be a whole number, at least 8192"),
        ("{max_num_batched_tokens: 64}", False, "=64 is not allowed: it must be a whole number, at least 100 "),
        ("{max_num_batched_tokens: 100}", False, ""),
        ("{max_num_batched_tokens: 100, enable_chunked_prefill: false}", False, "at least 8192"),
        ("{max_num_batched_tokens: 8192, enable_chunked_prefill: false}", True, ""),
        ("{enable_chunked_prefill: true}", True, "false or null on a CPU: a prompt that is cut"),
        ("{enable_chunked_prefill: true}", False, ""),
        ("{max_num_batched_tokens: many}", False, "='many' is not allowed: it must be a whole number"),
        ("{max_num_batched_tokens: null}", False, "=None is not allowed: it must be a whole number"),
        ("{max_num_batched_tokens: 8192.5}", True, "=8192.5 is not allowed: it must be a whole number"),
    ],
)
def test_a_forward_pass_has_room_for_its_requests_and_for_a_prompt_that_is_not_cut(
    tiny_model_dir: str, engine: str, on_cpu: bool, text: str
) -> None:
    model, requests = f"model.hf_dir={tiny_model_dir}", "rollout.max_running_requests=100"
    config = load_config(None, [model, requests, f"rollout.engine={engine}"])

    def check() -> None:
        check_engine(config)
        check_batched_tokens(config.rollout, on_cpu=on_cpu)

    if not text:
        return check()
    with pytest.raises(ConfigError, match=text):
        check()


def test_the_plan_counts_the_tokens_of_a_forward_pass(tiny_model_dir: str) -> None:
    from megatron_sr1.policy.read import read_architecture

    model = read_architecture(tiny_model_dir)

    def forward(**rollout: Any) -> int:
        config = load_config(None, [f"model.hf_dir={tiny_model_dir}"])
        return engine_bytes(model, dataclasses.replace(config, rollout=RolloutConfig(**rollout))).forward

    more = forward(engine={"max_num_batched_tokens": 32768})
    assert more > 2 * forward() > forward(engine={"max_num_batched_tokens": 8192})
