"""The loss of held-out demonstrations: of every token once, whoever reads it, in whatever layout and row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from megatron_sr1.config import load_config
from megatron_sr1.data import Quarantine, ShardDataset, write_shards
from megatron_sr1.data.feed import equal_runs
from megatron_sr1.kernels import linear_logprob
from megatron_sr1.policy.work import Work
from megatron_sr1.prompts import COT
from megatron_sr1.ranks import ALONE, Exchange
from megatron_sr1.training.batches import Batcher
from megatron_sr1.training.heldout_loss import HeldoutLoss
from megatron_sr1.types import LogProbs, MicroBatch, Prompt, SftSample
from tests.data_cases import noise, write_tar
from tests.logprob_cases import check_top
from tests.model_zoo import create_family
from tests.policy_cases import TOLERANCE, built, processor_of
from tests.ranks import run_ranks
from tests.thread_ranks import on_threads

FAMILY = "qwen2_5_vl_tied"
LAYOUTS = (["layout.tensor=2"], ["layout.pipeline=2"], ["layout.context=2"], [], ["train.micro_batch_tokens=160"])
ANSWERS = (
    "<think> one and two </think> \\boxed{3}",
    "<think> seven </think> \\boxed{7}",
    "<think> </think> \\boxed{1}",
)


def demonstrations(num: int) -> list[SftSample]:
    """With a picture and without, of many lengths."""
    samples = []
    for i in range(num):
        images = (noise(i, (28 + 28 * (i % 3), 56)),) if i % 3 else ()
        samples.append(SftSample(Prompt(f"d{i}", f"Question {i}" * (1 + i % 4), "3", images), "cot", ANSWERS[i % 3]))
    return samples


def good(sample: Any) -> None:
    if isinstance(sample, SftSample) and sample.response == "bad":
        raise ValueError(f"sample {sample.prompt.key!r} has no layout.")


def heldout(policy: Any, batcher: Batcher, shards: Sequence[Path], portion: int, budget: int = 0) -> HeldoutLoss:
    dataset = ShardDataset(shards)
    how = {"num_samples": len(dataset), "portion": portion, "workers": 2, "num_examples": 6}
    return HeldoutLoss(dataset, Quarantine(budget), good, equal_runs, batcher, policy, **how)


class ById:
    """A policy of which every token's log-prob is its id, divided, and every even id is the likeliest."""

    def __init__(self, ranks: Exchange) -> None:
        self.replicas, self.platform = ranks, SimpleNamespace(ranks=ranks)
        self.most_rows = 0
        self.work = Work(trains_vision=True)

    def logprobs(self, batches: list[MicroBatch], scoring: Any) -> list[LogProbs]:
        self.most_rows = max(self.most_rows, len(batches))
        self.work.add(batches, trains=False)
        assert all(batch.marks_top for batch in batches)
        return [LogProbs(-batch.targets / 64, None, is_top=batch.targets % 2 == 0) for batch in batches]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(create_family(tmp_path_factory.mktemp("heldout") / FAMILY, FAMILY))


def test_every_token_counts_once_however_it_is_shared(model_dir: str, tmp_path: Path) -> None:
    """Also where a replica has nothing of a portion, and where bad samples are found on the way or known before."""
    processor, config = processor_of(model_dir), load_config(None, ["train.micro_batch_tokens=512"])
    samples = demonstrations(11)
    ids = torch.tensor([i for sample in samples for i in processor.response_ids(sample.response)])
    spoiled = [*samples[:4], SftSample(Prompt("bad", "q", "1"), "cot", "bad"), *samples[4:]]
    shards = write_shards(spoiled, tmp_path, "heldout", 5)
    results = []
    for num_ranks, portion in ((1, 100), (1, 3), (2, 4), (3, 1), (3, 5)):

        def one(ranks: Exchange, portion: int = portion) -> tuple[dict[str, float], int]:
            policy: Any = ById(ranks)
            made = heldout(policy, Batcher(config, processor, ranks), shards, portion, budget=1)
            first, second = made.measure(), made.measure()
            assert policy.work.take()[0].tokens == 0, "these passes are of no step"
            assert first == second, "to the bit, with the bad sample known"
            assert [example.key for example in first.examples] == ["d0", "d1", "d2", "d3", "d4"], "without the bad one"
            for example, sample in zip(first.examples, samples, strict=False):
                its_ids = torch.tensor(processor.response_ids(sample.response))
                assert example.loss == pytest.approx(float(its_ids.double().mean()) / 64)
                assert (example.tokens, example.response) == (len(its_ids), sample.response)
            return first.metrics, policy.most_rows

        found = on_threads(num_ranks, one)
        assert len({str(each) for each, _ in found}) == 1, "the same on every rank"
        results.append(found[0][0])
    for result in results:
        assert result["heldout/tokens"] == len(ids)
        assert result["heldout/loss"] == pytest.approx(float(ids.double().mean()) / 64, rel=1e-12)
        assert result["heldout/token_accuracy"] == pytest.approx(float((ids % 2 == 0).double().mean()), rel=1e-12)


