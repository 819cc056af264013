"""YAML files and key=value overrides in, YAML out.

A file may name others under `base`, relative to itself: they are read first, in order, and what comes later wins.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_sr1.config.credentials import URL_KEYS, without_credentials
from megatron_sr1.config.declared import as_declared
from megatron_sr1.config.paths import home_path
from megatron_sr1.config.rules import ConfigError
from megatron_sr1.config.whole import Config
from megatron_sr1.config.yaml_files import read_mapping, read_overrides

_REFERENCE = re.compile(r"(?<!\\)\$\{ *[\w.\[\]-]+ *\}")  # ${model.hf_dir}, and nothing that has another inside
_SHOWN = 40  # characters of a resolver that a complaint repeats
_OUTSIDE = re.compile(r"Invalid value '(?P<got>.*)', expected one of \[(?P<allowed>.*)\]")  # of a Literal


def load_config(
    path: str | Path | None, overrides: list[str], defaults: Sequence[str] = (), objective: Path | None = None
) -> Config:
    """Reads YAML with its bases, applies `key=value` overrides, validates.

    A text or a number stands for a list of one where a list belongs; a `~` that begins a path is the user's folder.

    Args:
        defaults: `key=value` that count where neither file nor overrides name the key.
        objective: a further file, whose section `objective` counts over that of `path`, and nothing else of it.

    Raises:
        ConfigError: no YAML, unknown key, wrong type, a value out of range, or values that do not fit together; a base
            that is missing or leads back to its own file; no section `objective` where it is all that counts.
    """
    words = read_overrides(overrides)
    refuse_resolvers(words, "an override")
    tree = OmegaConf.merge(_schema(), read_overrides(defaults))
    assert isinstance(tree, DictConfig), type(tree)
    given = [words]
    if path is not None:
        if not Path(path).is_file():
            raise ConfigError(f"CONFIG={str(path)!r} is not a file. Give the path of a YAML configuration.")
        for file, part in _with_bases(Path(path), ()):
            tree = _merged(tree, part, f"{file}: ")
            given.append(part)
    if objective is not None:
        parts = [(file, part["objective"]) for file, part in _with_bases(objective, ()) if part.get("objective")]
        if not parts:
            raise ConfigError(f"{objective} has no section objective, and nothing else of it counts. Give it one.")
        for file, part in parts:
            tree = _merged(tree, OmegaConf.create({"objective": part}), f"{file}: ")
    tree = _merged(tree, words, "")
    try:
        if tree.train.epochs is not None and not any("steps" in (part.get("train") or {}) for part in given):
            tree = _merged(tree, OmegaConf.create({"train": {"steps": None}}), "")  # its default: for who says nothing
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise ConfigError(_reason(error)) from error
    assert isinstance(config, Config), type(config)
    folders = {name: home_path(f"model.{name}", getattr(config.model, name)) for name in ("hf_dir", "megatron_dir")}
    return replace(config, run_dir=home_path("run_dir", config.run_dir), model=replace(config.model, **folders))


@cache
def _schema() -> DictConfig:
    """Every key with its type and default. To be merged into a copy only; making it takes most of the time of reading a
    configuration."""
    return OmegaConf.structured(Config)


def _merged(tree: DictConfig, part: DictConfig, where: str) -> DictConfig:
    """`part` over `tree`; `where` begins a complaint about it."""
    try:
        merged = OmegaConf.merge(tree, as_declared(Config, OmegaConf.to_container(part), ""))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}{_reason(error)}") from error
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from error
    assert isinstance(merged, DictConfig), type(merged)
    return merged


def _with_bases(path: Path, readers: tuple[Path, ...]) -> Iterator[tuple[Path, DictConfig]]:
    """The contents of the file's bases, of theirs first, and then its own, each with its file.

    Args:
        readers: the files that led to this one, outermost first.
    """
    here = path.resolve()
    if here in readers:
        circle = " -> ".join(str(file) for file in (*readers[readers.index(here) :], here))
        raise ConfigError(f"base: {circle} is a circle. Take one of these files out of another's base.")
    own = read_mapping(path)
    refuse_resolvers(own, str(path))
    bases = own.pop("base", None)
    if not isinstance(bases, ListConfig | None) or not all(isinstance(base, str) for base in bases or ()):
        raise ConfigError(f"base={bases!r} of {path} is not allowed: it must be a list of YAML files. Write [{bases}].")
    for base in bases or ():
        file = path.parent / home_path("base", base)
        if not file.is_file():
            raise ConfigError(f"base={base!r} of {path} is not a file: there is no {file}. Paths start at that folder.")
        yield from _with_bases(file, (*readers, here))
    yield path, own


def refuse_resolvers(tree: DictConfig | ListConfig, where: str) -> None:
    """A resolver such as `${oc.env:NAME}` would put a secret of the environment into config.yaml and the report; a
    reference to another key, `${model.hf_dir}`, is only that. What is built of references, `${${a}:NAME}`, may become a
    resolver, and what is escaped would be one in config.yaml.

    Raises:
        ConfigError: `where` has anything but references.
    """
    waiting: list[Any] = [OmegaConf.to_container(tree)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            waiting += [*node, *node.values()]
        elif isinstance(node, list):
            waiting += node
        elif isinstance(node, str) and "${" in _REFERENCE.sub(" ", node):
            raise ConfigError(
                f"{where} has {node[node.index('${') :][:_SHOWN]!r}: resolvers are not allowed, as what they give "
                "would stand in config.yaml; ${...} may only name another key, as in ${model.hf_dir}. Write the value; "
                "keys and passwords are read from the environment by whoever needs them."
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
    """The resolved configuration as YAML; shard URLs without their credentials."""
    lists = {key.removeprefix("data."): getattr(config.data, key.removeprefix("data.")) for key in URL_KEYS}
    plain = {name: tuple(map(without_credentials, urls)) for name, urls in lists.items()}
    return OmegaConf.to_yaml(OmegaConf.structured(replace(config, data=replace(config.data, **plain))))
