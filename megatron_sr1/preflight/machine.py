"""Rows about the machines, from what all ranks have measured; they are made on the main rank."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_sr1.config import Config, saved_steps
from megatron_sr1.estimate import checkpoint_bytes, export_bytes
from megatron_sr1.policy.parameter_counts import StageCount
from megatron_sr1.preflight.facts import SHARED_MEMORY, RankFacts
from megatron_sr1.preflight.rows import Row
from megatron_sr1.preflight.versions import shown_versions

MIB = 2**20
LARGEST_SKEW = 1.0  # seconds between clocks, beyond which logs and files of several machines tell no order
# sockets and files that a rank opens beyond those it has, below which it fails, or is warned: a number, and so many for
# each rank. A collective group may hold a socket for each of its ranks, and several groups are of all ranks.
LEAST_FILES, ENOUGH_FILES = (128, 1), (256, 8)
# shared memory of a rank, in bytes: to fail, and to warn. Collectives of cards and the ranks of an engine pass buffers
# there; a container that was given none has 64 MiB in all.
LEAST_SHARED, ENOUGH_SHARED = 32 * MIB, 128 * MIB
OTHERS_OF_CARD = 4 * 2**30  # bytes that a rank's own context and buffers may be taken for
PROBE_BYTES = 32 * MIB  # that are written to learn how fast that is
LONG_WRITE = 600.0  # seconds
_SHOWN = 3  # of a kind, in a row


def fact_rows(facts: Sequence[RankFacts], config: Config) -> list[Row]:
    """Of what every rank has measured.

    Args:
        facts: of all ranks, in order.
    """
    on_cpu = all(fact.card_total == 0 for fact in facts)
    rows = [_versions(facts), _clocks(facts), _open_files(facts)]
    rows.append(_shared_memory(facts, config, on_cpu=on_cpu))
    rows.append(_ports(facts))
    return rows if on_cpu else [*rows, _other_users(facts)]


def _versions(facts: Sequence[RankFacts]) -> Row:
    by_line: dict[str, str] = {}
    for fact in facts:
        for line in fact.versions:
            by_line.setdefault(line, fact.host)
    if not by_line:
        return Row("versions", "pass", shown_versions())
    found = _some(f"{line} on {host}" for line, host in by_line.items())
    return Row("versions", "warn", found, "The tested versions are those of the extras cpu and gpu: make setup.")


def _clocks(facts: Sequence[RankFacts]) -> Row:
    first = min(facts, key=lambda fact: fact.clock)
    last = max(facts, key=lambda fact: fact.clock)
    skew = last.clock - first.clock
    if skew <= LARGEST_SKEW:
        return Row("clocks", "pass", f"{len(facts)} ranks within {skew:.2f} s")
    found = f"{last.host} is {skew:.1f} s ahead of {first.host}"
    return Row("clocks", "warn", found, "Logs of several machines will not be in order: set them by NTP.")


def _open_files(facts: Sequence[RankFacts]) -> Row:
    limited = [fact for fact in facts if fact.most_files >= 0]
    if not limited:
        return Row("open files", "pass", "no limit")
    tightest = min(limited, key=lambda fact: fact.most_files - fact.open_files)
    room = tightest.most_files - tightest.open_files
    found = f"{tightest.open_files} of at most {tightest.most_files} are open on rank {tightest.rank}"
    least, enough = (number + each * len(facts) for number, each in (LEAST_FILES, ENOUGH_FILES))
    if room >= enough:
        return Row("open files", "pass", found)
    remedy = f"A rank needs about {enough} more: ulimit -n 65536 before the command, or LimitNOFILE of the service."
    return Row("open files", "fail" if room < least else "warn", found, remedy)


def _shared_memory(facts: Sequence[RankFacts], config: Config, *, on_cpu: bool) -> Row:
    name = "shared memory"
    ranks = Counter(fact.host for fact in facts)
    known = [fact for fact in facts if fact.shared_total >= 0]
    if not known:
        return Row(name, "pass", f"this system has no {SHARED_MEMORY}")
    tightest = min(known, key=lambda fact: fact.shared_free / ranks[fact.host])
    sharing = ranks[tightest.host]
    found = f"{tightest.shared_free / MIB:.0f} of {tightest.shared_total / MIB:.0f} MiB free for {sharing} ranks"
    if sharing == 1 or (on_cpu and config.rollout.engine_tensor == 1):
        return Row(name, "pass", f"{found}, which use none")
    if tightest.shared_free >= ENOUGH_SHARED * sharing:
        return Row(name, "pass", found)
    verdict = "fail" if tightest.shared_free < LEAST_SHARED * sharing else "warn"
    remedy = f"{SHARED_MEMORY} of {tightest.host} should have 8 GiB: docker run --shm-size=8g, or --ipc=host."
    return Row(name, verdict, found, remedy)


def _ports(facts: Sequence[RankFacts]) -> Row:
    refused = list(dict.fromkeys(line for fact in facts for line in fact.unreachable))
    if not refused:
        return Row("ports", "pass", f"all that {len(facts)} ranks connect to answer")
    remedy = "Open the ports between the machines, or name their interface: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME."
    if all("endpoint" in line for line in refused):
        remedy = "Start the endpoint, or correct rewards.judge.url."
    return Row("ports", "fail", f"no answer from {_some(refused)}", remedy)


def _other_users(facts: Sequence[RankFacts]) -> Row:
    most = max(facts, key=lambda fact: fact.card_others)
    found = f"at most {most.card_others / 2**30:.1f} of {most.card_total / 2**30:.0f} GiB are not this run's"
    if most.card_others <= OTHERS_OF_CARD:
        return Row("other users", "pass", found)
    return Row("other users", "warn", f"{found}, on {most.host}", "End the processes that hold them: nvidia-smi.")


def _some(lines: Iterable[str]) -> str:
    found = list(lines)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more


# ---------------------------------------------------------------- the disk
def disk_rows(
    config: Config, counts: Sequence[StageCount], written: Sequence[tuple[float, str]], num_steps: int
) -> list[Row]:
    """Room for checkpoints and export in the run folder's file system, and how long one takes.

    Args:
        counts: of a rank of every pipeline stage.
        written: of each machine, see `write_speed`.
        num_steps: of the whole run.
    """
    folder, train = Path(config.run_dir), config.train
    each, export = checkpoint_bytes(counts, config), export_bytes(counts, config)
    free = free_bytes(nearest(folder))
    there = len(saved_steps(folder / "checkpoints"))
    # the newest is whole before the oldest goes
    further = max(1, train.keep_checkpoints + 1 - there)
    further += num_steps // train.keep_every if train.keep_every else 0
    needed = further * each + export
    found = f"{_size(free)} free; a checkpoint takes about {_size(each)}, all that stay and the export {_size(needed)}"
    remedy = "Make room, lower train.keep_checkpoints, or choose another run_dir."
    # where checkpoints are, the oldest make room for the next
    verdict = "fail" if free < each + export and not there else "warn" if free < needed else "pass"
    return [Row("disk space", verdict, found, "" if verdict == "pass" else remedy), _speed_row(each, written)]


def _speed_row(each: int, written: Sequence[tuple[float, str]]) -> Row:
    wrong = [text for _, text in written if text]
    if wrong:
        return Row("write speed", "fail", _some(wrong), "Choose a run_dir that every rank can write to.")
    speed = sum(found for found, _ in written)
    found = f"{_size(speed)} a second from {len(written)} machines, {each / speed:.1f} s a checkpoint"
    if each / speed <= LONG_WRITE:
        return Row("write speed", "pass", found)
    return Row("write speed", "warn", found, "Raise train.save_every, or choose a faster disk for run_dir.")


def nearest(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def free_bytes(folder: Path) -> int:
    """That this user may still write in its file system."""
    return shutil.disk_usage(folder).free


def write_speed(run_dir: str) -> tuple[float, str]:
    """Bytes a second of a small file in that folder's file system, which is gone again, with what it takes to be on
    disk; or why it could not be written."""
    place = nearest(Path(run_dir))
    block = os.urandom(MIB)  # some file systems do not write what is all alike
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            start = time.perf_counter()
            for _ in range(PROBE_BYTES // MIB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return PROBE_BYTES / (time.perf_counter() - start), ""
    except OSError as error:
        return 0.0, f"{place}: {error.strerror or error}"


def _size(number: float) -> str:
    """Bytes, for a person."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"
