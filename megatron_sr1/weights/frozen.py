"""Which tensors `model.freeze` keeps as they are: parts of the model, or regular expressions for whole names.

Names are those of the Hugging Face folder, as published. A parameter that is made of several tensors here, queries,
keys and values for one, is frozen with all of them or not at all.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from megatron_sr1.config import FROZEN_PARTS, ConfigError, HfConfig, everything_frozen
from megatron_sr1.weights.name_table import WeightRule, language_rules, vision_rule

MERGERS = ("vision.merger.", "vision.deepstack_merger_list.")
_SHOWN = 3


def frozen_tensors(freeze: Sequence[str], sizes: HfConfig, vision: Iterable[str]) -> frozenset[str]:
    """The tensors that are not trained. Every rank of a layout gets all of the model's.

    Args:
        freeze: entries of FROZEN_PARTS, and regular expressions, each for the whole name of a tensor.
        vision: names of the vision tower's parameters, as its module has them.

    Raises:
        ConfigError: an entry matches no tensor; one matches a part of a parameter, or a weight without its bias; a tied
            head would be frozen without the embedding; nothing is left to train.
    """
    rules = [*language_rules(sizes), *(vision_rule(f"vision.{name}", sizes) for name in vision)]
    by_part: dict[str, set[str]] = {part: set() for part in FROZEN_PARTS}
    for rule in rules:
        by_part[_part(rule)].update(rule.hf)
    if sizes.tied:  # the head is the embedding, and goes with it
        by_part["language"] -= by_part["embeddings"]
    names = set().union(*by_part.values())
    frozen = set().union(*(by_part[entry] if entry in by_part else _matching(entry, names) for entry in freeze))
    for rule in rules:
        _check_whole(rule, frozen)
    _check_biases(rules, frozen)
    if frozen == names:
        raise everything_frozen(freeze)
    return frozenset(frozen)


def has_trained_language(frozen: frozenset[str], sizes: HfConfig) -> bool:
    """Whether a decoder layer, the final norm or the head has a parameter that is trained."""
    return any(_part(rule) == "language" and not frozen.issuperset(rule.hf) for rule in language_rules(sizes))


def _part(rule: WeightRule) -> str:
    if rule.megatron.startswith(MERGERS):
        return "merger"
    if rule.megatron.startswith("vision."):
        return "vision"
    return "embeddings" if rule.megatron.startswith("embedding.") else "language"


def _matching(entry: str, names: set[str]) -> set[str]:
    found = {name for name in names if re.fullmatch(entry, name)}
    if found:
        return found
    # numbers of layers hide what is alike
    plain: Mapping[str, str] = {re.sub(r"\\(?=\W)", "", name): name for name in (*FROZEN_PARTS, *sorted(names))}
    near = difflib.get_close_matches(re.sub(r"\\(?=\W)", "", entry), plain, n=_SHOWN, cutoff=0.4)
    inside = sorted(name for name in names if re.search(entry, name))[:_SHOWN]
    hint = f"It matches inside of {', '.join(inside)}: an entry must match the whole name. " if inside else ""
    raise ConfigError(
        f"model.freeze has the entry {entry!r}, which matches no tensor of the model. {hint}It must be one of "
        f"{', '.join(FROZEN_PARTS)}, or a regular expression for whole names; near ones are "
        f"{', '.join(plain[name] for name in near) or min(names)}."
    )


def _check_whole(rule: WeightRule, frozen: set[str]) -> None:
    kept = [name for name in rule.hf if name in frozen]
    if kept and len(kept) < len(rule.hf):
        trained = [name for name in rule.hf if name not in frozen]
        raise ConfigError(
            f"model.freeze matches {', '.join(kept)} but not {', '.join(trained)}: they are one parameter here, which "
            "is frozen as a whole or trained as a whole. Match all of them or none."
        )


def _check_biases(rules: Sequence[WeightRule], frozen: set[str]) -> None:
    """Megatron-Core's linear layer gives its bias no gradient where its weight has none."""
    named = {rule.megatron: rule for rule in rules if not rule.megatron.startswith("vision.")}
    for name, rule in named.items():
        bias = named.get(f"{name.removesuffix('.weight')}.bias")
        if name.endswith(".weight") and bias is not None and frozen.issuperset(rule.hf) > frozen.issuperset(bias.hf):
            raise ConfigError(
                f"model.freeze matches {', '.join(rule.hf)} but not their biases, {', '.join(bias.hf)}: a bias is "
                "trained only where its weight is. Match both."
            )
