"""Held-out prompts chunk by chunk, and the command's reading of a run folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sr1.cli import command, main
from megatron_sr1.config import Config, DataConfig
from megatron_sr1.data import Quarantine, SampleStream, ShardDataset, write_shards
from megatron_sr1.data.feed import equal_runs
from megatron_sr1.evaluation.heldout import Heldout
from megatron_sr1.ranks import Ranks
from megatron_sr1.types import PromptShare, SftSample

from .data_cases import QUESTION, equal, png, prompts, write_tar
from .hf_config_cases import SMALL, write_config
from .thread_ranks import on_threads


@pytest.fixture
def shard(tmp_path: Path) -> str:
    """Seven samples; the images of `b` and `g` are damaged."""
    members = {}
    for key in "abcdefg":
        members[f"{key}.json"] = QUESTION
        members[f"{key}.0.png"] = png(0) if key not in "bg" else b"no image"
    return str(write_tar(tmp_path / "test-0.tar", members))


def _heldout(shard: str, max_prompts: int = 0, budget: int = 2) -> tuple[Heldout, Quarantine]:
    quarantine = Quarantine(budget)
    return Heldout(ShardDataset([shard], quarantine=quarantine), quarantine, max_prompts), quarantine


def _keys(chunks: list[PromptShare]) -> list[str]:
    assert all([prompt.key for prompt in chunk.own.values()] == list(chunk.keys) for chunk in chunks)
    return ["".join(chunk.keys) for chunk in chunks]


def _first(heldout: Heldout, count: int) -> str:
    return "".join(prompt.key for prompt in heldout.first(count))


def test_chunks_hold_the_good_samples_in_order(shard: str) -> None:
    heldout, quarantine = _heldout(shard)
    assert len(heldout) == 7, "what is bad shows when it is read"
    assert _keys(list(heldout.chunks(2))) == ["ac", "de", "f"]
    assert [bad.key for bad in quarantine.bad] == ["b", "g"]
    assert [_first(heldout, count) for count in (3, 0, 9)] == ["acd", "", "acdef"]
    limited, quarantine = _heldout(shard, max_prompts=3)
    assert len(limited) == 3 and _keys(list(limited.chunks(2))) == ["ac", "d"] and len(quarantine.bad) == 1
    with pytest.raises(ValueError, match="sample 'b'"):
        list(_heldout(shard, budget=0)[0].chunks(2))


@pytest.mark.parametrize("answered", ["", "ac", "acde", "acdef"])
@pytest.mark.parametrize("max_prompts", [0, 5])
def test_what_follows_the_answered_ones_is_what_followed_them_before(
    shard: str, answered: str, max_prompts: int
) -> None:
    """The same chunks, and the bad samples among the answered ones are found again."""
    whole, quarantine = _heldout(shard, max_prompts)
    chunks = _keys(list(whole.chunks(2)))
    rest, again = _heldout(shard, max_prompts)
    assert "".join([answered, *_keys(list(rest.chunks(2, answered)))]) == "".join(chunks)
    assert _keys(list(rest.chunks(2, answered))) == chunks[-(-len(answered) // 2) :]
    assert [bad.key for bad in again.bad] == [bad.key for bad in quarantine.bad]


@pytest.mark.parametrize("answered", ["x", "ca", "acx", "acdefx"])
def test_records_of_other_samples_are_refused(shard: str, answered: str) -> None:
    heldout, _ = _heldout(shard)
    with pytest.raises(ValueError, match=r"the records of this evaluation hold .*--restart"):
        list(heldout.chunks(2, answered))


def test_a_chunk_is_read_at_a_time_and_the_next_one_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = prompts(20)
    write_shards(wanted, tmp_path, "test", 100)
    dataset = ShardDataset(sorted(tmp_path.glob("*.tar")))
    read: list[int] = []
    original = ShardDataset.read
    monkeypatch.setattr(ShardDataset, "read", lambda self, i: read.append(i) or original(self, i))
    chunks = Heldout(dataset, Quarantine(0)).chunks(4, [prompt.key for prompt in wanted[:8]])
    for start in (8, 12, 16):
        chunk = next(chunks)
        found = zip(chunk.own.values(), wanted[start : start + 4], strict=True)
        assert all(equal(ours, theirs) for ours, theirs in found)
        assert set(range(8, start + 4)) <= set(read) <= set(range(8, start + 8)), "and the next one ahead"
        assert len(read) == len(set(read))
    read.clear()
    assert [len(chunk.keys) for chunk in Heldout(dataset, Quarantine(0), 10).chunks(4)] == [4, 4, 2]
    assert sorted(read) == list(range(10)), "nothing beyond the limit"


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("answered", ["", "ac"])
def test_each_rank_reads_its_share_and_all_pass_over_what_one_finds_bad(
    shard: str, num_ranks: int, answered: str
) -> None:
    whole = _keys(list(_heldout(shard)[0].chunks(3, answered)))

    def one(ranks: Ranks) -> tuple[list[PromptShare], list[str]]:
        quarantine = Quarantine(2)
        dataset = ShardDataset([shard], quarantine=quarantine)
        heldout = Heldout(dataset, quarantine, ranks=ranks)
        heldout.divide(ranks, equal_runs)
        return list(heldout.chunks(3, answered)), sorted(bad.key for bad in quarantine.bad)

    found = on_threads(num_ranks, one)
    for chunks, bad in found:
        assert ["".join(chunk.keys) for chunk in chunks] == whole and bad == ["b", "g"]
    for number, keys in enumerate(whole):
        own = [chunks[number].own for chunks, _ in found]
        assert sorted(place for each in own for place in each) == list(range(len(keys)))
        assert all(prompt.key == keys[place] for each in own for place, prompt in each.items())


def test_more_images_than_the_engine_takes_are_told_before_it_starts(tmp_path: Path) -> None:
    members = {}
    for key, images in (("a", 0), ("b", 2), ("c", 3), ("d", 1)):
        members[f"{key}.json"] = QUESTION
        members |= {f"{key}.{number}.png": png(number) for number in range(images)}
    shard = str(write_tar(tmp_path / "test-0.tar", members))
    _heldout(shard)[0].check_images(3)
    _heldout(shard, max_prompts=2)[0].check_images(2)
    with pytest.raises(ValueError, match=r"2 of 4 samples .*max_images=1 .*'c' has 3\. Set rollout\.max_images=3"):
        _heldout(shard)[0].check_images(1)
    stream = SampleStream(ShardDataset([shard]), 0)
    stream.check_images(3, "data.train")
    with pytest.raises(ValueError, match=r"data\.train: 1 of 4 samples .*max_images=2 .*'c' has 3"):
        stream.check_images(2, "data.train")


def test_a_demonstration_is_refused(tmp_path: Path) -> None:
    write_shards([SftSample(prompts(1)[0], "see_think", "text")], tmp_path, "test", 100)
    dataset = ShardDataset(sorted(tmp_path.glob("*.tar")))
    with pytest.raises(ValueError, match=r"data\.heldout holds the demonstration 'p000'"):
        Heldout(dataset, Quarantine(0)).first(1)


# ---------------------------------------------------------------- megatron-sr1 evaluate RUN
@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished run that was evaluated on a folder of shards."""
    run, benchmark = tmp_path / "run", tmp_path / "benchmark" / "test"
    benchmark.mkdir(parents=True)
    write_shards(prompts(2), benchmark, "test", 100)
    write_config(run / "hf", SMALL)
    (run / "config.yaml").write_text(
        f"run_dir: elsewhere\nseed: 7\nmodel: {{hf_dir: start, max_position: 99}}\n"
        f"data: {{heldout: ['{benchmark.parent}']}}\nevaluate: {{verify_export: 16}}\n"
    )
    return run


