"""Our kernels against the installed peers: log-probs (benchmarks/logprob.py) and the loss (benchmarks/loss.py)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import logprob, loss
from benchmarks.gpu_check.report import Figure, Report, Table

ON_CARD = (
    logprob.Shape(tokens=4096, hidden=3584, vocab=152064, tp=1, dtype="bfloat16", threads=1),
    logprob.Shape(tokens=16384, hidden=3584, vocab=152064, tp=1, dtype="bfloat16", threads=1),
    logprob.Shape(tokens=16384, hidden=3584, vocab=152064 // 4, tp=4, dtype="bfloat16", threads=1),
)
ON_CPU = (logprob.Shape(tokens=1024, hidden=128, vocab=8192, tp=1, dtype="float32", threads=1),)
LOSS_TOKENS = 16384
OURS = "ours"
LOSS_COLUMNS = ("forward us", "backward us", "both us", "operations", "kept [R]", "peak [R]")


def run(folder: Path) -> Report:
    """Tables; what does not run here is in them with the reason. Wrong: one of ours that should run and has none."""
    on_card = torch.cuda.is_available()
    tables, figures, wrong = [], {}, []
    for shape in ON_CARD if on_card else ON_CPU:
        measured = logprob.measure(shape, repeats=5)
        print(logprob.render(measured), flush=True)
        tables.append(logprob_table(measured))
        figures |= _best(measured)
        wrong += ours_without_numbers(measured)
        if on_card:
            torch.accelerator.empty_cache()
    tables.append(_loss_table("cuda" if on_card else "cpu"))
    return Report(figures, tables, wrong)


def logprob_table(measured: logprob.Table) -> Table:
    """Milliseconds and memory; beside them how many times faster than materialised logits, and the part of the floor
    that is reached."""
    shape, base = measured.shape, measured.rows["logits"]
    rows: list[Sequence[Figure]] = []
    for name, row in measured.rows.items():
        if isinstance(row, str):
            rows.append((name, *[None] * len(logprob.COLUMNS), None, None, row))
            continue
        both = row[3]
        faster = None if isinstance(base, str) else base[3] / both
        rows.append((name, *row, faster, logprob.PRODUCTS[3] * measured.product_ms / both, ""))
    title = f"log-probs: T={shape.tokens} H={shape.hidden} V={shape.vocab} (tp {shape.tp}) {shape.dtype}"
    return Table(title, ("candidate", *logprob.COLUMNS, "times as fast as logits", "of the floor", "why not"), rows)


def ours_without_numbers(measured: logprob.Table) -> list[str]:
    """A line for each of our kernels that should have run; materialised logits may be out of memory, ours may not."""
    return [
        f"{name}: {row}"
        for name, row in measured.rows.items()
        if name.startswith(OURS) and isinstance(row, str) and logprob.CANDIDATES[name].missing() is None
    ]


def _best(measured: logprob.Table) -> dict[str, Figure]:
    """The best of ours and of the others, forward and backward."""
    timed = {name: row[3] for name, row in measured.rows.items() if not isinstance(row, str)}
    best = {}
    for whose, mine in ((OURS, True), ("peers", False)):
        found = {name: ms for name, ms in timed.items() if name.startswith(OURS) == mine and name != "logits"}
        if found:
            name = min(found, key=lambda key: found[key])
            label = f"T={measured.shape.tokens} V={measured.shape.vocab}: best of {whose}, fwd+bwd ms"
            best[label] = f"{found[name]:.2f} ({name})"
    return best


def _loss_table(device: str) -> Table:
    rows = [(name, *row) for name, row in loss.measure(LOSS_TOKENS, device, repeats=20).items()]
    return Table(f"policy loss: {LOSS_TOKENS} tokens, {len(loss.STREAMS)} streams", ("candidate", *LOSS_COLUMNS), rows)
