"""The members of a tar by the sample they belong to: one pass over its headers, wherever the members stand.

Names follow WebDataset: a key is a member's path up to the first dot of its last part. Otherwise than there

    - the members of a key need not stand next to each other (`tar cf x.tar *.json *.png`);
    - a json without images is no sample where images of nearly its name, `images/7.png` of `json/7.json`, have none;
    - an archive behind the end of another one is read too (`cat a.tar b.tar`);
    - keys with dots of their own, `val.0001.json` beside `val.0001.png`, are told apart where each has its json;
      in the key the dot becomes `_`, because no other reader could tell the samples apart.

What cannot be told apart, and a member that occurs twice, is named and never guessed.
"""

from __future__ import annotations

import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from megatron_sr1.data.schema import JSON_EXTENSION

_MEMBER_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
# what tarfile raises on damaged or hostile headers: numbers too large to seek to, endless chains of extended headers
_TAR_ERRORS = (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError)
_END_NUMBER = re.compile(r"[_-]\d+$")
_READ_BYTES = 1 << 20
_MAX_NAME = 4096  # characters of a member's path, as on a disk
_MAX_MEMBERS = 4096  # of a key: a sample is read as a whole


class Member(NamedTuple):
    """One file of a tar."""

    extension: str  # what follows the key and a dot
    offset: int  # of its data, bytes from the beginning of the tar
    size: int  # bytes


@dataclass(slots=True)
class TarGroup:
    """All members of one key."""

    key: str
    members: list[Member] = field(default_factory=list)
    problem: str = ""  # the first one that any reader must name
    dotted: bool = False  # the key had dots


@dataclass(frozen=True)
class TarContents:
    """What a pass over the headers finds."""

    groups: list[TarGroup]  # in the order of their first members
    damage: str = ""  # why the tar could be read only in part, or not at all
    damaged_key: str = ""  # of the last group, which may have had more members


def read_groups(path: Path) -> TarContents:
    """Groups the members of a tar.

    Where the tar is damaged, what may lack members that stood behind the damage is left out: the last group, and every
    one where members do not stand next to each other.
    """
    groups: dict[str, TarGroup] = {}
    last, is_sorted, damage = "", True, ""
    try:
        for key, member, problem in _members(path):
            is_sorted = is_sorted and (key == last or key not in groups)
            group, last = groups.setdefault(key, TarGroup(key)), key
            if len(group.members) < _MAX_MEMBERS:
                group.members.append(member)
            else:
                problem = f"{path}, sample {key[:80]!r}: it has over {_MAX_MEMBERS} members. Give each sample a key."
            group.problem = group.problem or problem
    except _TAR_ERRORS as error:
        damage = (
            f"{path}: cannot be read as an uncompressed tar ({error}). It is missing, compressed, truncated or "
            "damaged: write it again."
        )
        groups.pop(last, None)
        if not is_sorted:
            groups.clear()
            damage += " Its members stand in no order, so that of all samples some may be missing: none is used."
    found = [part for group in groups.values() for part in _told_apart(path, group)]
    lonely = lonely_images(found)
    for group in found:
        group.problem = group.problem or _repetition(path, group) or torn_problem(path, group, lonely)
    return TarContents(found, damage, last if damage else "")


def _members(path: Path) -> Iterator[tuple[str, Member, str]]:
    """Yields (key, member, what is wrong or "") of every file with a key, of all archives in the file.

    Raises:
        one of _TAR_ERRORS: an archive is damaged, or not complete.
    """
    with open(path, "rb") as file:
        start: int | None = 0
        while start is not None:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                yield from _members_of(path, archive)
                end = archive.offset
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                # tarfile takes a cut or damaged header for the end; the real end is a block of zeros (POSIX ustar)
                behind = f"what follows the end of an archive at byte {start} is none" if start and start == end else ""
                raise tarfile.ReadError(behind or f"it ends without its end mark after byte {end}")
            start = _next_archive(file)


def _members_of(path: Path, archive: tarfile.TarFile) -> Iterator[tuple[str, Member, str]]:
    last = -1
    while (member := archive.next()) is not None:
        archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # or it would keep every header
        if member.size < 0 or archive.offset <= last:  # tarfile would go round in a circle
            raise tarfile.ReadError(f"member {member.name!r} has {member.size} bytes")
        last = archive.offset
        if member.isdir():
            continue
        name, problem = member.name.removeprefix("./"), _member_problem(path, member)
        match = _MEMBER_NAME.fullmatch(name)
        if match is not None:
            yield match[1], Member(sys.intern(match[2]), member.offset_data, member.size), problem
        elif problem:  # without a key, but not to be passed over
            yield name, Member("", member.offset_data, member.size), problem
        # WebDataset passes over names without a key too: ".hidden", "README"


