"""What the preflight says of machines, their memory and their disks: each row can warn, or fail."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement

from megatron_sr1.config import Config, LayoutConfig, load_config
from megatron_sr1.estimate import checkpoint_bytes, export_bytes
from megatron_sr1.policy.parameter_counts import StageCount
from megatron_sr1.preflight import (
    RankFacts,
    Row,
    disk_rows,
    fact_rows,
    machine,
    memory_rows,
    write_speed,
)
from megatron_sr1.preflight.facts import _cgroup_limit, _endpoint_refusal, _next_rank, _refusal
from megatron_sr1.preflight.versions import difference
from tests.thread_ranks import Meeting

GIB, MIB = 2**30, 2**20
FACTS = RankFacts(0, "a", 100.0, 90, 20_000, 8 * GIB, 8 * GIB, 64 * GIB, 60 * GIB, 0, 0, (), ())
COUNT = StageCount(0, (4,), 10**9, 10**8, 0, 10**9, 10**7, 11 * 10**8, 0, 9 * 10**7, 10**7)


def rows_by_name(rows: Sequence[Row]) -> dict[str, Row]:
    assert len({row.name for row in rows}) == len(rows)
    return {row.name: row for row in rows}


# ---------------------------------------------------------------- machines
@pytest.mark.parametrize(
    ("name", "changes", "verdict", "words"),
    [
        ("versions", {"versions": ("torch 2.1 is not ==2.13.0",)}, "warn", ["torch 2.1", "on b", "make setup"]),
        ("clocks", {"clock": 102.5}, "warn", ["b is 2.5 s ahead of a"]),
        ("open files", {"most_files": 300}, "warn", ["90 of at most 300", "rank 1", "ulimit -n"]),
        ("open files", {"most_files": 200}, "fail", ["ulimit -n"]),
        ("ports", {"unreachable": ("rank 0, where the ranks met (n:1): timed out",)}, "fail", ["n:1", "IFNAME"]),
        ("ports", {"unreachable": ("the endpoint http://j (j:80): refused",)}, "fail", ["rewards.judge.url"]),
    ],
)
def test_what_one_of_two_ranks_measures(name: str, changes: dict[str, Any], verdict: str, words: list[str]) -> None:
    config = Config()
    good = rows_by_name(fact_rows([FACTS, replace(FACTS, rank=1, host="b")], config))
    assert {row.verdict for row in good.values()} == {"pass"}
    found = rows_by_name(fact_rows([FACTS, replace(FACTS, rank=1, host="b", **changes)], config))
    assert found[name].verdict == verdict and all(word in str(found[name]) for word in words), found[name]
    assert all(row.verdict == "pass" for row in found.values() if row.name != name)


@pytest.mark.parametrize(("free", "verdict"), [(8 * GIB, "pass"), (200 * MIB, "warn"), (60 * MIB, "fail")])
def test_shared_memory_counts_where_ranks_share_it(free: int, verdict: str) -> None:
    config = load_config(None, ["nproc=2", "rollout.engine_tensor=2"])
    pair = [replace(FACTS, rank=rank, shared_free=free) for rank in range(2)]
    cards = [replace(fact, card_total=80 * GIB) for fact in pair]
    for facts, used in ((pair, config), (cards, Config())):
        assert rows_by_name(fact_rows(facts, used))["shared memory"].verdict == verdict
    for facts in (pair, cards[:1], [replace(fact, shared_total=-1, shared_free=-1) for fact in cards]):
        assert rows_by_name(fact_rows(facts, Config()))["shared memory"].verdict == "pass"


def test_other_users_of_a_card_are_told() -> None:
    facts = [replace(FACTS, card_total=80 * GIB, card_others=others * GIB) for others in (1, 30)]
    assert rows_by_name(fact_rows(facts, Config()))["other users"].verdict == "warn"
    assert rows_by_name(fact_rows(facts[:1], Config()))["other users"].verdict == "pass"


def test_a_port_that_does_not_answer_is_told() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        assert _refusal("x", "127.0.0.1", port) == ""
        through = {"http": f"http://127.0.0.1:{port}"}
        assert _endpoint_refusal(f"http://127.0.0.1:{port}/v1", {}) == ""
        assert _endpoint_refusal("http://judge.invalid/v1", through) == "", "asked through the proxy alone"
    assert f"x (127.0.0.1:{port}): " in _refusal("x", "127.0.0.1", port)
    assert "the endpoint http://127.0.0.1" in _endpoint_refusal(f"http://127.0.0.1:{port}/v1", {})


def test_each_rank_is_reached_by_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = Meeting(3)

    def reach(rank: int) -> str:
        ranks = meeting.of(rank)
        platform: Any = SimpleNamespace(
            rank=rank, world_size=3, ranks=SimpleNamespace(gather=ranks.gather, meet=lambda: ranks.gather([0]))
        )
        return _next_rank(platform, "")

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(reach, range(3))) == ["", "", ""]
        monkeypatch.setattr(socket, "create_connection", refuse)
        assert [line.split(",")[0] for line in pool.map(reach, range(3))] == ["rank 1", "rank 2", "rank 0"]


def test_a_machine_that_knows_its_loopback_alone_is_not_said_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where /etc/hosts gives the machine's own name to 127.0.1.1: its ranks listen elsewhere."""
    monkeypatch.setattr(socket, "create_connection", refuse)
    places: list[Any] = []

    def gather(mine: list[Any]) -> list[Any]:
        return [*mine, *places]

    ranks = SimpleNamespace(gather=gather, meet=lambda: None)
    platform: Any = SimpleNamespace(rank=0, world_size=2, ranks=ranks)
    places[:] = [("another", "127.0.0.1", 9)]
    assert _next_rank(platform, "") == ""
    places[:] = [("another", "192.0.2.7", 9)]
    assert _next_rank(platform, "").startswith("rank 1, at a port")


