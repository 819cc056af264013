"""Trackers: where else a run's metrics go, beside its folder. Keys and passwords never stand here."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal, get_args
from urllib.parse import urlsplit

from megatron_sr1.config.rules import COUNT, COUNT_OR_NONE, ConfigError, check_numbers, one_of, require

WandbMode = Literal["disabled", "offline", "online"]
MLFLOW_SCHEMES = ("sqlite", "http", "https")


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases. The key is its own business: WANDB_API_KEY, or `wandb login`."""

    mode: WandbMode = "disabled"  # offline: files in <run_dir>/wandb, which `wandb sync` uploads later; online
    project: str = "megatron-sr1"  # that the run is filed under
    entity: str = ""  # user or team; empty: the account's default
    group: str = ""  # of runs that belong together
    name: str = ""  # of the run; empty: the last two parts of run_dir

    def __post_init__(self) -> None:
        one_of("track.wandb.mode", self.mode, get_args(WandbMode))
        reason = "W&B files runs under a project."
        require(self.mode == "disabled" or bool(self.project), "track.wandb.project", "", "a name", reason)


@dataclass(frozen=True)
class MlflowConfig:
    """MLflow. A server's credentials are its own business: MLFLOW_TRACKING_USERNAME and _PASSWORD, or _TOKEN."""

    uri: str = ""  # sqlite:///runs/mlflow.db, or a server's http(s)://host:port; empty: off
    experiment: str = "megatron-sr1"  # that the run is filed under
    name: str = ""  # of the run; empty: the last two parts of run_dir

    def __post_init__(self) -> None:
        if not self.uri:
            return
        parts = urlsplit(self.uri)
        if parts.password is not None or parts.username is not None:
            raise ConfigError(
                "track.mlflow.uri holds a user or a password, which would go into logs and run folders. Give them as "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment."
            )
        remedy = "MLflow has given up plain folders; `mlflow ui --backend-store-uri sqlite:///FILE` shows a file."
        allowed = "sqlite:///FILE, http://HOST or https://HOST"
        require(parts.scheme in MLFLOW_SCHEMES, "track.mlflow.uri", self.uri, allowed, remedy)
        require(bool(self.experiment), "track.mlflow.experiment", "", "a name", "MLflow files runs under it.")


@dataclass(frozen=True)
class TrackioConfig:
    """Trackio, in files of this machine alone: `<run_dir>/trackio`. TRACKIO_DIR=<run_dir>/trackio trackio show"""

    enabled: bool = False  # true: needs the extra trackio
    project: str = "megatron-sr1"  # that the run is filed under
    name: str = ""  # of the run; empty: the last two parts of run_dir

    def __post_init__(self) -> None:
        reason = "Trackio files runs under a project."
        require(not self.enabled or bool(self.project), "track.trackio.project", "", "a name", reason)


@dataclass(frozen=True)
class SamplesConfig:
    """Samples with their images and all passes, for trackers and TensorBoard. Images leave the machine with them."""

    every: int = 0  # steps, the first among them; then the examples of evaluations go along, too; 0: none are sent
    count: int = 4  # samples of a step, at most

    def __post_init__(self) -> None:
        check_numbers("track.samples", self, {"every": COUNT_OR_NONE, "count": COUNT})


@dataclass(frozen=True)
class TrackConfig:
    """Trackers of a run, beside metrics.jsonl and TensorBoard's files, which it always writes."""

    wandb: WandbConfig = field(default_factory=WandbConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)
    trackio: TrackioConfig = field(default_factory=TrackioConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    # log-prob gap, entropy and visual dependency of every trained token are kept in <run_dir>/rollouts, for the report
    tokens: bool = True


def check_trackers(track: TrackConfig) -> None:
    """Whether the packages of the trackers that are on are installed; none is imported.

    Raises:
        ConfigError: one is not; the message names the key that asks for it and how to install it.
    """
    wanted: dict[str, tuple[str, ...]] = {"track.wandb.mode": ("wandb",) if track.wandb.mode != "disabled" else ()}
    store = ("sqlalchemy", "alembic") if track.mlflow.uri.startswith("sqlite:") else ()
    wanted["track.mlflow.uri"] = ("mlflow", *store) if track.mlflow.uri else ()
    wanted["track.trackio.enabled"] = ("trackio",) if track.trackio.enabled else ()
    for key, packages in wanted.items():
        missing = [package for package in packages if find_spec(package) is None]
        if missing:
            extra = "trackio" if "trackio" in missing else "track"
            raise ConfigError(
                f"{key} needs {', '.join(missing)}, not installed here: pip install 'megatron_sr1[{extra}]', or leave "
                "the key out."
            )
