"""What a disk, a copy or a kill does to the files of a run between two starts of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_sr1.config import saved_steps


def _newest(folder: Path) -> Path:
    checkpoints = folder / "checkpoints"
    return checkpoints / f"step_{max(saved_steps(checkpoints)):06d}"


def _large(folder: Path) -> Path:
    return max(_newest(folder).glob("*.distcp"), key=lambda path: path.stat().st_size)


def flip_a_bit(folder: Path, draw: random.Random) -> None:
    path = _large(folder)
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def cut_a_file(folder: Path, draw: random.Random) -> None:
    path = draw.choice(sorted(path for path in _newest(folder).iterdir() if path.is_file()))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_a_file(folder: Path, draw: random.Random) -> None:
    files = sorted(path for path in _newest(folder).iterdir() if path.is_file() and path.name != "checksums.json")
    draw.choice(files).unlink()


def tear_what_is_written(folder: Path, draw: random.Random) -> None:
    """A line of metrics, a line of an evaluation and the rollouts of a step that a kill has cut short."""
    rollouts = folder / "rollouts"
    rollouts.mkdir(parents=True, exist_ok=True)
    (rollouts / "step_000099.0-of-2.jsonl.gz.tmp").write_bytes(b"\x1f\x8b\x08 half")
    for path in (*folder.glob("metrics.jsonl"), *(folder / "eval" / "parts").rglob("*.jsonl")):
        with path.open("a") as file:
            file.write('{"step": 99, "index": 1, "rec')


def leave_a_lock(folder: Path, draw: random.Random) -> None:
    """Of a process that is gone, as on a file system without flock, and half of a checkpoint."""
    folder.mkdir(exist_ok=True)
    (folder / ".lock.owner").write_text("elsewhere 1\n")
    (folder / "checkpoints" / "step_000099.partial-00000000").mkdir(parents=True, exist_ok=True)


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "a bit of the newest checkpoint is flipped": flip_a_bit,
    "a file of the newest checkpoint is cut in half": cut_a_file,
    "a file of the newest checkpoint is lost": lose_a_file,
    "a line of metrics, of an evaluation and rollouts are torn": tear_what_is_written,
    "a lock and half of a checkpoint are left behind": leave_a_lock,
}
_NEEDS_TWO = (flip_a_bit, cut_a_file, lose_a_file)  # checkpoints: with one, the run says that it cannot go on


def possible(folder: Path) -> Sequence[str]:
    """The names of what can be done to a folder that its run survives."""
    count = len(saved_steps(folder / "checkpoints"))
    return [name for name, does in DAMAGES.items() if does not in _NEEDS_TWO or count > 1]