def refuse(*arguments: Any) -> Any:
    raise ConnectionRefusedError(111, "Connection refused")


def test_packages_against_what_is_asked_for() -> None:
    assert difference(Requirement("pytest>=1")) == []
    (other,) = difference(Requirement("pytest==0.1"))
    (missing,) = difference(Requirement("no-such-package-of-ours>=2"))
    assert other.startswith("pytest ") and "is not ==0.1" in other
    assert "is missing (>=2" in missing


def test_a_control_group_bounds_the_memory(tmp_path: Path) -> None:
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 300\nactive_file 100\ninactive_file 200\n")
    assert _cgroup_limit(tmp_path) == []
    (tmp_path / "memory.max").write_text("1000\n")
    assert _cgroup_limit(tmp_path) == [(1000, 300)]
    (tmp_path / "memory.max").write_text("max\n")
    assert _cgroup_limit(tmp_path) == []


def test_memory_of_every_phase(tiny_model_dir: str) -> None:
    """A model of a billion parameters, whatever the tiny one's config.json says: what is counted is planned with."""
    config = load_config(None, [f"model.hf_dir={tiny_model_dir}", "rollout.kv_cache_gib=1"])
    few = [replace(FACTS, host_total=8 * GIB, host_free=8 * GIB)]
    (row,) = memory_rows("grpo", config, [COUNT], few)
    assert row.verdict == "fail" and "host memory" in str(row)
    (row,) = memory_rows("grpo", config, [COUNT], [replace(few[0], host_total=64 * GIB)])
    assert row.verdict == "warn", "others have taken it"
    (row,) = memory_rows("grpo", config, [COUNT], [FACTS])
    assert row.verdict == "pass" and "for 1 ranks" in row.found
    card = replace(FACTS, card_total=80 * GIB, host_total=512 * GIB)
    assert [row.verdict for row in memory_rows("grpo", config, [COUNT], [card])] == ["pass", "pass"]
    small = rows_by_name(memory_rows("grpo", config, [COUNT], [replace(card, card_total=16 * GIB)]))
    assert small["card memory"].verdict == "fail" and "phase takes about" in small["card memory"].remedy
    host = rows_by_name(memory_rows("grpo", config, [COUNT], [replace(card, host_total=9 * GIB)]))
    assert host["host memory"].verdict == "fail" and host["card memory"].verdict == "pass"
    uneven = load_config(None, [f"model.hf_dir={tiny_model_dir}", "nproc=3", "train.batch_size=3"])
    facts = [card, replace(card, rank=1), replace(card, rank=2, host="b")]
    (row,) = memory_rows("grpo", uneven, [COUNT], facts)
    assert row.verdict == "warn" and "not checked" in row.found


# ---------------------------------------------------------------- the disk
def test_a_checkpoint_of_all_parameters() -> None:
    config = load_config(None, ["precision.dtype=bf16"])
    assert export_bytes([COUNT], config) == 2 * 11 * 10**8
    assert checkpoint_bytes([COUNT], config) == 14 * 11 * 10**8
    frozen = replace(COUNT, trained=10**9, trained_tower=0, trained_mergers=0)
    assert checkpoint_bytes([frozen], config) == 2 * 11 * 10**8 + 12 * 10**9
    twice = replace(config, layout=LayoutConfig(tensor=2), nproc=2)
    half = replace(COUNT, language=5 * 10**8, trained=6 * 10**8)  # the tower is whole on both
    assert checkpoint_bytes([half], twice) == checkpoint_bytes([COUNT], config)
    also_hf = replace(config, train=replace(config.train, save_hf=True))
    assert checkpoint_bytes([COUNT], also_hf) == 16 * 11 * 10**8


def test_too_small_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, [f"run_dir={tmp_path / 'a' / 'run'}", "precision.dtype=bf16"])
    each, export = checkpoint_bytes([COUNT], config), export_bytes([COUNT], config)
    asked: list[Path] = []

    def rows(free: float, speed: float = 1e12) -> list[str]:
        monkeypatch.setattr(machine, "free_bytes", lambda folder: asked.append(folder) or int(free))
        return [row.verdict for row in disk_rows(config, [COUNT], [(speed, "")], 200)]

    assert rows(3 * each + export + 1) == ["pass", "pass"] and asked == [tmp_path], "what is there of the path"
    assert rows(3 * each + export - 1) == ["warn", "pass"]
    assert rows(each + export - 1) == ["fail", "pass"]
    (tmp_path / "a/run/checkpoints/step_000010").mkdir(parents=True)
    assert rows(2 * each + export + 1) == ["pass", "pass"], "one of them is there"
    assert rows(1) == ["warn", "pass"], "and makes room"
    assert rows(1e15, each / 601) == ["pass", "warn"]
    bad = disk_rows(config, [COUNT], [(0.0, "/x: Permission denied"), (1e9, "")], 200)
    assert bad[1].verdict == "fail" and "Permission denied" in bad[1].found


def test_the_speed_is_that_of_the_nearest_folder(tmp_path: Path) -> None:
    speed, wrong = write_speed(str(tmp_path / "not" / "there"))
    assert speed > 0 and wrong == "" and list(tmp_path.iterdir()) == []
    if os.geteuid():  # root may write anywhere
        tmp_path.chmod(0o500)
        assert "Permission denied" in write_speed(str(tmp_path))[1]
