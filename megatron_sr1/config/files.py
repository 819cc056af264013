"""YAML files and key=value overrides in, YAML out.

A file may name others under `base`, relative to itself: they are read first, in order, and what comes later wins.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_sr1.config.rules import ConfigError
from megatron_sr1.config.whole import Config

_RESOLVER = re.compile(r"\$\{\s*[\w.]+\s*:")
_OUTSIDE = re.compile(r"Invalid value '(?P<got>.*)', expected one of \[(?P<allowed>.*)\]")  # of a Literal


def load_config(path: str | Path | None, overrides: list[str]) -> Config:
    """Reads YAML with its bases, applies `key=value` overrides, validates.

    Raises:
        ConfigError: unknown key, wrong type, a value out of range, or values that do not fit together; a base that is
            missing or leads back to its own file.
    """
    try:
        tree = OmegaConf.structured(Config)
        if path is not None:
            if not Path(path).is_file():
                raise ConfigError(f"CONFIG={str(path)!r} is not a file. Give the path of a YAML configuration.")
            for part in _with_bases(Path(path), ()):
                tree = OmegaConf.merge(tree, part)
        for override in overrides:
            if "=" not in override:
                raise ConfigError(
                    f"override {override!r} is not allowed: it must be key=value, for example train.steps=10."
                )
        words = OmegaConf.from_dotlist(overrides)
        refuse_resolvers(words, "an override")
        tree = OmegaConf.merge(tree, words)
        config = OmegaConf.to_object(tree)
        assert isinstance(config, Config), type(config)
        return config
    except OmegaConfBaseException as error:
        raise ConfigError(_reason(error)) from error


def _with_bases(path: Path, readers: tuple[Path, ...]) -> Iterator[DictConfig | ListConfig]:
    """The contents of the file's bases, of theirs first, and then its own.

    Args:
        readers: the files that led to this one, outermost first.
    """
    here = path.resolve()
    if here in readers:
        circle = " -> ".join(str(file) for file in (*readers[readers.index(here) :], here))
        raise ConfigError(f"base: {circle} is a circle. Take one of these files out of another's base.")
    own = OmegaConf.load(path)
    refuse_resolvers(own, str(path))
    bases = own.pop("base", None) if isinstance(own, DictConfig) else None
    if not isinstance(bases, ListConfig | None) or not all(isinstance(base, str) for base in bases or ()):
        raise ConfigError(f"base={bases!r} of {path} is not allowed: it must be a list of YAML files. Write [{bases}].")
    for base in bases or ():
        file = path.parent / base
        if not file.is_file():
            raise ConfigError(f"base={base!r} of {path} is not a file: there is no {file}. Paths start at that folder.")
        yield from _with_bases(file, (*readers, here))
    yield own


def refuse_resolvers(tree: DictConfig | ListConfig, where: str) -> None:
    """A resolver such as `${oc.env:NAME}` would put a secret of the environment into config.yaml and the report; a
    reference to another key, `${model.hf_dir}`, is only that.

    Raises:
        ConfigError: `where` has one.
    """
    found = _RESOLVER.search(OmegaConf.to_yaml(tree))
    if found:
        raise ConfigError(
            f"{where} has {found[0]}...}}: resolvers are not allowed, as what they give would stand in config.yaml. "
            "Write the value; keys and passwords are read from the environment by whoever needs them."
        )


def _reason(error: OmegaConfBaseException) -> str:
    """The error in our words where it is a value outside a closed set, else in OmegaConf's."""
    text = str(error).splitlines()[0]
    outside = _OUTSIDE.fullmatch(text)
    if outside is None or error.full_key is None:
        return f"{error.full_key or 'configuration'}: {text}. {_known_keys(error)}"
    allowed = ", ".join(name.strip("'") for name in outside["allowed"].split(", "))
    return (
        f"{error.full_key}={outside['got']!r} is not allowed: it must be one of {allowed}. Set {error.full_key} to one "
        "of them."
    )


def _known_keys(error: OmegaConfBaseException) -> str:
    kind = error.object_type
    if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__"):
        return "Known keys here: " + ", ".join(f.name for f in fields(kind)) + "."
    return "Correct the value in the YAML file or in the override."


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
