"""Will a configuration fit its GPUs, and is it a good one: memory of every phase, before any GPU is asked for.

Megatron-Core is imported here: start the platform first.
"""

from megatron_sr1.estimate.advice import advice
from megatron_sr1.estimate.layouts import Candidate, candidates
from megatron_sr1.estimate.machine import Machine
from megatron_sr1.estimate.plan import Phase, RunPlan, check_fits, make_plan
from megatron_sr1.estimate.saved import checkpoint_bytes, export_bytes
from megatron_sr1.estimate.text import SUPPOSED, plan_text, time_text

__all__ = [
    "SUPPOSED",
    "Candidate",
    "Machine",
    "Phase",
    "RunPlan",
    "advice",
    "candidates",
    "check_fits",
    "checkpoint_bytes",
    "export_bytes",
    "make_plan",
    "plan_text",
    "time_text",
]
