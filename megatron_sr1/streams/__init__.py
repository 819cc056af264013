"""Reward streams: which tokens of which pass earn which reward. No torch here, so that a refusal comes at once."""

from megatron_sr1.streams.contrast import Contrast
from megatron_sr1.streams.distorted import check_old, check_replay, check_siblings
from megatron_sr1.streams.preset import PRESETS, Preset, check_objective, own_code, preset_from_config, preset_of
from megatron_sr1.streams.segments import REST, WHOLE, other_segments, segments_of

__all__ = [
    "PRESETS",
    "REST",
    "WHOLE",
    "Contrast",
    "Preset",
    "check_objective",
    "check_old",
    "check_replay",
    "check_siblings",
    "other_segments",
    "own_code",
    "preset_from_config",
    "preset_of",
    "segments_of",
]
