"""Do the files of a checkpoint still hold what was written? Disks, networks and copies flip bits, and Megatron-Core
loads them as other weights.

The CRC-32 of a file is made by the rank that has written it, from its own page cache and beside the run; the ranks that
go on read the files once more together, each every so many of them. Of files in folders beneath, such as the weights in
Hugging Face format, nothing is said.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_sr1.ranks import Ranks

logger = logging.getLogger(__name__)

FILE = "checksums.json"
_PIECE = 1 << 22  # bytes that are read at a time
Checksums = Mapping[str, tuple[int, int]]  # by name: bytes and CRC-32


def checksums_of(files: Iterable[Path]) -> dict[str, tuple[int, int]]:
    """Raises OSError."""
    return {path.name: _checksum(path) for path in files}


def write_checksums(folder: Path, known: Checksums) -> None:
    """Of all files of a folder, reading those alone that are not known yet, to the disk. Raises OSError."""
    others = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in known]
    with (folder / FILE).open("w", encoding="utf-8") as file:
        file.write(json.dumps({**known, **checksums_of(others)}, indent=0, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())


def check_checksums(folder: Path, ranks: Ranks) -> list[str]:
    """What is wrong with the files of a folder, on every rank the same. One without checksums, as earlier releases
    wrote them, is taken for whole, and the main rank says so. Collective."""
    try:
        known = read_checksums(folder)
    except ValueError as error:
        return ranks.gather([str(error)])[:1]
    if not known and ranks.rank == 0:
        logger.warning("%s has no %s: whether its files are what was written is not known", folder, FILE)
    wrong = []
    for name in sorted(known)[ranks.rank :: ranks.num_ranks]:
        try:
            found = _checksum(folder / name)
        except OSError as error:
            wrong.append(f"{folder / name} cannot be read ({error.strerror})")
            continue
        if found != known[name]:
            wrong.append(f"{folder / name} is not what was written: {_compared(found, known[name])}")
    return ranks.gather(wrong)


def read_checksums(folder: Path) -> Checksums:
    """Empty where the folder has none.

    Raises:
        ValueError: they are damaged themselves.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        found = {str(name): (int(size), int(crc)) for name, (size, crc) in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    strange = next((name for name in found if Path(name).name != name), None)
    if strange is not None:
        raise ValueError(f"{path} is damaged (it names {strange!r})")
    return found


def _checksum(path: Path) -> tuple[int, int]:
    size = crc = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return size, crc


def _compared(found: tuple[int, int], known: tuple[int, int]) -> str:
    if found[0] != known[0]:
        return f"{found[0]} bytes in place of {known[0]}"
    return f"CRC-32 {found[1]:08x} in place of {known[1]:08x}"
