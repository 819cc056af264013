"""Generation: engines in the training ranks, two passes per sample. Importing this package does not import vllm."""

from megatron_sr1.rollout.balance import deal_prompts, deal_samples
from megatron_sr1.rollout.plan import Limits, Planner
from megatron_sr1.rollout.two_pass import TwoPassGenerator
from megatron_sr1.rollout.vision_canary import canary_complaints, stale_vision_canary
from megatron_sr1.rollout.vllm.arguments import EngineLimits
from megatron_sr1.rollout.vllm.engine import Engine

__all__ = [
    "Engine",
    "EngineLimits",
    "Limits",
    "Planner",
    "TwoPassGenerator",
    "canary_complaints",
    "deal_prompts",
    "deal_samples",
    "stale_vision_canary",
]
