"""Tars as people make them: unsorted, with a member twice, one behind the other, with dots in their keys.

Every case goes through both doors: `scan_shard`, by which training reads a shard that has no index, and the build.
"""

from __future__ import annotations

import json
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_sr1.data import Quarantine, ShardDataset
from megatron_sr1.data.tar_groups import read_groups
from megatron_sr1.types import Prompt, SftSample
from tests.build_cases import load_tool, problems, run, samples
from tests.data_cases import png, write_tar


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    yield from load_tool()


def question(number: int) -> dict[str, str]:
    return {"problem": f"q{number}", "answer": str(number)}


def colour(sample: Prompt | SftSample) -> list[int]:
    """The grey level of each image."""
    assert isinstance(sample, Prompt)
    return [image.getpixel((0, 0))[0] for image in sample.images]  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]


def read_directly(shard: Path, budget: int = 0) -> tuple[list[Prompt | SftSample], dict[str, str]]:
    """What training would read, and the reason of what it would not by key."""
    quarantine = Quarantine(budget)
    found = ShardDataset([shard], quarantine=quarantine)
    return [found.read(i) for i in range(len(found))], {bad.key: bad.reason for bad in quarantine.bad}


def build(tool: ModuleType, shard: Path) -> tuple[list[Prompt | SftSample], dict[str, str]]:
    out = shard.parent / f"out-{shard.stem}"
    run(tool, "--input", shard, "--format", "webdataset", "--out", out)
    return samples(out), {problem["key"]: problem["reason"] for problem in problems(out)}


def both(tool: ModuleType, shard: Path, budget: int = 0) -> list[tuple[list[Prompt | SftSample], dict[str, str]]]:
    return [read_directly(shard, budget), build(tool, shard)]


def folder_of(path: Path, numbers: range) -> Path:
    path.mkdir(exist_ok=True)
    for i in numbers:
        (path / f"s{i}.json").write_text(json.dumps(question(i)))
        (path / f"s{i}.0.png").write_bytes(png(i))
    return path


def tar(shard: Path, folder: Path, *names: str) -> Path:
    subprocess.run(["tar", "-cf", shard, "-C", folder, *names], check=True)
    return shard


