"""Samples as plain text: nothing that data hold becomes a command of the terminal, markup or a new page."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sr1.show.read import Found
from megatron_sr1.show.seen import Seen

MAX_LISTED = 20  # bad samples
_BINS = 8
_BAR = 40  # characters of the longest bar


def visible(text: str) -> str:
    """The text with what cannot be seen written out: control characters, marks of direction, halves of characters. Line
    ends stay."""
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def text_of(found: Found) -> str:
    """All of it, for a terminal."""
    blocks = [_sample(seen) for seen in found.seen]
    for title, values in histograms(found):
        rows = [f"  {label:>13} {count:>7} {'█' * bar}" for label, count, bar in bars(values)]
        blocks.append("\n".join([title, *rows]))
    blocks.append(
        "\n".join([summary(found), *(f"  {visible(_one_line(reason))}" for reason in found.bad[:MAX_LISTED])])
    )
    return "\n\n".join(blocks) + "\n"


def summary(found: Found) -> str:
    """How many samples are good, and how many are not."""
    more = "; there are more" if found.is_cut else ""
    listed = f", the first {MAX_LISTED} are listed" if len(found.bad) > MAX_LISTED else ""
    first = f", first sample {visible(found.broken[0])!r}" if found.broken else ""
    broken = f"; {len(found.broken)} responses break the layout of their template{first}" if found.broken else ""
    bad = f"{len(found.bad)} cannot be used{listed}:" if found.bad else "none that cannot be used"
    return f"{found.num_good + len(found.bad)} samples looked at{more}: {found.num_good} good{broken}, {bad}"


def histograms(found: Found) -> list[tuple[str, list[int]]]:
    """Title and values of each that has any."""
    pairs = [
        ("tokens of a prompt, its images among them", found.prompt_tokens),
        ("tokens of a response", found.response_tokens),
        ("visual tokens of an image", found.image_tokens),
    ]
    return [(title, values) for title, values in pairs if values]


def bars(values: Sequence[int]) -> list[tuple[str, int, int]]:
    """Range, number of values, and length of the bar, of equal ranges from the least to the most."""
    low, high = min(values), max(values)
    width = (high - low) // _BINS + 1
    counts = [0] * ((high - low) // width + 1)
    for value in values:
        counts[(value - low) // width] += 1
    ranges = [(low + n * width, min(low + (n + 1) * width - 1, high)) for n in range(len(counts))]
    labels = [f"{first}" if first == last else f"{first} - {last}" for first, last in ranges]
    bars = [-(-_BAR * count // max(counts)) for count in counts]
    return list(zip(labels, counts, bars, strict=True))


def facts(seen: Seen) -> list[str]:
    """Lines about a sample beside its prompt."""
    lines = []
    for number, picture in enumerate(seen.pictures, 1):
        width, height = picture.size
        line = f"image {number}: {width} x {height} pixels"
        if picture.num_tokens is not None:
            line += f", seen as {picture.seen.width} x {picture.seen.height}: {picture.num_tokens} tokens"
        lines.append(line)
    if seen.prompt_tokens is not None:
        lines.append(f"prompt: {seen.prompt_tokens} tokens")
    if seen.response_tokens is not None:
        lines.append(f"response: {seen.response_tokens} tokens")
    return lines


def _sample(seen: Seen) -> str:
    parts = [
        f"--- sample {visible(seen.key)}, asked by {visible(seen.template)}",
        visible(seen.prompt),
        *facts(seen),
        f"answer: {visible(seen.answer)}",
        *([f"choices: {visible(', '.join(seen.choices))}"] if seen.choices else []),
        *([f"response: {visible(seen.response)}"] if seen.response is not None else []),
    ]
    return "\n".join(parts)


def _one_line(text: str) -> str:
    return " ".join(text.split("\n"))
