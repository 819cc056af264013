"""The configuration: frozen dataclasses with one default each, filled from YAML and key=value overrides.

No torch here, so that `--dry-run`, the launcher and the tests of bad input start in a moment.
"""

from megatron_sr1.config.checks import (
    Command,
    check_bf16_layers,
    check_command,
    check_model,
    kv_request_bytes,
    kv_token_bytes,
    row_tokens,
)
from megatron_sr1.config.data import DataConfig
from megatron_sr1.config.engine_arguments import batched_tokens, check_batched_tokens
from megatron_sr1.config.evaluation import EvaluateConfig
from megatron_sr1.config.families import FAMILIES, Family, LinearAttention
from megatron_sr1.config.files import dump_config, load_config
from megatron_sr1.config.freeze import FROZEN_PARTS, everything_frozen
from megatron_sr1.config.hf_config import HfConfig, read_hf_config
from megatron_sr1.config.judge import Endpoint, JudgeConfig
from megatron_sr1.config.model import LayoutConfig, ModelConfig, OffloadConfig, PrecisionConfig, RecomputeConfig
from megatron_sr1.config.model_files import check_folders, check_weights, how_to_get, missing_files, model_fingerprint
from megatron_sr1.config.paths import home_path
from megatron_sr1.config.pixels import PixelLimits, check_pixels, pixel_limits, write_pixel_limits
from megatron_sr1.config.preflight import PreflightConfig
from megatron_sr1.config.profile import ProfileConfig
from megatron_sr1.config.reference import check_reference
from megatron_sr1.config.resume import (
    Change,
    changes_of,
    check_epochs,
    check_resume,
    rule_of,
    saved_steps,
    values_by_key,
)
from megatron_sr1.config.rewards import RewardsConfig
from megatron_sr1.config.rollout import (
    RolloutConfig,
    graph_sizes,
    running_requests,
    typical_tokens,
)
from megatron_sr1.config.router_replay import NO_REPLAY, Replay, replay_of
from megatron_sr1.config.rules import ConfigError
from megatron_sr1.config.tracking import MlflowConfig, SamplesConfig, TrackConfig, TrackioConfig, WandbConfig
from megatron_sr1.config.training import PRESET_NAMES, ObjectiveConfig, OptimizerConfig, TrainConfig
from megatron_sr1.config.whole import Config
from megatron_sr1.config.yaml_files import read_mapping, read_overrides

__all__ = [
    "FAMILIES",
    "FROZEN_PARTS",
    "NO_REPLAY",
    "PRESET_NAMES",
    "Change",
    "Command",
    "Config",
    "ConfigError",
    "DataConfig",
    "Endpoint",
    "EvaluateConfig",
    "Family",
    "HfConfig",
    "JudgeConfig",
    "LayoutConfig",
    "LinearAttention",
    "MlflowConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OffloadConfig",
    "OptimizerConfig",
    "PixelLimits",
    "PrecisionConfig",
    "PreflightConfig",
    "ProfileConfig",
    "RecomputeConfig",
    "Replay",
    "RewardsConfig",
    "RolloutConfig",
    "SamplesConfig",
    "TrackConfig",
    "TrackioConfig",
    "TrainConfig",
    "WandbConfig",
    "batched_tokens",
    "changes_of",
    "check_batched_tokens",
    "check_bf16_layers",
    "check_command",
    "check_epochs",
    "check_folders",
    "check_model",
    "check_pixels",
    "check_reference",
    "check_resume",
    "check_weights",
    "dump_config",
    "everything_frozen",
    "graph_sizes",
    "home_path",
    "how_to_get",
    "kv_request_bytes",
    "kv_token_bytes",
    "load_config",
    "missing_files",
    "model_fingerprint",
    "pixel_limits",
    "read_hf_config",
    "read_mapping",
    "read_overrides",
    "replay_of",
    "row_tokens",
    "rule_of",
    "running_requests",
    "saved_steps",
    "typical_tokens",
    "values_by_key",
    "write_pixel_limits",
]
