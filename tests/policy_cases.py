"""What the policy's tests share: sequences of every kind, a policy built from overrides, packed rows, a loss."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor

from megatron_sr1.config import Config, load_config
from megatron_sr1.packing import pack
from megatron_sr1.processor import Processor
from megatron_sr1.types import LogProbs, MicroBatch, TokenSequence

TOLERANCE = 1e-5  # relative, fp32
LEARNING_RATE = 1e-3
# with the usual eps of 1e-8, AdamW's first step is the sign of the gradient, and the sign of a gradient that should be
# 0 is noise
OPTIMIZER = (f"optimizer.lr={LEARNING_RATE}", "optimizer.eps=1e-3")
STEP_TOLERANCE = 1e-3  # of a weight after a step, in learning rates
BUDGET = 96  # tokens of a row: several sequences share one, and there are several rows


@cache
def processor_of(model_dir: str) -> Processor:
    """Read once in a process: a tenth of a second of CPU time."""
    return Processor.from_pretrained(model_dir)


def make_sequences(processor: Processor) -> list[TokenSequence]:
    """One image, several, none; images that sequences share; odd sizes; long and short responses."""
    generator = torch.Generator().manual_seed(0)
    side = 28

    def picture(columns: float, rows: float) -> Any:
        from PIL import Image

        size = (int(rows * side), int(columns * side), 3)
        pixels = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        return processor.encode_image(Image.fromarray(pixels.numpy()))

    def sequence(num_words: int, *images: Any) -> TokenSequence:
        ids = processor.prompt_ids("What is the sum of all digits?", len(images))
        response = torch.randint(0, 300, (num_words,), generator=generator).tolist()
        return TokenSequence(processor.expand(ids, [image.grid_thw for image in images]), response, images)

    wide, tall, odd = picture(3, 1), picture(1, 4), picture(3.3, 2.6)
    return [
        sequence(9, wide),
        sequence(13, tall, odd),
        sequence(5, odd),
        sequence(7, odd),
        sequence(21),
        sequence(30),
        sequence(2, wide, tall),
    ]


@contextmanager
def built(model_dir: str, overrides: Sequence[str], **options: Any) -> Iterator[tuple[Any, Config]]:
    from megatron_sr1.platform import start_platform

    platform = start_platform()
    from megatron_sr1.policy import Policy

    config = load_config(None, [f"model.hf_dir={model_dir}", f"nproc={platform.world_size}", *OPTIMIZER, *overrides])
    policy = Policy(config, platform, **{"num_optimizer_steps": 10, "keep_reference": False, **options})
    yield policy, config
    _forget_graphs(policy)
    del policy
    gc.collect()  # of the policies before this one, whose process groups have threads


def _forget_graphs(policy: Any) -> None:
    """Megatron-Core's token dispatchers keep the last graph, which holds the gradient hooks, which hold the model: a
    circle that no garbage collector sees."""
    for module in (module for chunk in policy.chunks for module in chunk.modules()):
        dispatcher = getattr(module, "token_dispatcher", None)
        for name, value in list(vars(dispatcher).items()) if dispatcher else ():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                setattr(dispatcher, name, None)


def packed_rows(
    policy: Any,
    config: Config,
    processor: Processor,
    budget: int = BUDGET,
    share_prefix: bool = False,
    change: Callable[[TokenSequence], TokenSequence] = lambda sequence: sequence,
) -> tuple[list[MicroBatch], list[int]]:
    """This replica's packed share (every n-th pair of sequences) and which sequences it holds. `change`: of each."""
    sequences = [change(sequence) for sequence in make_sequences(processor)]
    replicas = policy.groups.data
    mine = [index for index in range(len(sequences)) if index // 2 % replicas.size() == replicas.rank()]
    batches = pack(
        [sequences[index] for index in mine],
        max_tokens=budget,
        row_multiple=config.row_multiple,
        sequence_multiple=config.sequence_multiple,
        image_token_id=processor.image_token_id,
        merge_size=processor.merge_size,
        share_prefix=share_prefix,
    )
    return batches, mine


class MeanLoss:
    """-mean of all response log-probs of the step, and `bonus` times that of their entropies; the denominator is
    global."""

    def __init__(self, num_tokens: int, bonus: float = 0.0) -> None:
        self.num_tokens, self.bonus = num_tokens, bonus

    def __call__(self, index: int, logprobs: LogProbs) -> tuple[Tensor, dict[str, Tensor]]:
        loss = -logprobs.logprobs.sum() / self.num_tokens
        if self.bonus and logprobs.entropy is not None:
            loss = loss - self.bonus * logprobs.entropy.sum() / self.num_tokens
        return loss, {"loss": loss}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def exchanged_bytes(policy: Any) -> list[int]:
    """Bytes that a checkpoint's exchanges of optimizer state send and receive, each."""
    found, exchange = [], torch.distributed.all_to_all_single

    def noted(received: torch.Tensor, sent: torch.Tensor, *sizes: Any, **options: Any) -> Any:
        found.append(received.nbytes + sent.nbytes)
        return exchange(received, sent, *sizes, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_to_all_single", noted)
        policy.sharded_state(loading=False)
    return found