def _next_archive(file: BinaryIO) -> int | None:
    """Where the zeros behind the end of an archive end, in whole blocks; None where nothing else follows."""
    position = file.tell()
    while block := file.read(_READ_BYTES):
        kept = len(block) - len(block.lstrip(b"\0"))
        if kept < len(block):
            return position + kept - kept % tarfile.BLOCKSIZE
        position += len(block)
    return None


def _member_problem(path: Path, member: tarfile.TarInfo) -> str:
    """Nothing is ever extracted, but a key must not point anywhere either."""
    name = member.name.removeprefix("./")
    if len(name) > _MAX_NAME:
        return f"{path}, member {name[:80]!r}...: its name has {len(name)} characters. Rename it."
    if name.startswith("/") or ".." in name.split("/"):
        return f"{path}, member {member.name!r}: an absolute path or '..' is not allowed. Write the shard again."
    if not member.isreg() or member.issparse():
        return f"{path}, member {member.name!r}: it is not a plain file. Store files, not links, in a shard."
    return ""


def _repetition(path: Path, group: TarGroup) -> str:
    repeated, times = Counter(member.extension for member in group.members).most_common(1)[0]
    if times == 1:
        return ""
    return (
        f"{path}, sample {group.key!r}: its member .{repeated} occurs {times} times. Keep one of "
        "them: write the shard again."
    )


def lonely_images(groups: Iterable[TarGroup]) -> dict[str, str]:
    """The groups that have no json: {the end of the key, less a number behind it: the key}. `images/7_0` is `7`."""
    lonely: dict[str, str] = {}
    for group in groups:
        if all(member.extension != JSON_EXTENSION for member in group.members):
            end = group.key.rpartition("/")[2].casefold()
            lonely |= {end: group.key, _END_NUMBER.sub("", end): group.key}
    return lonely


def torn_problem(path: Path, group: TarGroup, lonely: Mapping[str, str]) -> str:
    """What is wrong where a json stands alone, and images of nearly its name without one: it is no question without
    images. "" where it is one.

    Args:
        lonely: see `lonely_images`.
    """
    key = lonely.get(group.key.rpartition("/")[2].casefold())
    if key is None or [member.extension for member in group.members] != [JSON_EXTENSION]:
        return ""
    where = "in another tar" if key == group.key else f"under another key, {key!r}"
    return (
        f"{path}, sample {group.key!r}: its json stands here, its images {where}. Put them into one tar, as "
        f"{group.key}.json and {group.key}.0.png."
    )


def _told_apart(path: Path, group: TarGroup) -> list[TarGroup]:
    """The samples of a group whose members have more dots than one: `0001.json` and `0001.png` of the key `val`."""
    suffix = f".{JSON_EXTENSION}"
    extensions = [member.extension for member in group.members]
    parts = {name.removesuffix(suffix) for name in extensions if name.endswith(suffix)}
    if JSON_EXTENSION in extensions or not parts or group.problem:
        return [group]
    found: dict[str, TarGroup] = {}
    for member in group.members:
        part = _longest_part(member.extension, parts)
        if part is None:
            group.problem = (
                f"{path}, sample {group.key!r}: {len(extensions)} members, {group.key}.{extensions[0]} and others, "
                f"fold into this key, which ends at the first dot, and {group.key}.{member.extension} has no json of "
                "its own name. Name them <key>.json and <key>.<number>.png, with a key that has no dot."
            )
            return [group]
        # the key itself has no dot in its last part
        own = found.setdefault(part, TarGroup(f"{group.key}_{part.replace('.', '_')}", dotted=True))
        own.members.append(Member(member.extension[len(part) + 1 :], member.offset, member.size))
    return list(found.values())


def _longest_part(extension: str, parts: set[str]) -> str | None:
    """The longest of `parts` that the extension begins with, a dot behind it."""
    end = extension.rfind(".")
    while end > 0 and extension[:end] not in parts:
        end = extension.rfind(".", 0, end)
    return extension[:end] if end > 0 else None
