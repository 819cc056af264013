"""How far each response lies from the reference: the KL that a stream takes off its reward.

    KL[s, b] = sum over the tokens of response b that stream s credits of  log pi_old - log pi_ref            [nats]

With kl_estimator k1, as InstructGPT (arXiv 2203.02155, section 3.5) and RLOO (arXiv 2402.14740) have it. Of whole
responses, so it is layout and packing that it does not depend on: a response lies in one row, and its tokens are added
in their order, in float64.

Shape legend: S reward streams, B responses of the optimizer step over all replicas, R scored tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_sr1.objective import kl_estimate
from megatron_sr1.ranks import Exchange
from megatron_sr1.training.batches import StreamRows
from megatron_sr1.types import LogProbs, RewardStream


def response_kl(
    rows: StreamRows,
    old: Sequence[LogProbs],
    reference: Sequence[LogProbs],
    streams: Sequence[RewardStream],
    num_responses: int,
    replicas: Exchange,
) -> Tensor:
    """KL of each response in each stream that has it in its reward, 0 in the others and where one credits nothing.
    Collective over the replicas, which send S numbers for each of their responses.

    Args:
        rows: of this replica.
        old: per micro-batch, of the weights that drew the responses.
        reference: per micro-batch.
        num_responses: B.

    Returns:
        [S, B] float64 on the CPU, the same on every rank.
    """
    sums = torch.zeros(num_responses, len(streams), dtype=torch.float64)
    wanted = torch.tensor([stream.kl_in == "reward" for stream in streams])  # [S]
    here = torch.zeros(num_responses, dtype=torch.bool)
    for tokens, before, held in zip(rows.tokens, old, reference, strict=True):
        pair = (before.logprobs.cpu().double(), held.logprobs.cpu().double())  # [R] each
        kl = torch.stack([kl_estimate(*pair, stream.kl_estimator) for stream in streams], 1)  # [R, S]
        credited = (tokens.token_weights != 0).t().cpu() & wanted  # [R, S]
        place = tokens.place.cpu()
        here[place] = True
        sums.index_add_(0, place, kl.masked_fill(~credited, 0.0))
    return over_replicas(sums, here, replicas).t().contiguous()


def over_replicas(sums: Tensor, here: Tensor, replicas: Exchange) -> Tensor:
    """[B, W] sums of all replicas, from each one's own. Collective over the replicas, which send those that they have:
    W numbers and a place each.

    Args:
        sums: [B, W] float64 on the CPU.
        here: [B] bool: what this replica has a part of; the passes of a sample may be on two replicas.
    """
    mine = here.nonzero()  # [b, 1]
    everyone = replicas.gather_rows(torch.cat([mine.double(), sums[mine.squeeze(1)]], 1))
    return torch.zeros_like(sums).index_add_(0, everyone[:, 0].long(), everyone[:, 1:])