def test_what_cannot_be_measured_is_every_rank_s_error(model_dir: str, tmp_path: Path) -> None:
    processor, config = processor_of(model_dir), load_config(None, ["train.micro_batch_tokens=96"])
    bad = SftSample(Prompt("bad", "q", "1"), "cot", "bad")
    long = SftSample(Prompt("long", "word " * 400, "1"), "cot", ANSWERS[0])
    cases = {
        "sample 'bad' has no layout": ([*demonstrations(1), bad], 0),
        "no demonstration of it can be used": ([bad], 1),
        "127 tokens, more than the max_tokens=96 of a row": ([*demonstrations(1), long], 0),
    }
    for number, (match, (samples, budget)) in enumerate(cases.items()):
        shards = write_shards(samples, tmp_path, f"case{number}", 9)

        def one(ranks: Exchange, match: str = match, shards: Any = shards, budget: int = budget) -> str:
            policy: Any = ById(ranks)
            with pytest.raises(ValueError, match=match) as error:
                heldout(policy, Batcher(config, processor, ranks), shards, 4, budget).measure()
            return str(error.value)

        assert len(set(on_threads(2, one))) == 1
    prompt = write_tar(tmp_path / "p.tar", {"a.json": {"problem": "How many?", "answer": "3"}})
    policy: Any = ById(ALONE)
    with pytest.raises(ValueError, match=r"data\.heldout holds the prompt 'a' without a response"):
        heldout(policy, Batcher(config, processor, ALONE), [prompt], 4).measure()


def test_the_likeliest_tokens_of_one_head(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_sr1.kernels.linear_logprob import chunked

    for columns in (8192, 20):
        monkeypatch.setattr(chunked, "MAX_TILE_COLUMNS", columns)
        check_top(0, None, [53], 45)
    hidden, weight = torch.zeros(1, 4, requires_grad=True), torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"top=True needs torch\.no_grad"):
        linear_logprob(hidden, weight, torch.tensor([0]), top=True)


def test_every_layout_gives_the_loss_of_transformers(model_dir: str, tmp_path: Path) -> None:
    shards = write_shards(demonstrations(7), tmp_path, "heldout", 3)
    torch.save(_of_transformers(model_dir, demonstrations(7)), tmp_path / "expected.pt")
    run_ranks(2, _walk, model_dir, [str(path) for path in shards], str(tmp_path / "expected.pt"))


def _of_transformers(model_dir: str, samples: Sequence[SftSample]) -> tuple[float, float]:
    """Mean loss and accuracy of all response tokens: a sample at a time, all logits, no part of ours but the texts."""
    from transformers import AutoModelForImageTextToText

    processor = processor_of(model_dir)
    model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32).eval()
    losses, hits = [], []
    for sample in samples:
        images = [processor.encode_image(image) for image in sample.prompt.images]
        prompt = processor.prompt_ids(COT.user_text(sample.prompt.problem, len(images)), len(images))
        prompt = processor.expand(prompt, [image.grid_thw for image in images])
        response = list(processor.response_ids(sample.response))
        ids = torch.tensor([[*prompt, *response]])
        vision: dict[str, Any] = {}
        if images:
            vision = {
                "pixel_values": torch.cat([image.pixel_values for image in images]),
                "image_grid_thw": torch.tensor([image.grid_thw for image in images]),
                "mm_token_type_ids": (ids == processor.image_token_id).int(),
            }
        with torch.no_grad():
            logits = model(input_ids=ids, **vision).logits[0, len(prompt) - 1 : -1].double()
        target = torch.tensor(response)
        losses.append(functional.cross_entropy(logits, target, reduction="none"))
        hits.append(logits.argmax(1) == target)
    return float(torch.cat(losses).mean()), float(torch.cat(hits).double().mean())


def _walk(rank: int, num_ranks: int, model_dir: str, shards: list[str], expected: str) -> None:
    loss, accuracy = torch.load(expected)
    for overrides in LAYOUTS:
        with built(model_dir, ["train.batch_size=2", *overrides]) as (policy, config):
            batcher = Batcher(config, processor_of(model_dir), policy.replicas)
            found = heldout(policy, batcher, [Path(path) for path in shards], portion=4).measure().metrics
            assert found["heldout/loss"] == pytest.approx(loss, rel=TOLERANCE), overrides
            assert found["heldout/token_accuracy"] == pytest.approx(accuracy), overrides
