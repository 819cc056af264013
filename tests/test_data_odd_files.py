"""Files of rows that are odd: names that are equal, parts that are missing, cells that cannot be read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sr1.data import BadSample, LeftOut, Quarantine, SampleFeed, StreamState, open_stream, prepare_data
from megatron_sr1.types import Prompt, SftSample
from tests.test_data_rows import ROWS, config, parquet, write_rows


def test_each_row_that_is_left_out_counts(tmp_path: Path) -> None:
    """Whatever key it has, and whatever its file is called."""
    bad = {"problem": "where?", "answer": "1", "key": "same", "image": "absent.png"}
    paths = [write_rows(tmp_path / w / "x.jsonl", [ROWS[i], bad, bad]) for i, w in enumerate(("w1", "w2"))]
    data = config(tmp_path, *paths, train_weights=(1.0, 1.0), max_bad_samples=3)
    with pytest.raises(ValueError, match=r"max_bad_samples=3 is exceeded(.|\n)*w1(.|\n)*w1(.|\n)*w2(.|\n)*w2"):
        prepare_data(data, "train", str)
    quarantine = Quarantine(4)
    open_stream(data, "train", 0, quarantine, lambda size: 1)
    assert quarantine.num_bad == 4


def test_equal_names_in_a_mixture_are_told_apart(tmp_path: Path) -> None:
    """Two data sets whose files and keys are called alike: a sample of one that is left out leaves the other's."""
    name = "train-00000-of-00001.parquet"
    for folder, start in (("w1", 0), ("w2", 3)):
        parquet(tmp_path / folder / name, ROWS[start : start + 3])
    data = config(tmp_path, tmp_path / "w1", tmp_path / "w2", train_weights=(1.0, 1.0))

    def check(sample: Prompt | SftSample) -> None:
        assert isinstance(sample, Prompt)
        if sample.answer in ("0", "1"):
            raise LeftOut(f"{sample.answer} is too long")

    def refuse(sample: Prompt | SftSample) -> None:
        raise ValueError("refused")

    quarantine = Quarantine(0)
    stream = open_stream(data, "train", 0, quarantine, lambda size: 1)
    assert len({stream.place(i) for i in range(6)}) == 6 and len({stream.key(i) for i in range(6)}) == 3
    with SampleFeed(stream, quarantine, check=check) as feed:
        found = [sample.answer for sample in feed.next(40).samples if isinstance(sample, Prompt)]
        state = StreamState.from_json(json.loads(json.dumps(feed.state().to_json())))
    assert set(found) == {"2", "3", "4", "5"} and len(quarantine.bad) == 2
    with (
        SampleFeed(stream, Quarantine(9), check=refuse) as feed,
        pytest.raises(ValueError, match=r"no sample .* refused"),
    ):
        feed.next(1)
    earlier = replace(state, bad=(BadSample(f"{Path(name).stem}-00000.tar", stream.key(0), "of an earlier release"),))
    for kept, num_bad in ((state, 2), (earlier, 0)):
        with SampleFeed(stream, again := Quarantine(0), check=check) as feed:
            feed.restore(kept)
            assert len(again.bad) == num_bad, "a name that fits two shards blocks neither"
            answers = {sample.answer for sample in feed.next(40).samples if isinstance(sample, Prompt)}
            assert answers == {"2", "3", "4", "5"}


def test_rows_that_are_left_out_are_not_of_the_stream(tmp_path: Path) -> None:
    """As many as there are samples leave the samples."""
    bad = [{"problem": f"where {i}?", "answer": "1", "image": "absent.png"} for i in range(2)]
    path = write_rows(tmp_path / "a.jsonl", [*ROWS[:4], *ROWS[:2], *bad])
    quarantine = Quarantine(2)
    stream = open_stream(config(tmp_path, path), "train", 0, quarantine, lambda size: 1)
    assert len(quarantine.bad) == stream.num_samples == 4
    with SampleFeed(stream, quarantine) as feed:
        assert {sample.key for sample in feed.next(4).samples if isinstance(sample, Prompt)} == {
            f"a-0000000{i}" for i in range(4)
        }
