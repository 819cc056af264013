"""The only place that knows a CPU from an accelerator."""

from megatron_sr1.platform.counter import TeamCounter
from megatron_sr1.platform.determinism import make_deterministic
from megatron_sr1.platform.fork_server import STOP_SIGNALS
from megatron_sr1.platform.ranks import GroupRanks, TeamRanks
from megatron_sr1.platform.runtime import STOPPED_STATUS, Platform, run_on_ranks, start_platform
from megatron_sr1.platform.watchdog import watched_rank

__all__ = [
    "STOPPED_STATUS",
    "STOP_SIGNALS",
    "GroupRanks",
    "Platform",
    "TeamCounter",
    "TeamRanks",
    "make_deterministic",
    "run_on_ranks",
    "start_platform",
    "watched_rank",
]
