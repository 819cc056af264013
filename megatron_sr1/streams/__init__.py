"""Reward streams: which tokens of which pass earn which reward. No torch here, so that a refusal comes at once."""

from megatron_sr1.streams.preset import PRESETS, Preset, check_objective, own_code, preset_from_config
from megatron_sr1.streams.segments import REST, WHOLE, block_of, other_segments, segments_of

__all__ = [
    "PRESETS",
    "REST",
    "WHOLE",
    "Preset",
    "block_of",
    "check_objective",
    "other_segments",
    "own_code",
    "preset_from_config",
    "segments_of",
]
