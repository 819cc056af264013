"""`ranks.Ranks` and `ranks.Exchange` on process groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_sr1.phases import WAIT, during
from megatron_sr1.ranks import Element, Ranks

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

    @during(WAIT)
    def gather(self, items: list[Element]) -> list[Element]:
        """All ranks' items on every rank, in the order of the ranks. Collective."""
        lists: list[list[Element]] = [[] for _ in range(self.num_ranks)]
        torch.distributed.all_gather_object(lists, items, group=self.group)
        return [item for part in lists for item in part]

    @during(WAIT)
    def send_to_main(self, items: list[Element]) -> list[Element]:
        """All ranks' items on rank 0, in the order of the ranks; [] on the others. Collective."""
        lists: list[list[Element]] = [[] for _ in range(self.num_ranks)]
        torch.distributed.gather_object(items, lists if self.rank == 0 else None, group=self.group, group_dst=0)
        return [item for part in lists for item in part]

    @during(WAIT)
    def gather_rows(self, rows: Tensor) -> Tensor:
        """All ranks' rows [n, W] of numbers, of one width and dtype, in the order of the ranks. Collective."""
        counts = torch.empty(self.num_ranks, dtype=torch.int64, device=self.device)
        torch.distributed.all_gather_into_tensor(counts, torch.tensor([len(rows)], device=self.device), self.group)
        most = int(counts.max())
        if most == 0:
            return rows
        padded = torch.zeros(most, rows.shape[1], dtype=rows.dtype, device=self.device)
        padded[: len(rows)] = rows
        found = padded.new_empty(self.num_ranks * most, rows.shape[1])
        torch.distributed.all_gather_into_tensor(found, padded, self.group)
        places = torch.arange(most, device=self.device).expand(self.num_ranks, -1)
        return found[(places < counts[:, None]).flatten()].to(rows.device)

    @during(WAIT)
    def swap(self, pieces: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """What each rank has for this one, for one piece [n] for each rank, all of one dtype. Collective.

        Args:
            sizes: of what comes, by rank: both sides know it.
        """
        sent = torch.cat(list(pieces))
        received = torch.empty(sum(sizes), dtype=sent.dtype, device=self.device)
        torch.distributed.all_to_all_single(
            received, sent.to(self.device), list(sizes), [len(piece) for piece in pieces], group=self.group
        )
        return list(received.to(sent.device).split(list(sizes)))

    @during(WAIT)
    def any(self, flag: bool) -> bool:
        """Whether it is true on some rank. Collective: one number, however many ranks."""
        found = torch.tensor([int(flag)], device=self.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=self.group)
        return bool(found.item())

    @during(WAIT)
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
