"""What may change between the starts of a run: every key takes effect, is refused, or is free.

A run goes on in its folder with the configuration of the command that continues it. `RULES` says for each key what a
change means, so that `config.yaml` never claims what is not so:

    takes effect   from the next step on
    refused        another run would be continued than was begun
    content        may be spelled otherwise, and what it leads to is compared: the weights by their bytes
                   (`model_fingerprint`), data by their index (`data.SampleStream.fingerprint`; what a run is
                   evaluated on by `loops.evaluate`)
    free           changes no number of the run, beyond rounding where ranks share the work otherwise
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from megatron_sr1.config.credentials import without_secrets
from megatron_sr1.config.model_files import model_fingerprint
from megatron_sr1.config.profile import check_profile
from megatron_sr1.config.rules import ConfigError
from megatron_sr1.config.whole import Config
from megatron_sr1.config.yaml_files import read_mapping

_FREE_FORM = (
    "data.train_columns",
    "data.cold_start_columns",
    "data.heldout_columns",
    "evaluate.judge_parameters",
    "objective.distorted",
    "rewards.judge.parameters",
    "rollout.engine",
    "templates",
)
Rule = Literal["takes effect", "refused", "content", "free"]
# of a key, or of all keys of a section that have no line of their own
RULES: Mapping[str, Rule] = {
    "run_dir": "free",
    "seed": "refused",
    "nproc": "free",
    "timeout_minutes": "free",
    "model.hf_dir": "content",
    "model.megatron_dir": "content",
    "model.min_pixels": "refused",
    "model.max_pixels": "refused",
    "model.freeze": "refused",
    "model.system_prompt": "refused",
    "model.max_position": "free",
    "model.layer_spec": "free",
    "model.fused": "free",
    "layout": "free",
    "layout.distributed_optimizer": "refused",
    "precision": "refused",
    "precision.logits": "takes effect",
    "precision.deterministic": "takes effect",
    "recompute": "free",
    "offload": "free",
    "data.train": "content",
    "data.train_weights": "content",
    "data.train_columns": "content",
    "data.cold_start": "content",
    "data.cold_start_weights": "content",
    "data.cold_start_columns": "content",
    "data.heldout": "content",
    "data.heldout_columns": "content",
    "data.shuffle_window": "content",
    "data.max_prompt_tokens": "content",
    "data.max_bad_samples": "takes effect",
    "data.workers": "free",
    "data.prefetch_mib": "free",
    "data.cache_dir": "free",
    "data.cache_gib": "free",
    "optimizer": "takes effect",
    "rollout": "takes effect",
    "rollout.max_running_requests": "free",
    "rollout.kv_cache_gib": "free",
    "rollout.engine_tensor": "free",
    "rollout.pull": "free",
    "rollout.sleep": "free",
    "rollout.cuda_graphs": "free",
    "rollout.engine": "free",
    "rollout.sync_bucket_mib": "free",
    "rollout.checksum_every": "free",
    "rewards": "takes effect",
    "rewards.workers": "free",
    "objective": "takes effect",
    "objective.preset": "refused",
    "objective.reference_dir": "refused",
    "objective.template": "refused",
    "objective.second_template": "refused",
    "objective.plain_template": "refused",
    "templates": "refused",
    "train": "takes effect",
    "train.micro_batch_tokens": "free",
    "train.shared_prefix": "free",
    "train.save_every": "free",
    "train.keep_checkpoints": "free",
    "train.keep_every": "free",
    "train.keep_best": "free",
    "train.keep_best_mode": "free",
    "train.async_save": "free",
    "train.save_hf": "free",
    "evaluate": "free",  # the judge is not asked while a run trains
    "evaluate.max_prompts": "refused",
    "evaluate.samples": "refused",
    "evaluate.temperature": "refused",
    "evaluate.rounded_decimals": "refused",
    "evaluate.verify_export": "takes effect",
    "evaluate.controls": "takes effect",
    "evaluate.gold_field": "takes effect",
    "evaluate.other_questions": "takes effect",
    "preflight": "free",
    "profile": "free",
    "track": "free",
    "watchdog": "free",
}
_STEP = re.compile(r"step_(\d{6,})")
_REMEDY = "Set it back, or choose another run_dir."


@dataclass(frozen=True)
class Change:
    """A key whose value is not that of the last start."""

    key: str
    then: Any
    now: Any

    @property
    def rule(self) -> Rule:
        return rule_of(self.key)

    def __str__(self) -> str:
        return f"{self.key} was {self.then!r} and is {self.now!r}"


def rule_of(key: str) -> Rule:
    """Of a key with all its sections: `optimizer.lr`."""
    parts = key.split(".")
    return next(RULES[name] for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in RULES)


def saved_steps(checkpoints: Path) -> list[int]:
    """Steps of the checkpoints in a folder, in order; what is called otherwise is none (copies, parts, favourites)."""
    found = (_STEP.fullmatch(path.name) for path in checkpoints.iterdir()) if checkpoints.is_dir() else ()
    return sorted(int(name[1]) for name in found if name is not None)


def changes_of(config: Config) -> list[Change]:
    """Against the configuration that the run folder keeps; none where it keeps none. A key that the file lacks has its
    default, and one that only the file has is not looked at: another release may have written it.

    Raises:
        ConfigError: it is no YAML mapping.
    """
    path = Path(config.run_dir) / "config.yaml"
    if not path.is_file():
        return []
    try:
        kept, now = without_secrets(_flat(OmegaConf.to_container(read_mapping(path)))), values_by_key(config)
    except ConfigError as error:
        raise ConfigError(f"{path} is not a configuration: {error} Or choose another run_dir.") from error
    if kept.get("model.train_vision") is False:  # what releases before model.freeze said
        kept["model.freeze"] = ["vision", "merger"]
    then = {key: kept.get(key, default) for key, default in _defaults().items()}
    return [Change(key, then[key], value) for key, value in now.items() if then[key] != value]


@cache
def _defaults() -> dict[str, Any]:
    """Of every key; to be read only."""
    return values_by_key(Config())


def values_by_key(config: Config) -> dict[str, Any]:
    """Every value, under its key with all its sections: `optimizer.lr`. Lists are lists, as in YAML; URLs are without
    their credentials."""
    return without_secrets(_flat(OmegaConf.to_container(OmegaConf.structured(config))))


def check_resume(config: Config) -> None:
    """Whether the run folder may be continued with this configuration. Reads small files; writes nothing.

    Raises:
        ConfigError: a key that is refused has changed, weights are others, the run is finished and another was asked
            for, or it is already past its new end. The message names every key with both values.
    """
    steps = saved_steps(Path(config.run_dir) / "checkpoints")
    if not steps:
        return  # it begins again
    changes = changes_of(config)
    refused = [str(change) for change in changes if change.rule == "refused" or _splits_groups(change)]
    refused += _other_weights(config, Path(config.run_dir) / "checkpoints" / f"step_{steps[-1]:06d}")
    if refused:
        raise ConfigError(f"run_dir={config.run_dir!r} holds another run: {'; '.join(refused)}. {_REMEDY}")
    if config.train.steps is not None:
        _check_end(config, "train.steps", str(config.train.steps), config.train.steps, steps[-1], changes)


def check_epochs(config: Config, num_steps: int, size_key: str) -> None:
    """What `check_resume` asks of train.steps, of the steps that train.epochs comes to, once they are known.

    Args:
        size_key: what a step's share of an epoch is. Steps of another size than those that are done would be counted as
            if all had been of it.

    Raises:
        ConfigError: the run goes on with steps of another size, or was begun by train.steps, under which they may have
            been of any; see `check_resume` and `check_profile`.
    """
    check_profile(config.profile, num_steps, config.nproc)
    done = saved_steps(Path(config.run_dir) / "checkpoints")
    if config.train.epochs is None or not done:
        return
    changes = changes_of(config)
    begun_otherwise = [
        one for one in changes if one.key == size_key or (one.key == "train.epochs" and one.then is None)
    ]
    if begun_otherwise:
        raise ConfigError(
            f"train.epochs={config.train.epochs} is not allowed: steps of run_dir={config.run_dir!r} may not all be "
            f"of one size: {'; '.join(map(str, begun_otherwise))}. Set it back, set train.steps and "
            "train.epochs=null, or choose another run_dir."
        )
    _check_end(config, "train.epochs", f"{config.train.epochs} ({num_steps} steps)", num_steps, done[-1], changes)


def _check_end(config: Config, key: str, value: str, num_steps: int, done: int, changes: Sequence[Change]) -> None:
    """Raises ConfigError where a run is past its end, or at it with something that was to take effect."""
    if done > num_steps:
        raise ConfigError(
            f"{key}={value} is not allowed: run_dir={config.run_dir!r} has done {done} steps. "
            "Give at least as many, or choose another run_dir."
        )
    effects = [str(change) for change in changes if change.rule == "takes effect"]
    if done == num_steps and effects:
        raise ConfigError(
            f"run_dir={config.run_dir!r} holds a run that is finished, and nothing is left that could take effect: "
            f"{'; '.join(effects)}. Set it back, raise {key} to go on, or choose another run_dir."
        )


def _splits_groups(change: Change) -> bool:
    """A vision tower without a learning rate of its own is in the optimizer's groups of the language model."""
    return change.key == "optimizer.vision_lr" and None in (change.then, change.now)


def _other_weights(config: Config, checkpoint: Path) -> list[str]:
    try:
        progress = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))
        then, kept = str(progress["model_dir"]), str(progress.get("model", ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # whoever opens the checkpoint says what is wrong with it
    now = config.model.megatron_dir or config.model.hf_dir
    if not kept:
        same = Path(then).resolve() == Path(now).resolve()
        return [] if same else [f"it began with the weights of {then!r}, and those of {now!r} are others"]
    found = model_fingerprint(config)[: len(kept)]  # earlier releases kept that of the weights alone
    parts = (("weights", slice(None, 32)), ("tokenizer, chat template and image processor", slice(32, None)))
    return [
        f"it began with the {name} of {then!r}, and those of {now!r} are others"
        for name, digits in parts
        if kept[digits] != found[digits]
    ]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Values by key with all its sections; a free-form mapping, such as evaluate.judge_parameters, is a value."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in _FREE_FORM:
            flat |= _flat(value, f"{key}.")
        else:
            flat[key] = list(value) if isinstance(value, tuple) else value
    return flat
