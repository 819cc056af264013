"""`types.Ranks` on process groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed
from torch.distributed import ProcessGroup

from megatron_sr1.types import Element, Ranks

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class GroupRanks:
    """The ranks of a process group; None: all ranks of the job. `device`: where its backend takes tensors from."""

    group: ProcessGroup | None = None
    device: torch.device = _CPU

    @property
    def rank(self) -> int:
        return torch.distributed.get_rank(self.group)

    @property
    def num_ranks(self) -> int:
        return torch.distributed.get_world_size(self.group)

    def gather(self, items: list[Element]) -> list[Element]:
        """All ranks' items on every rank, in the order of the ranks. Collective."""
        lists: list[list[Element]] = [[] for _ in range(self.num_ranks)]
        torch.distributed.all_gather_object(lists, items, group=self.group)
        return [item for part in lists for item in part]

    def any(self, flag: bool) -> bool:
        """Whether it is true on some rank. Collective: one number, however many ranks."""
        found = torch.tensor([int(flag)], device=self.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=self.group)
        return bool(found.item())

    def meet(self) -> None:
        """Waits until all ranks are here. Collective."""
        torch.distributed.barrier(group=self.group)


@dataclass(frozen=True)
class TeamRanks:
    """Teams of `size` ranks in a row, each counted as one: the ranks of an engine. Each still sends its own items."""

    ranks: Ranks
    size: int

    @property
    def rank(self) -> int:
        return self.ranks.rank // self.size

    @property
    def num_ranks(self) -> int:
        return self.ranks.num_ranks // self.size

    def gather(self, items: list[Element]) -> list[Element]:
        """All ranks' items, so a team's once for each of its ranks. Collective."""
        return self.ranks.gather(items)
