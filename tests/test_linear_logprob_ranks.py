"""The fused log-prob over a vocabulary that ranks share. One launch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed
from torch.distributed import ProcessGroup

from megatron_sr1.kernels import linear_logprob
from tests.logprob_cases import VOCAB, check_no_scored_row, check_shards, check_top, make_bias, make_inputs
from tests.ranks import run_ranks


def test_tensor_parallel_over_two_and_three_ranks() -> None:
    run_ranks(3, check_ranks)


def check_ranks(rank: int, num_ranks: int) -> None:
    whole = torch.distributed.group.WORLD
    pair = torch.distributed.new_group([0, 1])
    for group, size in ((whole, num_ranks), (pair, 2)):
        if rank >= size:
            continue
        uneven = [20, 33] if size == 2 else [20, 5, 28]
        check_shards(rank, group, uneven, None)
        check_shards(rank, group, uneven, VOCAB)
        check_shards(rank, group, uneven, VOCAB, biased=True)
        check_shards(rank, group, uneven, 45)  # padding inside the last shard
        check_shards(rank, group, [VOCAB - 2, 2] if size == 2 else [VOCAB - 2, 1, 1], VOCAB - 2)  # shards of padding
        check_top(rank, group, uneven, 45, bias=make_bias())
        check_no_scored_row(group, rank)
        check_errors(group, rank)


def check_errors(group: ProcessGroup, rank: int) -> None:
    """All ranks raise, so none is left waiting in the collective."""
    hidden, weight, targets = make_inputs(4, 10)
    last = 10 * group.size()
    targets[1] = last
    with pytest.raises(ValueError, match=rf"targets\[1\] is {last}, not in the vocabulary \[0, {last}\)"):
        linear_logprob(hidden, weight, targets, tp_group=group, vocab_start=10 * rank)
