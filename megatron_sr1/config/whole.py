"""One command's whole configuration, and what its sections must agree on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from megatron_sr1.config.data import DataConfig
from megatron_sr1.config.evaluation import EvaluateConfig
from megatron_sr1.config.model import LayoutConfig, ModelConfig, OffloadConfig, PrecisionConfig, RecomputeConfig
from megatron_sr1.config.preflight import PreflightConfig
from megatron_sr1.config.profile import ProfileConfig, check_profile
from megatron_sr1.config.rewards import RewardsConfig
from megatron_sr1.config.rollout import RolloutConfig
from megatron_sr1.config.rules import Range, check_numbers, require
from megatron_sr1.config.templates import check_templates
from megatron_sr1.config.tracking import TrackConfig
from megatron_sr1.config.training import ObjectiveConfig, OptimizerConfig, TrainConfig
from megatron_sr1.config.watchdog import WatchdogConfig

_NUMBERS = {"seed": Range(0, 10**18), "nproc": Range(1, 10**6), "timeout_minutes": Range(0, 10**6, above=True)}


@dataclass(frozen=True)
class Config:
    """One command's whole configuration."""

    run_dir: str = "runs/default"  # the folder that the run keeps everything in
    seed: int = 1  # of the order of the data, of every draw and of weights that are made
    nproc: int = 1  # ranks on this machine; under torchrun the world size counts
    timeout_minutes: float = 10.0  # a rank that waits longer than this for another one ends the run
    model: ModelConfig = field(default_factory=ModelConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    # by name: ways to ask, with the layouts of what comes back; docs/extending.md has the keys and the shipped names
    templates: dict[str, Any] = field(default_factory=dict)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)

    def __post_init__(self) -> None:
        check_numbers("", self, _NUMBERS)
        check_templates(self.templates)
        check_profile(self.profile, self.train.steps, self.nproc)
        require(
            bool(self.run_dir), "run_dir", self.run_dir, "the path of a folder", "Give the run a folder of its own."
        )
        require(
            self.nproc % self.layout.model_ranks == 0,
            "nproc",
            self.nproc,
            f"a multiple of layout.tensor * layout.pipeline * layout.context = {self.layout.model_ranks}",
            "Change nproc or the layout.",
        )
        require(
            self.nproc % self.rollout.engine_tensor == 0,
            "rollout.engine_tensor",
            self.rollout.engine_tensor,
            f"a divisor of nproc={self.nproc}",
            "The ranks divide into engines.",
        )
        require(
            not (self.rollout.pull and self.precision.deterministic),
            "rollout.pull",
            self.rollout.pull,
            "false or null with precision.deterministic=true: who answers a prompt would hang on time",
            "Set one of them to false.",
        )
        stage_ranks = self.nproc // self.layout.pipeline
        require(
            stage_ranks % self.layout.expert == 0,
            "layout.expert",
            self.layout.expert,
            f"a divisor of the {stage_ranks} ranks of a pipeline stage",
            "Experts are shared by the ranks of one stage.",
        )
        require(
            "reference" not in self.evaluate.controls
            or not self.model.megatron_dir
            or bool(self.objective.reference_dir),
            "model.megatron_dir",
            self.model.megatron_dir,
            "empty where evaluate.controls has reference, which the starting weights read, those of model.hf_dir",
            "Convert it with megatron-sr1 convert megatron-to-hf, and name the folder in objective.reference_dir.",
        )
        each = self.rollout.samples_per_prompt
        require(
            self.train.batch_size * each >= self.data_ranks,
            "train.batch_size",
            self.train.batch_size,
            f"so many that each of the {self.data_ranks} data-parallel replicas of nproc={self.nproc} has a sample, of "
            f"rollout.samples_per_prompt={each}",
            "Raise it, or give the ranks to layout.tensor or layout.pipeline.",
        )

    @property
    def data_ranks(self) -> int:
        return self.nproc // self.layout.model_ranks

    @property
    def sequence_multiple(self) -> int:
        """Every sequence of a row is padded to a multiple of it: context parallelism cuts each into 2 * context."""
        return 2 * self.layout.context if self.layout.context > 1 else 1

    @property
    def row_multiple(self) -> int:
        """Every row is padded to a multiple of it, so that each rank's part is aligned."""
        shares = self.layout.context * (self.layout.tensor if self.layout.sequence_parallel else 1)
        return math.lcm(self.sequence_multiple, shares * self.precision.row_alignment)
