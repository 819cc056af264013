"""The configuration: frozen dataclasses with one default each, filled from YAML and key=value overrides.

No torch here, so that `--dry-run`, the launcher and the tests of bad input start in a moment.
"""

from megatron_sr1.config.checks import check_model, check_train_batch
from megatron_sr1.config.data import DataConfig
from megatron_sr1.config.evaluation import EvaluateConfig
from megatron_sr1.config.files import dump_config, load_config
from megatron_sr1.config.model import LayoutConfig, ModelConfig, PrecisionConfig, RecomputeConfig
from megatron_sr1.config.rollout import RolloutConfig
from megatron_sr1.config.rules import ConfigError
from megatron_sr1.config.training import PRESET_NAMES, ObjectiveConfig, OptimizerConfig, TrainConfig
from megatron_sr1.config.whole import Config

__all__ = [
    "PRESET_NAMES",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluateConfig",
    "LayoutConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PrecisionConfig",
    "RecomputeConfig",
    "RolloutConfig",
    "TrainConfig",
    "check_model",
    "check_train_batch",
    "dump_config",
    "load_config",
]
