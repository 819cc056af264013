"""Qwen-VL on Megatron-Core. Import it after `platform.start_platform()`."""

from megatron_sr1.policy.architecture import Architecture, read_architecture
from megatron_sr1.policy.policy import Policy, StepResult

__all__ = ["Architecture", "Policy", "StepResult", "read_architecture"]
