"""What two objectives credit, as tables of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import Console

from megatron_sr1.printable import printable
from megatron_sr1.report.credit.numbers import Comparison, CreditReport, Shift, Side, Signs
from megatron_sr1.report.text_table import TextTable, print_text_table

PRINTED = 8  # samples in the terminal
SIDES = ("A", "B")


def credit_tables(report: CreditReport) -> list[TextTable]:
    """All but the samples; without empty ones."""
    sides = list(zip(SIDES, report.sides, strict=True))
    tables = [
        _streams(report),
        _agreement(report.comparison),
        _regions(report),
        TextTable(
            "pairs",
            "Advantages of a sample in two streams; % of the samples. Only first: 0 in the second, neither: 0 in both",
            ("", "same sign", "opposite", "only first", "only second", "neither", "samples"),
            tuple(line for letter, side in sides for line in _pairs(letter, side)),
        ),
        TextTable(
            "switches",
            "What the leak filter does to the credit, and leaving out the std (centred for z_score); % of samples and "
            "tokens. Mass: the sum of |credit|, without and with it; moved: the % of it that lies on other tokens",
            ("", "here", "of", "change sign", "become 0", "leave 0", "mass", "moved"),
            tuple(line for letter, side in sides for line in _switches(letter, side)),
        ),
    ]
    return [table for table in tables if table.lines]


def samples_table(report: CreditReport) -> TextTable:
    """The samples of the largest change."""
    lines = tuple(
        (
            f"{one.key} #{one.sample}",
            number(one.change),
            signed(one.credits[0]),
            signed(one.credits[1]),
            *(values(side) for side in one.advantages),
        )
        for one in report.samples
    )
    head = ("", "change", "credit A", "credit B", "advantages A", "advantages B")
    return TextTable("samples", "Samples, the largest change first", head, lines)


def summary_lines(report: CreditReport) -> list[str]:
    """What of which step is told, and what a reader must know beside the tables."""
    trained = report.num_trained * report.num_samples
    found = [
        f"A: {report.sides[0].label}",
        f"B: {report.sides[1].label}",
        f"step {report.step} of {report.run}: {report.num_drawn} prompts drawn, {report.num_graded} graded, "
        f"{report.num_trained} trained x {report.num_samples} samples = {trained} samples, {report.num_tokens} tokens",
        "the credit of a token is the sum over streams of loss_weight x advantage x token weight: what multiplies "
        "d log p before any weight has moved; a KL term or entropy bonus is no part of it",
    ]
    if report.skipped:
        first = next(iter(report.skipped.values()))
        found.append(f"skipped: {len(report.skipped)} groups that could not be graded, the first because {first}")
    return [*found, *report.notes]


def print_credit(console: Console, report: CreditReport) -> None:
    """Prints the tables and the first samples."""
    for line in summary_lines(report):
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
    console.print()
    samples = samples_table(report)
    first = TextTable(samples.key, samples.title, samples.head, samples.lines[:PRINTED])
    for table in [*credit_tables(report), *([first] if first.lines else [])]:
        print_text_table(console, table)


def number(value: float) -> str:
    """With three digits."""
    return f"{value:.3g}"


def signed(value: float) -> str:
    """The same with its sign; 0 has none."""
    return f"{value:+.3g}" if value else "0"


def values(by_name: Mapping[str, float]) -> str:
    """Numbers by name, in one line."""
    return ", ".join(f"{name} {signed(value)}" for name, value in by_name.items())


def _share(count: int, total: int) -> str:
    return f"{100 * count / total:.1f}" if total else "–"


def _streams(report: CreditReport) -> TextTable:
    def dead(count: int) -> str:
        return f"{count} ({_share(count, report.num_graded)} %)"

    lines: list[tuple[str, ...]] = []
    for letter, side in zip(SIDES, report.sides, strict=True):
        for stream in side.streams:
            where = f"{stream.pass_name}: {stream.tokens}"
            what = (where, stream.rewards, f"{stream.loss_weight:g}", stream.how, dead(stream.dead))
            lines.append((f"{letter} {stream.name}", *what))
        lines.append((f"{letter} all together", "", "", "", "", dead(side.dead)))
    title = (
        f"Streams; a group is dead to one where every advantage is 0: so many of the {report.num_graded} that were "
        "drawn and graded"
    )
    return TextTable("streams", title, ("", "tokens", "rewards", "weight", "how", "dead"), tuple(lines))


def _agreement(comparison: Comparison) -> TextTable:
    head = ("", "same sign", "opposite", "only A", "only B", "neither", "more in B", "less in B")
    rows = (("samples", comparison.samples), ("tokens", comparison.tokens))
    lines = tuple((f"{shift.signs.total} {name}", *_signs(shift.signs), *_moves(shift)) for name, shift in rows)
    first, second = comparison.masses
    title = (
        "Credit under A and B; % of samples and tokens. Only A: 0 under B, neither: 0 under both. Mass, the sum of "
        f"|credit|: A {number(first)}, B {number(second)}; with both taken for 1, {100 * comparison.moved:.1f} % of it "
        "lies on other tokens"
    )
    return TextTable("agreement", title, head, lines)


def _signs(signs: Signs) -> tuple[str, ...]:
    counts = (signs.same, signs.opposite, signs.only_first, signs.only_second, signs.neither)
    return tuple(_share(count, signs.total) for count in counts)


def _moves(shift: Shift) -> tuple[str, str]:
    return _share(shift.gained, shift.signs.total), _share(shift.lost, shift.signs.total)


def _regions(report: CreditReport) -> TextTable:
    lines = []
    for region in report.regions:
        shares = [_percent(mass, whole) for mass, whole in zip(region.masses, report.comparison.masses, strict=True)]
        moves = (_share(region.gained, region.num_tokens), _share(region.lost, region.num_tokens))
        lines.append((f"{region.pass_name}: {region.segment}", str(region.num_tokens), *shares, *moves))
    head = ("", "tokens", "mass A", "mass B", "more in B", "less in B")
    return TextTable("regions", "Where the credit lies; mass in % of its objective's", head, tuple(lines))


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}" if whole else "–"


def _pairs(letter: str, side: Side) -> Iterator[tuple[str, ...]]:
    for pair in side.pairs:
        signs = pair.advantages
        counts = (signs.same, signs.opposite, signs.only_second, signs.only_first, signs.neither)
        shares = tuple(_share(count, signs.total) for count in counts)
        yield (f"{letter} {pair.names[0]}, {pair.names[1]}", *shares, str(signs.total))


def _switches(letter: str, side: Side) -> Iterator[tuple[str, ...]]:
    for switch in side.switches:
        effect = switch.effect
        masses = (" → ".join(map(number, effect.masses)), f"{100 * effect.moved:.1f}")
        for what, shift in (("samples", effect.samples), ("tokens", effect.tokens)):
            signs = shift.signs
            counts = tuple(_share(n, signs.total) for n in (signs.opposite, signs.only_first, signs.only_second))
            own = what == "samples"
            label = f"{letter} {switch.name}" if own else ""
            yield (label, switch.here if own else "", what, *counts, *(masses if own else ("", "")))
