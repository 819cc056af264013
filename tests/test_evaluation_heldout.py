"""Held-out prompts round by round, and the command's reading of a run folder."""

from __future__ import annotations

from collections.abc import Iterator
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


def _read(rounds: Iterator[PromptShare]) -> list[str]:
    """The keys of the good samples of each round, as they are read."""
    found = []
    for share in rounds:
        assert not share.own and share.read is not None
        prompts = {place: share.read(place) for places in share.shares for place in places}
        assert all(prompt is None or prompt.key == share.keys[place] for place, prompt in prompts.items())
        found.append("".join(prompt.key for prompt in prompts.values() if prompt is not None))
    return found


def _first(heldout: Heldout, count: int) -> str:
    return "".join(prompt.key for prompt in heldout.first(count))


def test_rounds_hold_the_good_samples_in_order(shard: str) -> None:
    """A round is made of what is not known to be bad; as many as it finds so are in the next one."""
    heldout, quarantine = _heldout(shard)
    assert len(heldout) == 7, "what is bad shows when it is read"
    assert _read(heldout.rounds()) == ["acdef"]
    assert [bad.key for bad in quarantine.bad] == ["b", "g"]
    assert _read(heldout.rounds()) == ["acdef"] and _read(heldout.rounds(size=2)) == ["a", "cd", "ef"]
    assert [_first(heldout, count) for count in (3, 0, 9)] == ["acd", "", "acdef"]
    assert _read(_heldout(shard)[0].rounds(size=2)) == ["a", "cd", "ef"]
    limited, quarantine = _heldout(shard, max_prompts=3)
    assert len(limited) == 3 and _read(limited.rounds()) == ["ac", "d"] and len(quarantine.bad) == 1
    with pytest.raises(ValueError, match="sample 'b'"):
        _read(_heldout(shard, budget=0)[0].rounds())


@pytest.mark.parametrize("answered", ["", "ac", "dcf", "acdef"])
@pytest.mark.parametrize("max_prompts", [0, 4])
def test_what_is_left_is_read_and_nothing_else(shard: str, answered: str, max_prompts: int) -> None:
    done = ["abcdefg".index(key) for key in answered]
    left = [key for key in "acdef"[: max_prompts or None] if key not in answered]
    if max_prompts and len(answered) + len(left) > max_prompts:  # others of them are done
        left = left[: max(0, max_prompts - len(answered))]
    heldout, _ = _heldout(shard, max_prompts)
    assert sorted("".join(_read(heldout.rounds(done)))) == left
    if answered == "acdef":
        assert list(heldout.rounds(done)) == [], "a bad sample alone is no round"


@pytest.mark.parametrize("answered", ["", "a", "acdef", "acd", "ce", "acdf"])
def test_a_round_of_some_size_is_whole_or_done_again(shard: str, answered: str) -> None:
    """What a pass reads of another prompt does not hang on how far an interrupted evaluation had come."""
    whole = _read(_heldout(shard)[0].rounds(size=3))
    assert whole == ["ac", "def"], "of runs of three samples"
    done = ["abcdefg".index(key) for key in answered]
    assert _read(_heldout(shard)[0].rounds(done, 3)) == [keys for keys in whole if not set(keys) <= set(answered)]
    limited = [keys for keys in ("ac", "de") if not set(keys) <= set(answered)]
    if len(answered) < 5:
        assert _read(_heldout(shard, 4)[0].rounds([n for n in done if n < 5], 3)) == limited


def test_keys_of_records_are_places(shard: str) -> None:
    heldout, quarantine = _heldout(shard)
    assert heldout.places("acd") == [0, 2, 3] and [bad.key for bad in quarantine.bad] == ["b"]
    assert heldout.places([]) == []


@pytest.mark.parametrize("answered", ["x", "ca", "acx", "acdefx"])
def test_records_of_other_samples_are_refused(shard: str, answered: str) -> None:
    with pytest.raises(ValueError, match=r"the records of this evaluation hold .*--restart"):
        _heldout(shard)[0].places(answered)


def test_a_sample_is_read_when_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = prompts(20)
    write_shards(wanted, tmp_path, "test", 100)
    dataset = ShardDataset(sorted(tmp_path.glob("*.tar")))
    read: list[int] = []
    original = ShardDataset.read
    monkeypatch.setattr(ShardDataset, "read", lambda self, i: read.append(i) or original(self, i))
    share = next(Heldout(dataset, Quarantine(0), 10).rounds(range(4)))
    assert read == [4] and share.shares == [list(range(4, 10))], "the first one tells whether there is a round"
    assert share.read is not None and equal(share.read(7), wanted[7]) and read == [4, 7]
    assert list(share.keys) == [prompt.key for prompt in wanted], (
        "so that the draws of a key do not hang on what is left"
    )


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_all_ranks_pass_over_what_one_finds_bad(shard: str, num_ranks: int) -> None:
    def one(ranks: Ranks) -> tuple[list[str], list[str], list[list[int]]]:
        quarantine = Quarantine(2)
        dataset = ShardDataset([shard], quarantine=quarantine)
        heldout = Heldout(dataset, quarantine, 5, ranks=ranks)
        heldout.divide(ranks, equal_runs)
        keys, shares = [], []
        for share in heldout.rounds():
            assert share.read is not None
            own = [share.read(place) for place in share.shares[ranks.rank]]
            keys.append("".join(prompt.key for prompt in own if prompt is not None))
            shares.append([place for places in share.shares for place in places])
        return keys, sorted(bad.key for bad in quarantine.bad), shares

    found = on_threads(num_ranks, one)
    assert all(shares == [[0, 1, 2, 3, 4], [5]] for _, _, shares in found), "then one for the bad one"
    assert sorted("".join("".join(keys) for keys, _, _ in found)) == list("acdef")
    assert all(bad == ["b"] for _, bad, _ in found)


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
