"""The only place that knows a CPU from an accelerator."""

from megatron_sr1.platform.runtime import Platform, start_platform

__all__ = ["Platform", "start_platform"]
