"""What this rank's device can do, and how much memory it takes."""

from __future__ import annotations

import re

import psutil
import torch

from megatron_sr1.ranks import Exchange

GIB = float(2**30)
# dense operations a second by the names of cards, from NVIDIA's data sheets, in bf16 and FP8. Of what is not here, such
# as a part of a card (MIG), nobody knows, and no utilisation is told
_PEAKS: tuple[tuple[str, float, float | None], ...] = (
    (r"NVIDIA A100\b", 312e12, None),  # SXM and PCIe; it has no FP8
    (r"NVIDIA H100 PCIe\b", 756e12, 1513e12),
    (r"NVIDIA H100 NVL\b", 835e12, 1671e12),
    (r"NVIDIA H100\b", 989e12, 1979e12),  # SXM
    (r"NVIDIA H200 NVL\b", 835e12, 1671e12),
    (r"NVIDIA H200\b", 989e12, 1979e12),
    (r"NVIDIA B200\b", 2250e12, 4500e12),
)


def peak_flops(card: str, dtype: str) -> float | None:
    """Operations a second of a card in a precision; None where it is not known.

    Args:
        card: as the driver calls it, such as "NVIDIA H100 80GB HBM3".
        dtype: of `precision.dtype`.
    """
    if re.search(r"\bMIG\b", card):
        return None
    for name, bf16, fp8 in _PEAKS:
        if re.match(name, card):
            return {"bf16": bf16, "fp8": fp8}.get(dtype)
    return None


def resident_bytes() -> int:
    """Of this process in the memory of its machine."""
    return psutil.Process().memory_info().rss


def start_measuring(device: torch.device) -> None:
    """The peak of the device's memory counts anew from here."""
    if device.type != "cpu":
        torch.cuda.reset_peak_memory_stats(device)


_taken: dict[torch.device, int] = {}  # the highest peak since memory_metrics was asked


def take_peak(device: torch.device) -> int:
    """Bytes since this was asked last; `memory_metrics` still hears of them."""
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    _taken[device] = max(_taken.get(device, 0), peak)
    return peak


def memory_metrics(device: torch.device, ranks: Exchange) -> dict[str, float]:
    """GiB of the rank that has most: `memory/peak_gib` of its device since this was asked last, which a CPU has not,
    and `memory/host_gib` resident now. Collective."""
    peak = 0
    if device.type != "cpu":
        take_peak(device)
        peak = _taken.pop(device)
    own = torch.tensor([[peak, resident_bytes()]], dtype=torch.float64)
    most = ranks.gather_rows(own).max(0).values.tolist()
    found = {"memory/host_gib": most[1] / GIB}
    return found if device.type == "cpu" else {"memory/peak_gib": most[0] / GIB, **found}