def test_a_run_folder_stands_for_its_configuration_and_its_export(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[tuple[Config, bool]] = []
    monkeypatch.setattr(command, "start", lambda _, config, args: launched.append((config, args.restart)))
    main(["evaluate", str(run_folder), "evaluate.samples=4", "evaluate.temperature=0.6"])
    main(["evaluate", str(run_folder), "run_dir=mine", "--restart"])
    (config, restart), (other, other_restart) = launched
    assert (restart, other_restart, other.run_dir) == (False, True, "mine")
    assert config.model.hf_dir == str(run_folder / "hf") and config.run_dir == str(run_folder / "evaluate")
    assert (config.seed, config.model.max_position, config.evaluate.samples) == (7, 99, 4)
    assert config.data == DataConfig(heldout=(str(tmp_path / "benchmark"),))


def test_a_folder_of_shards_is_found_and_the_key_of_the_judge_is_asked_for(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    judge = ["evaluate.judge_url=http://127.0.0.1:1/v1", "evaluate.judge_model=m"]
    with pytest.raises(SystemExit, match=r"evaluate\.judge_api_key_env='JUDGE_KEY' is not allowed"):
        main(["evaluate", str(run_folder), *judge, "evaluate.judge_api_key_env=JUDGE_KEY"])
    with pytest.raises(SystemExit, match=r"data\.heldout: '/nowhere' matches no file"):
        main(["evaluate", str(run_folder), "data.heldout=[/nowhere]"])


def test_a_run_that_has_not_ended_is_refused(run_folder: Path) -> None:
    (run_folder / "hf" / "config.json").unlink()
    with pytest.raises(SystemExit, match=r"megatron-sr1 evaluate: .*run is not the folder of a finished run"):
        main(["evaluate", str(run_folder)])
    with pytest.raises(SystemExit, match=r"CONFIG='/nowhere' is not a file"):
        main(["evaluate", "/nowhere"])
