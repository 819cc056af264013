"""Policies of random weights in this process, and what a scoring pass and a training step of each give and take."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.gpu_check.checks import MODEL
from benchmarks.setting import write_model
from megatron_sr1.types import LogProbs, MicroBatch, Scoring, TokenSequence

if TYPE_CHECKING:
    from megatron_sr1.config import Config
    from megatron_sr1.policy import Policy

TEXTS = ("What is the sum of all digits?",)


@dataclass(frozen=True)
class Size:
    """Of a model and of a step. `hidden` is a multiple of 128, so that every FP8 recipe takes it."""

    hidden: int
    layers: int
    feed_forward: int
    vocab: int
    row_tokens: int
    rows: int


ON_CARD = Size(hidden=2048, layers=12, feed_forward=8192, vocab=151936, row_tokens=8192, rows=4)
ON_CPU = Size(hidden=256, layers=2, feed_forward=512, vocab=2048, row_tokens=512, rows=2)


def size_here() -> Size:
    """A model whose products fill a card, or a small one."""
    return ON_CARD if torch.cuda.is_available() else ON_CPU


def made_model(work: Path, size: Size) -> Path:
    """A Qwen2.5-VL of random weights in the work folder; made where an earlier check has not."""
    folder = work / MODEL
    if not folder.is_dir():
        shape = {"hidden": size.hidden, "feed_forward": size.feed_forward, "vocab": size.vocab, "layers": size.layers}
        unfinished = folder.with_name(f"{MODEL}.partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        write_model(unfinished, TEXTS, heads=size.hidden // 128, **shape)
        unfinished.rename(folder)
    return folder


@dataclass(frozen=True)
class Trained:
    """A policy with rows to score and to train on."""

    policy: Policy
    config: Config
    batches: Sequence[MicroBatch]
    packed: Sequence[MicroBatch]  # the same on the host
    num_sequences: int
    num_tokens: int  # of all sequences

    def score(self) -> Tensor:
        """Log-probs of all scored tokens, sequence after sequence, on the host."""
        from megatron_sr1.packing import gather_rows

        scores = self.policy.logprobs(self.batches, Scoring())
        values = [score.logprobs.float().cpu() for score in scores]
        return torch.cat(gather_rows(values, self.packed, self.num_sequences))

    def step(self) -> tuple[float, float]:
        """Loss and gradient norm of one optimizer step on the mean log-prob."""
        scored = sum(len(batch.targets) for batch in self.batches)

        def loss(index: int, logprobs: LogProbs) -> tuple[Tensor, Mapping[str, Tensor]]:
            value = -logprobs.logprobs.sum() / scored
            return value, {"loss": value}

        result = self.policy.train_step(self.batches, loss, Scoring())
        return result.metrics["loss"], result.grad_norm


def build(model: Path, size: Size, *overrides: str, siblings: bool = False) -> Trained:
    """Of one rank. `platform.start_platform()` was called before.

    Args:
        siblings: eight responses to each prompt, which train.shared_prefix has once or for each; else prompts of a few
            words, which each sequence has for itself.

    Raises:
        ConfigError: something that the machine does not have.
    """
    from megatron_sr1.config import load_config
    from megatron_sr1.packing import moved, pack
    from megatron_sr1.platform import start_platform
    from megatron_sr1.policy import Policy
    from megatron_sr1.processor import Processor

    platform = start_platform()
    words = [f"model.hf_dir={model}", f"model.max_position={size.row_tokens}", "optimizer.lr=1e-6", *overrides]
    config = load_config(None, words)
    policy = Policy(config, platform, num_optimizer_steps=1000, keep_reference=False)
    processor = Processor.from_pretrained(str(model))
    sequences = _families(size) if siblings else _sequences(processor, size)
    batches = pack(
        sequences,
        max_tokens=size.row_tokens,
        row_multiple=config.row_multiple,
        sequence_multiple=config.sequence_multiple,
        image_token_id=processor.image_token_id,
        merge_size=processor.merge_size,
        share_prefix=siblings and config.train.shared_prefix,
    )
    tokens = sum(len(sequence.prompt_ids) + len(sequence.response_ids) for sequence in sequences)
    there = [moved(batch, platform.device) for batch in batches]
    return Trained(policy, config, there, batches, len(sequences), tokens)


def _sequences(processor: Any, size: Size) -> list[TokenSequence]:
    """Text of random ids, four sequences a row: the language model alone is looked at."""
    generator = torch.Generator().manual_seed(0)
    prompt = processor.prompt_ids(TEXTS[0], 0)
    length = size.row_tokens // 4 - len(prompt)
    ids = torch.randint(0, 256, (4 * size.rows, length), generator=generator).tolist()
    return [TokenSequence(prompt, response, ()) for response in ids]


def _families(size: Size) -> list[TokenSequence]:
    """As many prompts of an eighth of a row as there are rows, each with eight responses of a sixteenth."""
    generator = torch.Generator().manual_seed(0)
    sequences = []
    for _ in range(size.rows):
        prompt = torch.randint(0, 256, (size.row_tokens // 8,), generator=generator).tolist()
        ids = torch.randint(0, 256, (8, size.row_tokens // 16), generator=generator).tolist()
        sequences += [TokenSequence(prompt, response) for response in ids]
    return sequences


@contextmanager
def one_rank() -> Iterator[None]:
    """The platform and a process group of this process alone."""
    from megatron_sr1.platform import start_platform

    start_platform()
    yield
    torch.distributed.destroy_process_group()


def seconds_of(actions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Medians, the actions taking turns; each has run once before."""
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for round_number in range(repeats + 1):
        for name, action in actions.items():
            start = _now()
            action()
            if round_number:
                taken[name].append(_now() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
