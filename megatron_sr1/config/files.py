"""YAML files and key=value overrides in, YAML out."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_sr1.config.rules import ConfigError
from megatron_sr1.config.whole import Config


def load_config(path: str | Path | None, overrides: list[str]) -> Config:
    """Reads YAML, applies `key=value` overrides, validates.

    Raises:
        ConfigError: unknown key, wrong type, a value out of range, or values that do not fit together.
    """
    try:
        tree = OmegaConf.structured(Config)
        if path is not None:
            if not Path(path).is_file():
                raise ConfigError(f"CONFIG={str(path)!r} is not a file. Give the path of a YAML configuration.")
            tree = OmegaConf.merge(tree, OmegaConf.load(path))
        for override in overrides:
            if "=" not in override:
                raise ConfigError(
                    f"override {override!r} is not allowed: it must be key=value, for example train.steps=10."
                )
        tree = OmegaConf.merge(tree, OmegaConf.from_dotlist(overrides))
        return OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{error.full_key or 'configuration'}: {str(error).splitlines()[0]}. {_known_keys(error)}"
        ) from error


def _known_keys(error: OmegaConfBaseException) -> str:
    kind = error.object_type
    if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__"):
        return "Known keys here: " + ", ".join(f.name for f in fields(kind)) + "."
    return "Correct the value in the YAML file or in the override."


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
