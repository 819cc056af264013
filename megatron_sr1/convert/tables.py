"""The tables that a comparison of two checkpoints ends with."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_sr1.convert.parity import Agreement
from megatron_sr1.convert.verify import Comparison
from megatron_sr1.printable import printable

HASH_LETTERS = 12


def print_tensors(console: Console, found: Sequence[Comparison], only_differences: bool) -> None:
    """A line for each tensor, those that differ in red, and their number."""
    table = Table("tensor", "A", "B", "SHA-256 of A", "SHA-256 of B", "first difference")
    for item in found:
        if item.equal and only_differences:
            continue
        table.add_row(
            Text(printable(item.name)),
            str(item.first or "missing"),
            str(item.second or "missing"),
            *((digest or "-")[:HASH_LETTERS] for digest in (item.first_hash, item.second_hash)),
            Text(_what_differs(item)),
            style=None if item.equal else "red",
        )
    console.print(table)
    console.print(f"{len(found)} tensors, {sum(not item.equal for item in found)} different")


def _what_differs(item: Comparison) -> str:
    if item.equal:
        return ""
    if item.first is None or item.second is None:
        return "only in B" if item.first is None else "only in A"
    if item.difference is None:
        return "type" if item.first.shape == item.second.shape else "shape"
    at = item.difference
    return f"{list(at.index)}: {at.first!r}, {at.second!r}"


def print_agreements(console: Console, agreements: Sequence[Agreement]) -> None:
    """A line for each kind of sample."""
    table = Table("sample", "tokens", "log-prob, abs", "relative", "entropy, abs", "relative")
    for item in agreements:
        apart = (item.logprob_abs, item.logprob_rel, item.entropy_abs, item.entropy_rel)
        table.add_row(Text(printable(item.sample)), str(item.num_tokens), *(f"{value:.3g}" for value in apart))
    console.print(table)