def test_all_json_first_and_then_all_images(tool: ModuleType, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", range(4))
    names = sorted(path.name for path in folder.iterdir())
    shard = tar(tmp_path / "x.tar", folder, *(n for n in names if n.endswith("json")), *names[-2::-2])
    for found, bad in both(tool, shard):
        assert [(sample.key, colour(sample)) for sample in found] == [(f"s{i}", [i]) for i in range(4)]
        assert not bad


@pytest.mark.parametrize("twice", ["s1.json", "s1.0.png"])
def test_a_member_that_occurs_twice_is_named(tool: ModuleType, tmp_path: Path, twice: str) -> None:
    """Next to the first one or appended, `tar -rf`."""
    folder = folder_of(tmp_path / "in", range(3))
    shard = tar(tmp_path / "x.tar", folder, *sorted(path.name for path in folder.iterdir()))
    subprocess.run(["tar", "-rf", shard, "-C", folder, twice], check=True)
    for found, bad in both(tool, shard, budget=1):
        assert [sample.key for sample in found] == ["s0", "s2"]
        assert list(bad) == ["s1"] and f".{twice.partition('.')[2]} occurs 2 times" in bad["s1"]
    with pytest.raises(ValueError, match=r"x\.tar, sample 's1': its member .* occurs 2 times"):
        read_directly(shard)


def test_archives_one_behind_the_other(tool: ModuleType, tmp_path: Path) -> None:
    """`cat a.tar b.tar`, with the padding that tar leaves behind each; a sample may be torn between the two."""
    folder = folder_of(tmp_path / "in", range(5))
    parts = [tar(tmp_path / "a", folder, "s0.json", "s0.0.png", "s1.json")]
    parts += [tar(tmp_path / "b", folder, "s1.0.png", "s2.0.png", "s2.json"), tar(tmp_path / "c", folder, "s3.json")]
    shard = tmp_path / "x.tar"
    shard.write_bytes(b"".join(part.read_bytes() for part in parts))
    for found, bad in both(tool, shard):
        assert [(sample.key, colour(sample)) for sample in found] == [("s0", [0]), ("s1", [1]), ("s2", [2]), ("s3", [])]
        assert not bad


def test_what_follows_an_archive_and_is_none_is_named(tool: ModuleType, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", range(2))
    shard = tar(tmp_path / "x.tar", folder, "s0.json", "s1.json")
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes() + b"more" * 200)
    with pytest.raises(ValueError, match=rf"what follows the end of an archive at byte {size} is none"):
        read_directly(shard)
    with pytest.raises(SystemExit):
        build(tool, shard)


def test_of_a_damaged_tar_in_no_order_nothing_is_used(tmp_path: Path) -> None:
    """Which of its samples have lost an image nobody can tell."""
    folder = folder_of(tmp_path / "in", range(4))
    names = [f"s{i}.json" for i in range(4)] + [f"s{i}.0.png" for i in range(4)]
    shard = tar(tmp_path / "x.tar", folder, *names)
    offset = next(g for g in read_groups(shard).groups if g.key == "s2").members[1].offset
    shard.write_bytes(shard.read_bytes()[:offset])
    with pytest.raises(ValueError, match=r"truncated or damaged.*none is used"):
        read_directly(shard)
    assert read_groups(shard).groups == []


@pytest.mark.parametrize("image", ["COCO_val.{:04d}.0.png", "COCO_val.{:04d}.png"])
def test_keys_with_dots_are_told_apart(tool: ModuleType, tmp_path: Path, image: str) -> None:
    """Also unsorted; `.0001.png` is not image number 1 of one sample."""
    members = {f"in/v1.5/COCO_val.{i:04d}.json": question(i) for i in range(5)}
    images = {f"in/v1.5/{image.format(i)}": png(i) for i in reversed(range(5))}
    shard = write_tar(tmp_path / "x.tar", {**members, **images})
    expected = [(f"in/v1.5/COCO_val_{i:04d}", [i]) for i in range(5)]
    found, bad = build(tool, shard)
    assert [(sample.key, colour(sample)) for sample in found] == expected and not bad
    if image.endswith(".0.png"):  # the other name is none of a shard that is read directly
        assert [(sample.key, colour(sample)) for sample in read_directly(shard)[0]] == expected
    else:
        with pytest.raises(ValueError, match=r"COCO_val_0000\.png': it is neither"):
            read_directly(shard)


@pytest.mark.parametrize(
    "names, message",
    [
        (["k.0001.json", "k.0001.png", "k.0002.png"], r"3 members.*fold into this key.*k\.0002\.png has no json"),
        (["k.meta.json", "k.0.png"], r"k\.0\.png has no json of its own name"),
        (["k.json", "k.0.png", "k.meta.json"], r"k\.meta\.json'? is|k\.meta\.json': it is neither"),
        (["k.0001.png", "k.0002.png", "k.0003.png"], "no json member, but 3 images|0 json members"),
        (["k.json", "k.0.png", "k.txt"], r"k\.txt'?:? (it )?is neither"),
    ],
)
def test_what_cannot_be_told_apart_is_named(tool: ModuleType, tmp_path: Path, names: list[str], message: str) -> None:
    members = {name: question(1) if name.endswith("json") else png(1) for name in names}
    shard = write_tar(tmp_path / "x.tar", {"good.json": question(0), **members})
    for found, bad in both(tool, shard, budget=1):
        assert [sample.key for sample in found] == ["good"] and list(bad) == ["k"]
        assert re.search(message, bad["k"])


def test_a_dotted_key_that_is_taken_is_named(tool: ModuleType, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", {"a_b.json": question(0), "a.b.json": question(1)})
    for found, bad in both(tool, shard, budget=1):
        assert [(sample.key, sample.problem) for sample in found if isinstance(sample, Prompt)] == [("a_b", "q0")]
        assert "a_b" in bad


def test_a_json_that_names_images_is_no_question_without_them(tool: ModuleType, tmp_path: Path) -> None:
    """Nor is one whose images stand in another tar."""
    members = {
        "a.json": {**question(0), "image": "a.png"},
        "b.json": {**question(1), "image": "b.png"},
        "b.png": png(1),
    }
    write_tar(tmp_path / "x-0.tar", {**members, "c.json": question(2), "d.json": question(3)})
    write_tar(tmp_path / "x-1.tar", {"c.0.png": png(2)})
    run(tool, "--input", tmp_path / "x-*.tar", "--format", "webdataset", "--out", tmp_path / "out")
    assert [sample.key for sample in samples(tmp_path / "out")] == ["b", "d"]
    reasons = [(problem["key"], problem["reason"]) for problem in problems(tmp_path / "out")]
    assert [key for key, _ in reasons] == ["a", "c", "c"]
    for (_, reason), part in zip(
        reasons, ("names 1 images, and the tar holds 0", "in another tar", "no json"), strict=True
    ):
        assert part in reason


@pytest.mark.parametrize(
    "names",
    [
        ("json/7.json", "images/7.png"),
        ("7.json", "7_0.png"),
        ("a/7.json", "b/7-1.0.png"),
        ("Q7.json", "q7.png"),
    ],
)
def test_a_json_whose_images_have_another_key_is_no_question_without_them(
    tool: ModuleType, tmp_path: Path, names: tuple[str, str]
) -> None:
    text, image = names
    shard = write_tar(tmp_path / "x.tar", {text: question(0), image: png(1), "70.json": question(2)})
    for found, bad in both(tool, shard, budget=2):
        assert [sample.key for sample in found] == ["70"]
        assert "its images under another key" in bad[text.removesuffix(".json")]


def test_images_stand_in_the_order_in_which_the_json_names_them(tool: ModuleType, tmp_path: Path) -> None:
    named = {**question(0), "images": ["u.1.png", "in/u.0.png"]}
    others = {**question(1), "images": ["x.png", "y.png"]}
    members = {
        "u.json": named,
        "u.0.png": png(1),
        "u.1.png": png(2),
        "v.json": others,
        "v.0.png": png(3),
        "v.1.png": png(4),
    }
    found, bad = build(tool, write_tar(tmp_path / "x.tar", members))
    assert [colour(sample) for sample in found] == [[2, 1], [3, 4]] and not bad


def test_each_header_is_read_once(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a network every header is a request: the workers get the places of the members with their chunk."""
    shard = write_tar(tmp_path / "x.tar", {f"s{i}.json": question(i) for i in range(20)})
    opened: list[object] = []
    whole = tarfile.open

    def counted(*arguments: Any, **options: Any) -> tarfile.TarFile:
        opened.append(options)
        return whole(*arguments, **options)

    monkeypatch.setattr(tarfile, "open", counted)
    assert len(build(tool, shard)[0]) == 20 and len(opened) == 1
