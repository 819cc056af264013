"""Real scans of handwritten digits, split without overlap, and set side by side in one picture.

Source: `sklearn.datasets.load_digits`, 1,797 scans of 8 x 8 pixels with 17 grey levels (the UCI "Optical Recognition
of Handwritten Digits" test set). A cell is 28 x 28 pixels: with patches of 14 pixels, merged 2 x 2, a cell is exactly
one visual token of the language model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

Split = Literal["train", "heldout"]
SPLITS: tuple[str, ...] = get_args(Split)
CELL_PIXELS = 28
SCAN_LEVELS = 16  # a scan's pixel is 0 (background) ... 16 (stroke)
HELDOUT_FRACTION = 0.2
SPLIT_SEED = 0  # fixed: a scan held out in one run is held out in all of them
# Light on dark: after the processor's normalisation the mean pixel is near 0, from which a small model learns faster
BOARD_LEVEL, CHALK_LEVEL = 48, 255


@cache
def load_scans(split: Split) -> Mapping[int, np.ndarray]:
    """Returns {digit: scans [n, 8, 8] float, 0 background ... 16 stroke}.

    Each digit's scans are split 80 / 20 by their index, once for all.

    Raises:
        ValueError: the split's name is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not allowed: it must be one of {', '.join(SPLITS)}.")
    from sklearn.datasets import load_digits

    dataset: Any = load_digits()  # its stub also knows the pair of arrays that another argument asks for
    images, targets = dataset.images, dataset.target
    return {digit: images[_split_indices(targets, digit)[split]] for digit in range(10)}


def _split_indices(targets: np.ndarray, digit: int) -> dict[str, np.ndarray]:
    """Indices into the whole data set of one digit's scans, by split, disjoint and sorted."""
    shuffled = np.random.default_rng([SPLIT_SEED, digit]).permutation(np.flatnonzero(targets == digit))
    num_heldout = round(len(shuffled) * HELDOUT_FRACTION)
    return {"heldout": np.sort(shuffled[:num_heldout]), "train": np.sort(shuffled[num_heldout:])}


def compose(scans: Sequence[np.ndarray]) -> Image.Image:
    """Draws `scans` (each [8, 8]) from left to right, light on dark: an RGB image of 28 x 28 pixels a scan.

    Raises:
        ValueError: no scan, or a scan that is not 8 x 8.
    """
    if not scans:
        raise ValueError("compose got no scans: give at least one 8 x 8 array.")
    cells = [_draw_cell(np.asarray(scan)) for scan in scans]
    return Image.fromarray(np.concatenate(cells, axis=1)).convert("RGB")


def _draw_cell(scan: np.ndarray) -> np.ndarray:
    """One scan -> [28, 28] uint8 grey levels."""
    if scan.shape != (8, 8):
        raise ValueError(f"a scan has the shape {scan.shape}; it must be (8, 8).")
    levels = BOARD_LEVEL + (CHALK_LEVEL - BOARD_LEVEL) * scan / SCAN_LEVELS
    small = Image.fromarray(levels.round().astype(np.uint8))
    return np.asarray(small.resize((CELL_PIXELS, CELL_PIXELS), Image.Resampling.BICUBIC))
