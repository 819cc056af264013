"""The memory of linear_logprob on the CPU: the formula of chunked.py against what torch's allocator hands out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.autograd.profiler import profile

from megatron_sr1.kernels import linear_logprob
from megatron_sr1.kernels.linear_logprob import chunked

MIB = 2**20
SHAPES = [(4096, 256, 16384), (16384, 128, 4096), (2048, 128, 40000)]  # T, H, V
SCALED = 4  # the sides of the first, which takes the longest, and of its tiles, are so much shorter: 64 times less work


def formula(tokens: int, hidden: int, vocab: int, itemsize: int, entropy: bool, backward: bool) -> int:
    """Bytes beyond the inputs; the accumulation dtype has 4. Vectors of [T] are left to the test's slack."""
    columns = min(vocab, chunked.MAX_TILE_COLUMNS)
    rows = min(tokens, max(chunked.MIN_TILE_ROWS, chunked.TILE_ELEMENTS_CPU // columns))
    casts = 4 * (rows + columns) * hidden if itemsize < 4 else 0
    forward = 4 * rows * columns * (4 if entropy else 2) + casts
    if not backward:
        return forward
    kept = 4 * chunked.KEPT_ELEMENTS
    gradients = (tokens + vocab) * hidden * itemsize
    accumulators = 4 * (tokens + columns) * hidden
    return kept + max(forward, gradients + accumulators + 2 * 4 * rows * columns + casts)


def peak(action: Callable[[], object]) -> int:
    """The most bytes that were allocated at once while the action ran, over those before it."""
    with profile(profile_memory=True) as record:
        action()
    events = [event for event in record.kineto_results.events() if event.name() == "[memory]"]
    assert events, "the allocator reported nothing"
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def test_the_meter_reads_a_known_peak() -> None:
    measured = peak(lambda: torch.zeros(3 * MIB, dtype=torch.uint8) + 1)
    assert 6 * MIB <= measured < 6.1 * MIB


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_peak_is_what_the_formula_says(
    shape: tuple[int, int, int], dtype: torch.dtype, entropy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shape == SHAPES[0]:
        shape = tuple(side // SCALED for side in shape)
        for name, sides in (
            ("MAX_TILE_COLUMNS", 1),
            ("MIN_TILE_ROWS", 1),
            ("TILE_ELEMENTS_CPU", 2),
            ("KEPT_ELEMENTS", 2),
        ):
            monkeypatch.setattr(chunked, name, getattr(chunked, name) // SCALED**sides)
    tokens, hidden_size, vocab = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, hidden_size, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    logits, slack = 4 * tokens * vocab, 32 * 4 * tokens

    def score() -> torch.Tensor:
        result = linear_logprob(hidden, weight, targets, entropy=entropy, temperature=0.8)
        return result.logprobs if result.entropy is None else result.logprobs + result.entropy

    with torch.no_grad():
        forward = peak(score)
    both = peak(lambda: score().sum().backward())
    for measured, backward in ((forward, False), (both, True)):
        expected = formula(*shape, dtype.itemsize, entropy, backward)
        told = f"backward={backward}: {measured / MIB:.1f} of {expected / MIB:.1f} MiB"
        assert 0.7 * expected <= measured <= expected + slack, told
        assert measured < logits / 2, f"{told}, logits would take {logits / MIB:.0f} MiB"
