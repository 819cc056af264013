"""Rows about samples, and about what engine and processor make of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_sr1.preflight.rows import Row, not_checked
from megatron_sr1.prompts import Templates
from megatron_sr1.ranks import Ranks
from megatron_sr1.types import SftSample


def samples_row(number: int, bad: Sequence[str]) -> Row:
    """
    Args:
        number: of samples that can be used.
        bad: why others cannot.
    """
    if not number:
        return Row("samples", "fail", f"none of {len(bad)} can be used, first {bad[0]}" if bad else "there are none")
    if not bad:
        return Row("samples", "pass", f"the next {number} can be used")
    return Row("samples", "warn", f"{len(bad)} of the next {number + len(bad)} cannot be used, first {bad[0]}")


def canary_row(complaints: Sequence[str]) -> Row:
    """`complaints`: of all engines, see `canary_complaints`."""
    if not complaints:
        return Row("weights and sleep", "pass", "engines look through new weights, and wake as they fell asleep")
    return Row("weights and sleep", "fail", "; ".join(sorted(set(complaints))))


def pixels_row(number: int, differences: Sequence[str]) -> Row:
    """Of `number` prompts, see `pixel_differences`."""
    if not differences:
        return Row("pixels and ids", "pass", f"engine and processor agree about {number} prompts")
    more = f" ({len(differences) - 1} images more differ.)" if len(differences) > 1 else ""
    return Row("pixels and ids", "fail", f"{differences[0]}{more}")


def demonstrations_row(number: int, own: Mapping[int, SftSample], templates: Templates, ranks: Ranks) -> Row:
    """Whether responses have the layout that they are to teach. Collective.

    Args:
        number: of all samples.
        own: this rank's, by their places among all; others may have them, too.
    """
    broken = [
        (place, one.prompt.key)
        for place, one in own.items()
        if templates.of_demonstration(one).parse(one.response) is None
    ]
    keys = [key for _, key in sorted(set(ranks.gather(broken)))]
    if not number:
        return not_checked("layouts", "no sample can be used")
    if not keys:
        return Row("layouts", "pass", f"all of {number} responses keep to the layout of their template")
    found = f"{len(keys)} of {number} responses break the layout of their template, first that of sample {keys[0]!r}"
    return Row("layouts", "fail" if len(keys) == number else "warn", found, "Correct the responses, or the template.")
