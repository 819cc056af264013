"""Which configuration made a step of a run: its objective may be changed from one start to the next."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from megatron_sr1.config import Config, load_config
from megatron_sr1.report.starts import STARTS_FILE, config_digest, read_starts


class StepConfigs:
    """The configurations that a run's folder holds."""

    def __init__(self, run: Path, last_step: int) -> None:
        """`last_step`: of metrics.jsonl; -1: it has none."""
        self._run, self._last = run, last_step

    def of(self, step: int) -> Config:
        """
        Raises:
            ValueError: there is none; it was changed, and nothing tells which one made the step.
        """
        if not self._configs:
            raise ValueError(f"{self._run} has no config.yaml, so the objective of its steps is not known.")
        if len({_what_matters(config) for config in self._configs.values()}) == 1:
            return next(iter(self._configs.values()))
        begun = [start for start in read_starts(self._run) if start["step"] is not None and start["step"] <= step]
        if not begun:
            raise ValueError(
                f"the objective of {self._run} was changed when it was started again, and {STARTS_FILE} does not tell "
                f"which one made step {step}."
            )
        if step > self._last:
            raise ValueError(
                f"the objective of {self._run} was changed when it was started again, and step {step} is not done "
                "since then: its rollouts may be of the start before."
            )
        if begun[-1]["config"] not in self._configs:
            raise ValueError(
                f"{self._run / STARTS_FILE} says that step {step} was made with a configuration that is not in the "
                "folder any more."
            )
        return self._configs[begun[-1]["config"]]

    @cached_property
    def _configs(self) -> dict[str, Config]:
        """By their digests, the newest first."""
        newest = self._run / "config.yaml"
        files = [*([newest] if newest.is_file() else []), *sorted(self._run.glob("config.*.yaml"))]
        return {config_digest(path.read_text(encoding="utf-8")): load_config(path, []) for path in files}


def _what_matters(config: Config) -> str:
    """All that makes an advantage."""
    parts = [config.objective, config.rewards, config.templates, config.train.batch_size]
    return repr([*parts, config.rollout.prompts_per_step, config.rollout.samples_per_prompt])
