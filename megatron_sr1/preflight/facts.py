"""What each rank measures of its machine: a few hundred bytes, which go to the main rank."""

from __future__ import annotations

import ipaddress
import resource
import shutil
import socket
import time
import urllib.request
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from megatron_sr1.config import Config
from megatron_sr1.platform import Platform
from megatron_sr1.preflight.versions import differing_versions

SHARED_MEMORY = Path("/dev/shm")  # where there is none, as on macOS, nothing is told of it
CONNECT_SECONDS = 5.0
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class RankFacts:
    """Of one rank, and of the machine that it is on. Bytes and seconds."""

    rank: int
    host: str
    clock: float  # since 1970, right after all ranks met
    open_files: int  # that this process has now
    most_files: int  # that it may have; -1: as many as it likes
    shared_total: int  # of SHARED_MEMORY; -1: there is none
    shared_free: int
    host_total: int  # memory, as far as this job may have it
    host_free: int
    card_total: int  # memory of the accelerator; 0 on a CPU
    card_others: int  # of it, what other processes have taken
    versions: tuple[str, ...]  # that are not what the package asks for
    unreachable: tuple[str, ...]  # ports that should answer, and why they do not


def measure_rank(platform: Platform, config: Config, *, asks_endpoint: bool) -> RankFacts:
    """Of this rank. Collective: the ranks meet, and each connects to the next.

    Args:
        asks_endpoint: rewards or passes ask the endpoint of rewards.judge.
    """
    unreachable = _unreachable(platform, config.rewards.judge.url if asks_endpoint else "")
    shared = shutil.disk_usage(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    host_total, host_free = _host_memory()
    card_total, card_others = platform.card_memory()
    versions = tuple(differing_versions("cpu" if platform.on_cpu else "gpu"))
    platform.ranks.meet()
    return RankFacts(
        rank=platform.rank,
        host=socket.gethostname(),
        clock=time.time(),
        open_files=psutil.Process().num_fds(),
        most_files=-1 if most == resource.RLIM_INFINITY else most,
        shared_total=-1 if shared is None else shared.total,
        shared_free=-1 if shared is None else shared.free,
        host_total=host_total,
        host_free=host_free,
        card_total=card_total,
        card_others=card_others,
        versions=versions,
        unreachable=unreachable,
    )


def is_first_here(platform: Platform) -> bool:
    """Whether this is the first rank on its machine. Collective."""
    here = socket.gethostname()
    return platform.ranks.gather([here]).index(here) == platform.rank


def _host_memory() -> tuple[int, int]:
    """Total and available, no more than the control groups of this process allow: what a job was given of a node."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for limit, used in _cgroup_limits():
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


def _cgroup_limits() -> list[tuple[int, int]]:
    """Limit and use of each control group (version 2) that this process is in."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    places = [line.partition("::")[2] for line in lines if line.startswith("0::")]
    found = []
    for place in places:
        folder = _CGROUPS / place.lstrip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(_CGROUPS):
                found += _cgroup_limit(group)
    return found


def _cgroup_limit(group: Path) -> list[tuple[int, int]]:
    """[] where it has none, or "max"."""
    try:
        limit = (group / "memory.max").read_text().strip()
        used = (group / "memory.current").read_text().strip()
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    if not limit.isdecimal() or not used.isdecimal():
        return []
    reclaimable = int(cached.get("inactive_file", 0)) + int(cached.get("active_file", 0))  # what files were read
    return [(int(limit), max(0, int(used) - reclaimable))]


# ---------------------------------------------------------------- ports
def _unreachable(platform: Platform, endpoint: str) -> tuple[str, ...]:
    """What this rank should reach and does not: the port where the ranks met, a port of the next rank that the system
    has chosen, as collectives use, and the endpoint. Collective."""
    found = []
    place = platform.meeting_place
    if place is not None and platform.rank > 0:
        found.append(_refusal("rank 0, where the ranks met", *place))
    found.append(_next_rank(platform, "" if place is None else place[0]))
    if endpoint:
        found.append(_endpoint_refusal(endpoint, urllib.request.getproxies()))
    return tuple(text for text in found if text)


def _next_rank(platform: Platform, address: str) -> str:
    """Why the next rank does not answer at a port of its own; "" where it does. Collective.

    Args:
        address: where the ranks met; "": they are all on this machine.
    """
    if platform.world_size == 1:
        return ""
    own = _own_address(address)
    family = socket.AF_INET6 if ":" in own else socket.AF_INET
    with closing(socket.socket(family, socket.SOCK_STREAM)) as listening:
        listening.bind((own, 0))
        listening.listen(2)
        host = socket.gethostname()
        places = platform.ranks.gather([(host, own, listening.getsockname()[1])])
        following = (platform.rank + 1) % platform.world_size
        there, address, port = places[following]
        # a machine may know itself by its loopback alone, which says nothing of where its ranks listen
        is_hidden = there != host and ipaddress.ip_address(address).is_loopback
        refusal = "" if is_hidden else _refusal(f"rank {following}, at a port that the system chose", address, port)
        platform.ranks.meet()  # nobody closes before all have connected
    return refusal


def _own_address(address: str) -> str:
    """Of this machine, as whoever is at `address` sees it. Nothing is sent."""
    if not address:
        return "127.0.0.1"
    try:
        ((family, kind, protocol, _, place), *_) = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)
        with closing(socket.socket(family, kind, protocol)) as probe:
            probe.connect(place)
            return probe.getsockname()[0]
    except OSError:
        return "127.0.0.1"


def _endpoint_refusal(url: str, proxies: Mapping[str, str]) -> str:
    """Why nothing answers at the endpoint's port; of an endpoint behind a proxy, at the proxy's."""
    parts = urlsplit(url)
    through = proxies.get(parts.scheme, "") if not urllib.request.proxy_bypass(parts.hostname or "") else ""
    name = f"the endpoint {parts.scheme}://{parts.hostname}" + (", through its proxy" if through else "")
    reached = urlsplit(through if "://" in through else f"http://{through}") if through else parts
    port = reached.port or (443 if reached.scheme == "https" else 80)
    return _refusal(name, reached.hostname or "", port)


def _refusal(name: str, address: str, port: int) -> str:
    try:
        socket.create_connection((address, port), CONNECT_SECONDS).close()
    except OSError as error:
        return f"{name} ({address}:{port}): {error.strerror or error}"
    return ""
