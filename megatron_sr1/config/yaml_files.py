"""YAML that people write, in files and after a key=: a mapping, or one line that says where it is wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_sr1.config.data_suffixes import DATA_SUFFIXES
from megatron_sr1.config.rules import ConfigError

_REMEDY = "Indent with spaces, write each key once, and put a value that has any of {}[]:#*&! in quotes"
_OTHER_BASE = re.compile(r"[-+]?0[\d_xXbBoO][\da-fA-F_]*")
_SHOWN = 80  # characters of an override that a complaint repeats


def read_mapping(path: Path) -> DictConfig:
    """The keys of a YAML file; an empty file has none.

    Raises:
        ConfigError: it cannot be read, is no YAML, names a class to make, or holds something else than `key: value`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        root = yaml.compose(text, Loader=yaml.SafeLoader)  # what omegaconf takes a single value for differs by its type
        if root is None:
            return OmegaConf.create({})
        if not isinstance(root, yaml.MappingNode):
            kind = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
            raise ConfigError(f"{path} holds {kind}. Write lines of `key: value` into it.")
        _refuse_times(root)
        tree = OmegaConf.create(text)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}. Give a YAML file that this user can read.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no UTF-8 text ({error.reason}). Save it as UTF-8.") from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}{_place(error)}: {_reason(error)}. {_REMEDY}.") from error
    assert isinstance(tree, DictConfig), type(tree)
    return tree


def read_overrides(words: Sequence[str], name: str = "override") -> DictConfig:
    """The tree of `key=value` words; a later one wins. Only lists, or shards, of one key in a row are refused: a shell
    makes that of `key=[a-{00..07}.tar]` without quotes, and the last would be one shard of eight.

    Args:
        name: of such a word, in complaints.

    Raises:
        ConfigError: a word without a key or a "=", or whose value is no YAML; lists of one key in a row.
    """
    for key, given in groupby(words, lambda word: word.partition("=")[0]):
        lists = {word: None for word in given if gives_list(word)}
        if len(lists) > 1:
            raise ConfigError(
                f"{name} {key} is given {len(lists)} times in a row, from {next(iter(lists))!r} on. Where a shell made "
                f"that of braces, quote the word: '{key}=[a-{{00..07}}.tar]'. Else give only the one that counts."
            )
    for word in words:
        shown = word if len(word) <= _SHOWN else f"{word[:_SHOWN]}..."
        key, sign, value = word.partition("=")
        if not sign or not key.strip("."):
            example = "for example train.steps=10"
            raise ConfigError(f"{name} {shown!r} is not allowed: it must be key=value, {example}.")
        try:
            _refuse_times(yaml.compose(value, Loader=yaml.SafeLoader))
            OmegaConf.from_dotlist([word])
        except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
            raise ConfigError(
                f"{name} {shown!r}: {_reason(error)}. {_REMEDY}; the shell takes quotes of its own away: "
                "'key=[\"a-{00..07}.tar\"]'."
            ) from error
    try:
        return OmegaConf.from_dotlist(list(words))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(f"{name}s {' '.join(words)[:_SHOWN]!r} contradict each other: {_reason(error)}.") from error


def gives_list(word: str) -> bool:
    """Whether a `key=value` word gives a list, or the path of one file of data."""
    return word.partition("=")[2].startswith("[") or word.endswith(DATA_SUFFIXES)


def _refuse_times(root: yaml.Node | None) -> None:
    """Raises MarkedYAMLError for 12:00:00 and 010 without quotes, which YAML 1.1 takes for the numbers 43200 and 8."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.CollectionNode):
            pairs = isinstance(node, yaml.MappingNode)
            waiting += [part for pair in node.value for part in pair] if pairs else node.value
        elif isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")):
            meant = "of seconds or minutes" if ":" in node.value else "in base 8, 16 or 2"
            if ":" in node.value or _OTHER_BASE.fullmatch(node.value):
                raise yaml.MarkedYAMLError(
                    problem=f"{node.value} without quotes is a number in YAML, {meant}", problem_mark=node.start_mark
                )


def _place(error: Exception) -> str:
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    return "" if mark is None else f", line {mark.line + 1}"


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = error.problem if isinstance(error, yaml.MarkedYAMLError) and error.problem else str(error)
    return " ".join(text.split()).removesuffix(".")
