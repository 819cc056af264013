"""Qwen-VL on Megatron-Core. Import it after `platform.start_platform()`."""

from megatron_sr1.policy.architecture import Architecture
from megatron_sr1.policy.policy import Policy, StepResult
from megatron_sr1.policy.read import read_architecture
from megatron_sr1.policy.scorer import Scorer

__all__ = ["Architecture", "Policy", "Scorer", "StepResult", "read_architecture"]
