"""How many tokens are trained, how full packed rows are and how often an image is encoded, on mixes of lengths.

    python -m benchmarks.packing --prompts 32

The mix is one replica's share of an optimizer step: P prompts with one image each, 8 samples a prompt that share it,
and a second pass of text only for 97 % of the samples (the others have no description). In tokens, n(m, s) log-normal
with median m and sigma s of the logarithm:

    image           pixels n(600 000, 0.8), width / height n(1.2, 0.35); held to Vision-SR1's limits, 262 144
                    to 4 194 304 pixels; 28 x 28 make a visual token: about 320 to 5300, median 740
    first pass      template and question 110 + n(60, 0.7); response n(380, 0.55), at most 2048
    second pass     template, question and description 90 + n(60, 0.7) + 0.4 of the first response, 25 of them before
                    the description; response n(240, 0.6), at most 2048

and, as `first passes`, the same without its second passes: what answer-only presets train on, and the harder case, for
text fills any gap; and, as `large images`, the mix with images of 4 megapixels. Sequences are padded to a multiple of 4
(context 2), rows to one of 256, 512 or 2048 (tensor 8 with sequence parallelism, context 2, and the fp8 recipe current,
mxfp8 or blockwise). Rows are:

    shared      megatron_sr1.packing: a prompt is there once for its samples (train.shared_prefix)
    families    the same without: sequences that share images stay together where that leaves rows full
    singles     first-fit decreasing of sequences, images not looked at
    in order    a new row when the next sequence does not fit
    unpacked    a row for each sequence

Columns: rows, and the least there could be (tokens / budget); tokens of the rows' segments over the least there could
be, each prompt once for all its samples; real tokens in % of rows x budget, and in % of the padded rows, which are what
is computed; images encoded for each that there is, and patches likewise.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from megatron_sr1.ahead import Later
from megatron_sr1.packing.bins import Part, fill_rows, sequence_length
from megatron_sr1.types import EncodedImage, Normalisation, TokenSequence

PATCH, MERGE = 14, 2
MIN_PIXELS, MAX_PIXELS, MAX_RESPONSE = 262_144, 4_194_304, 2048
SEQUENCE_MULTIPLE = 4
LAYOUTS = ((8192, 256), (8192, 512), (8192, 2048), (16384, 2048), (32768, 2048))
Rows = list[list[Part]]


# ---------------------------------------------------------------- the mix
def length_mix(num_prompts: int, seed: int, num_samples: int = 8, least_pixels: int = 0) -> list[TokenSequence]:
    """Sequences in the order of a training batch; ids have no meaning but which are the same."""
    draw = random.Random(seed)
    sequences = []
    for group in range(num_prompts):
        image = _image(draw, least_pixels)
        visual = image.grid_thw[1] * image.grid_thw[2] // MERGE**2
        question = _tokens(draw, 60, 0.7, 1000)
        for _ in range(num_samples):
            response = _tokens(draw, 380, 0.55, MAX_RESPONSE)
            sequences.append(TokenSequence(range(visual + 110 + question), range(response), (image,)))
            if draw.random() < 0.97:
                own = 65 + question + int(0.4 * response)
                prompt = [*range(25), *range(1000 * len(sequences), 1000 * len(sequences) + own)]
                answer = range(_tokens(draw, 240, 0.6, MAX_RESPONSE))
                sequences.append(TokenSequence(prompt, answer, group=group))
    return sequences


def _tokens(draw: random.Random, median: float, sigma: float, most: int) -> int:
    return min(most, max(1, round(median * draw.lognormvariate(0.0, sigma))))


def _image(draw: random.Random, least_pixels: int) -> EncodedImage:
    pixels = min(MAX_PIXELS, max(MIN_PIXELS, least_pixels, 600_000 * draw.lognormvariate(0.0, 0.8)))
    aspect = 1.2 * draw.lognormvariate(0.0, 0.35)
    height, width = (pixels / aspect) ** 0.5, (pixels * aspect) ** 0.5
    grid = (1, *(MERGE * int(side / (PATCH * MERGE)) for side in (height, width)))
    return EncodedImage(grid, Later(_never), Normalisation(1.0, (0.0,), (1.0,)))


def _never() -> Tensor:
    raise AssertionError("packing reads no pixel")


# ---------------------------------------------------------------- ways to fill rows
def shared(sequences: Sequence[TokenSequence], max_tokens: int) -> Rows:
    return fill_rows(sequences, max_tokens=max_tokens, sequence_multiple=SEQUENCE_MULTIPLE, share_prefix=True)


def families(sequences: Sequence[TokenSequence], max_tokens: int) -> Rows:
    return fill_rows(sequences, max_tokens=max_tokens, sequence_multiple=SEQUENCE_MULTIPLE)


def singles(sequences: Sequence[TokenSequence], max_tokens: int) -> Rows:
    return families([replace(sequence, images=()) for sequence in sequences], max_tokens)


def in_order(sequences: Sequence[TokenSequence], max_tokens: int) -> Rows:
    rows: Rows = []
    room = 0
    for index, sequence in enumerate(sequences):
        length = rounded(sequence_length(sequence), SEQUENCE_MULTIPLE)
        if length > room:
            rows.append([])
            room = max_tokens
        rows[-1].append(Part(0, (index,)))
        room -= length
    return rows


def unpacked(sequences: Sequence[TokenSequence], max_tokens: int) -> Rows:
    return [[Part(0, (index,))] for index in range(len(sequences))]


WAYS: dict[str, Callable[[Sequence[TokenSequence], int], Rows]] = {
    "shared": shared,
    "families": families,
    "singles": singles,
    "in order": in_order,
    "unpacked": unpacked,
}


# ---------------------------------------------------------------- what they cost
@dataclass(frozen=True)
class Quality:
    num_rows: int
    least_rows: int
    tokens: float  # of the segments / the least there could be
    share_of_budget: float  # real tokens / (rows x budget)
    share_of_rows: float  # real tokens / tokens of the padded rows
    images: float  # encoded / distinct
    patches: float  # encoded / distinct


def rounded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def least_tokens(sequences: Sequence[TokenSequence]) -> int:
    """Of each prompt once for all that have it, and of all responses."""
    prompts = {(id(item.images[0]) if item.images else None, tuple(item.prompt_ids)) for item in sequences}
    return sum(len(ids) for _, ids in prompts) + sum(len(item.response_ids) for item in sequences)


def quality(sequences: Sequence[TokenSequence], rows: Rows, max_tokens: int, row_multiple: int) -> Quality:
    exact = [sequence_length(sequence) for sequence in sequences]
    lengths = [rounded(length, SEQUENCE_MULTIPLE) for length in exact]
    real = sum(part.tokens(exact) for row in rows for part in row)
    filled = [sum(part.tokens(lengths) for part in row) for row in rows]
    padded = sum(rounded(length, row_multiple) for length in filled)
    inside = [[index for part in row for index in part.indices] for row in rows]
    encoded = [{id(image): image for index in row for image in sequences[index].images} for row in inside]
    distinct = {key: image for images in encoded for key, image in images.items()}
    return Quality(
        num_rows=len(rows),
        least_rows=-(-sum(filled) // max_tokens),
        tokens=sum(filled) / least_tokens(sequences),
        share_of_budget=real / (len(rows) * max_tokens),
        share_of_rows=real / padded,
        images=sum(map(len, encoded)) / len(distinct),
        patches=sum(map(_patches, encoded)) / _patches(distinct),
    )


def _patches(images: Mapping[int, EncodedImage]) -> int:
    return sum(math.prod(image.grid_thw) for image in images.values())


def print_table(title: str, sequences: Sequence[TokenSequence]) -> None:
    print(f"\n{title}: {len(sequences)} sequences, {sum(map(sequence_length, sequences))} tokens")
    heads = ("budget", "multiple", "", "rows", "least", "tokens", "of budget", "of rows", "images", "patches")
    print(" ".join(f"{head:>9}" for head in heads))
    for max_tokens, row_multiple in LAYOUTS:
        for name, fill in WAYS.items():
            found = quality(sequences, fill(sequences, max_tokens), max_tokens, row_multiple)
            print(
                f"{max_tokens:9} {row_multiple:9} {name:>9} {found.num_rows:9} {found.least_rows:9} "
                f"{found.tokens:8.3f}x {found.share_of_budget:9.1%} {found.share_of_rows:9.1%} "
                f"{found.images:8.2f}x {found.patches:8.2f}x"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sequences = length_mix(arguments.prompts, arguments.seed)
    print_table("two passes", sequences)
    print_table("first passes", [sequence for sequence in sequences if sequence.images])
    print_table("large images", length_mix(arguments.prompts, arguments.seed, least_pixels=MAX_PIXELS))


if __name__ == "__main__":
    main()
