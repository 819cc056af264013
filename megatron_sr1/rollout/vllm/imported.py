"""Imports what an engine on a CPU needs of vLLM: for the process that ranks are forked from, which has no engine."""

from importlib import import_module

from megatron_sr1.rollout.vllm.engine import prepare_environment

prepare_environment()
for name in ("v1.engine.llm_engine", "v1.worker.cpu_worker", "model_executor.models.qwen2_5_vl"):
    import_module(f"vllm.{name}")
