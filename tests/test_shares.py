"""What a rank reads and decodes: what its engine answers and what its replica trains, each once, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sr1.config import ConfigError, load_config
from megatron_sr1.data import (
    IndexedSample,
    Quarantine,
    SampleFeed,
    SampleStream,
    ShardDataset,
    StepPrompts,
    write_shards,
)
from megatron_sr1.data.feed import Deal, equal_runs
from megatron_sr1.processor import Processor
from megatron_sr1.ranks import ALONE, Exchange, OneRank, Ranks, agreed
from megatron_sr1.streams import PRESETS
from megatron_sr1.training.batches import Batcher
from megatron_sr1.training.ledger import slots_of
from megatron_sr1.training.payload import FIRST, Payload, share_responses
from megatron_sr1.training.recorder import Recorder
from megatron_sr1.training.step_rewards import all_rewards
from megatron_sr1.types import ImageRef, Prompt, Rollout, RolloutGroup, RolloutPair, SftSample
from tests.batch_cases import GOOD
from tests.data_cases import noise
from tests.test_data_index import indexed
from tests.thread_ranks import on_threads

PRESET, SAMPLES, COUNT = PRESETS["see_think"], 2, 12


class Counting(SampleStream):
    """Notes each sample that is read."""

    def __init__(self, dataset: ShardDataset, seed: int = 5) -> None:
        super().__init__(dataset, seed)
        self.reads: Counter[str] = Counter()

    def fetch(self, index: int) -> dict[str, bytes]:
        self.reads[self.key(index)] += 1
        return super().fetch(index)


def strided(samples: Sequence[IndexedSample], num_readers: int) -> list[list[int]]:
    return [list(range(reader, len(samples), num_readers)) for reader in range(num_readers)]


def lopsided(samples: Sequence[IndexedSample], num_readers: int) -> list[list[int]]:
    return [[] if reader else list(range(len(samples))) for reader in range(num_readers)]


@pytest.fixture
def dataset(tmp_path: Path) -> ShardDataset:
    drawn = [Prompt(f"p{i:02}", f"What is {i}?", "1", (noise(i, (56, 28 + 28 * (i % 3))),)) for i in range(3 * COUNT)]
    return ShardDataset(indexed(write_shards(drawn, tmp_path, "t", 5)))


def group_of(number: int, prompt: Prompt, processor: Processor) -> RolloutGroup:
    grid = processor.grid(prompt.images[0].size)
    asked = processor.expand(processor.prompt_ids(prompt.problem, 1), [grid])
    answer = processor.response_ids(f"{GOOD} {prompt.key}")
    first = Rollout(f"0/{prompt.key}/0/first", asked, answer, GOOD, (-0.5,) * len(answer), "stop", 0)
    return RolloutGroup(number, prompt, tuple(RolloutPair(k, first, None, "d") for k in range(SAMPLES)))


@pytest.mark.parametrize("deal", [equal_runs, strided, lopsided], ids=lambda deal: deal.__name__)
def test_a_rank_decodes_what_its_engine_and_its_replica_need(
    dataset: ShardDataset, tiny_model_dir: str, deal: Deal
) -> None:
    """Four ranks, each an engine; two of them are a replica. What a replica trains is decoded by who encodes it."""
    config = load_config(None, ["train.micro_batch_tokens=4096"])
    rewards = {name: torch.zeros(SAMPLES) for name in all_rewards(PRESET)}
    whole = SampleStream(dataset, 5)
    wanted = [whole.key(index) for index in whole.indices(0, COUNT)]

    def one(ranks: Exchange) -> tuple[set[str], set[str]]:
        processor = Processor.from_pretrained(tiny_model_dir)
        stream, replicas = Counting(dataset), OneRank(ranks.rank // 2, 2)
        feed = SampleFeed(stream, Quarantine(0), ranks=ranks, prefetch_bytes=1)
        feed.divide(ranks, deal)
        with feed:
            prompts = StepPrompts(feed, COUNT)
            own = {prompt.key for prompt in prompts.first.own.values()}
            assert prompts.keys == wanted and [prompts.first.own[place].key for place in prompts.first.own] == [
                wanted[place] for place in prompts.first.own
            ]
            groups = [group_of(number, prompt, processor) for number, prompt in prompts.first.own.items()]
            recorder = Recorder.of(PRESET, SAMPLES, processor, "train")
            ledger, held = recorder.record(groups, [rewards] * len(groups), ranks)
            shares = share_responses(ledger, slots_of(PRESET), 2)
            mine = shares[replicas.rank]
            tracks = Payload(ranks, [0, 0, 1, 1]).fetch(ledger, shares, held)
            rows = Batcher(config, processor, replicas).rows(ledger, mine, tracks, prompts, PRESET, 0)
            ahead = set(stream.reads) - own
            assert len(ahead) <= 1 and not ahead & set(wanted), "no other's before it is needed"
            images = [image for row in rows.micro_batches for image in row.images]
            for image in images:
                assert len(image.patches()) == torch.tensor(image.grid_thw).prod()
            trained = {wanted[place.group] for place in mine if place.slot == FIRST}
            assert len(images) == len(trained), "siblings share it"
            assert set(stream.reads) - ahead == own | trained and set(stream.reads.values()) == {1}
            prompts.finish()
        return own, trained

    found = on_threads(4, one)
    assert sorted(key for own, _ in found for key in own) == sorted(wanted)
    assert found[0][1] == found[1][1] and sorted(found[0][1] | found[2][1]) == sorted(wanted)
    assert max(len(trained) for _, trained in found) <= COUNT / 2 + 1


def test_an_image_that_is_known_by_its_size_is_encoded_as_the_image(tiny_model_dir: str) -> None:
    processor = Processor.from_pretrained(tiny_model_dir)
    image = noise(1, (84, 56))

    class Once:
        calls = 0

        def __call__(self) -> Any:
            self.calls += 1
            return image

    make = Once()
    ref, plain = processor.encode_image(ImageRef(image.size, make)), processor.encode_image(image)  # type: ignore[arg-type]
    assert ref.grid_thw == plain.grid_thw and make.calls == 0
    assert torch.equal(ref.patches(), plain.patches()) and torch.equal(ref.pixel_values, plain.pixel_values)
    assert make.calls == 1


def test_a_demonstration_that_is_no_prompt_ends_the_step_on_every_rank(tmp_path: Path) -> None:
    drawn = [Prompt(f"p{i}", "q", "1", ()) for i in range(3)]
    shards = write_shards([*drawn, SftSample(Prompt("odd", "q", "1"), "cot", "text")], tmp_path, "t", 9)

    def one(ranks: Exchange) -> str:
        feed = SampleFeed(SampleStream(ShardDataset(shards), 1), Quarantine(0), ranks=ranks)
        feed.divide(ranks)
        with feed, pytest.raises(ValueError, match=r"data\.train holds the demonstration 'odd'") as error:
            StepPrompts(feed, 4)
        return str(error.value)

    assert len(set(on_threads(4, one))) == 1


def test_a_demonstration_that_one_replica_cannot_encode_is_every_replica_s_error(tiny_model_dir: str) -> None:
    processor, config = Processor.from_pretrained(tiny_model_dir), load_config(None, ["train.micro_batch_tokens=1024"])
    flat = SftSample(Prompt("flat", "q", "1", (noise(0, (600, 2)),)), "cot", "word")
    samples = [SftSample(Prompt("p0", "q", "1"), "cot", "word"), flat]

    def one(ranks: Exchange) -> str:
        with pytest.raises(ValueError, match="600") as error:
            Batcher(config, processor, ranks).sft([samples[ranks.rank]])
        return str(error.value)

    assert len(set(on_threads(2, one))) == 1


def test_complaints_keep_their_class_where_a_text_makes_one() -> None:
    def refuse(error: ValueError) -> None:
        raise error

    for error, kind in (
        (ConfigError("odd"), ConfigError),
        (ValueError("odd"), ValueError),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "odd"), ValueError),
    ):
        with pytest.raises(kind, match="odd") as found:
            agreed(ALONE, lambda error=error: refuse(error))
        assert type(found.value) is kind


def test_replicas_weigh_demonstrations_alike(tiny_model_dir: str) -> None:
    """Each with its own, of other lengths: the weights of all their tokens add up to 1."""
    processor, config = Processor.from_pretrained(tiny_model_dir), load_config(None, ["train.micro_batch_tokens=1024"])
    samples = [SftSample(Prompt(f"p{i}", "q", "1"), "cot", "word " * (3 * i + 1)) for i in range(5)]

    def one(ranks: Ranks) -> list[torch.Tensor]:
        batcher: Any = Batcher(config, processor, ranks)  # type: ignore[arg-type]
        return batcher.sft(samples[ranks.rank :: ranks.num_ranks]).token_weights

    for num_ranks in (1, 2, 3):
        weights = torch.cat([row for rows in on_threads(num_ranks, one) for row in rows])
        assert weights.unique().numel() == 1 and float(weights.sum()) == pytest.approx(1.0, rel=1e-6)
        assert len(weights) == sum(len(processor.response_ids(sample.response)) for sample in samples)
