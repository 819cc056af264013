"""Samples for people: what a model will be given, escaped, and what cannot be used. And models to try it on."""

from __future__ import annotations

import hashlib
import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_sr1.cli import main
from megatron_sr1.config import check_model, load_config
from megatron_sr1.data import write_shards
from megatron_sr1.processor import Processor
from megatron_sr1.show.seen import assembled
from megatron_sr1.show.text import bars, visible
from megatron_sr1.types import Prompt, SftSample
from tests.build_cases import SEE_THINK, write_jsonl
from tests.data_cases import noise, png, write_tar

EVIL = "\x1b[2J[red]<b>&\u202eabc</b>\r\x07"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "qwen3_vl"
    main(["model", "tiny", "--family", "qwen3_vl", "--out", str(out)])
    return out


def show(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    main(["data", "show", *words])
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as status:
        main(list(words))
    assert status.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("somebody asks the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("no_network")
def test_samples_are_shown_as_the_model_sees_them(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = noise(1, (100, 70))
    samples: list[Any] = [
        Prompt("pic", f"How many? {EVIL}", "3", (picture,), "", {"choices": ("3", "4")}),
        SftSample(Prompt("demo", "Which?", "3", (noise(2, (64, 64)),)), "see_think", SEE_THINK),
        *(Prompt(f"p{i}", "word " * i, "1") for i in range(1, 9)),
    ]
    (shard,) = write_shards(samples, tmp_path, "train", 99)
    page = tmp_path / "out" / "page.html"
    printed = show(capsys, str(shard), "--model", str(model_dir), "--num", "2", "--out", str(page))
    processor = Processor.from_pretrained(str(model_dir))
    tokens = processor.num_visual_tokens((100, 70))
    assert "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>" in printed
    assert f"image 1: 100 x 70 pixels, seen as 96 x 64: {tokens} tokens" in printed
    assert "asked by see_think" in printed and f"response: {len(processor.response_ids(SEE_THINK))} tokens" in printed
    assert "10 samples looked at: 10 good, none" in printed and "visual tokens of an image" in printed
    assert "\x1b" not in printed and "\u202e" not in printed and r"\x1b[2J[red]<b>&\u202eabc</b>\r\x07" in printed
    html = page.read_text()
    assert html.count("data:image/png;base64,") == 2 and "<b>" not in html and "&lt;b&gt;" in html
    assert "http" not in html and "\x1b" not in html
    index = show(capsys, f"{shard}.index.json", "--num", "1", "--scan", "2")
    assert "2 samples looked at; there are more: 2 good" in index and "tokens" not in index, "there is no model"


def test_the_picture_is_made_of_the_patches(model_dir: Path) -> None:
    """Of a size that needs no resizing, it is the picture itself."""
    processor = Processor.from_pretrained(str(model_dir))
    picture = noise(3, (96, 64))
    assert np.array_equal(np.asarray(assembled(processor.encode_image(picture), processor)), np.asarray(picture))
    large = Image.new("RGB", (2000, 1000), (10, 20, 30))
    seen = assembled(processor.encode_image(large), processor)
    assert seen.width * seen.height <= 64 * 32**2 and seen.getpixel((5, 5)) == (10, 20, 30)


@pytest.mark.usefixtures("no_network")
def test_what_cannot_be_used_is_told_with_its_reason(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = write_tar(
        tmp_path / "s.tar",
        {
            "a.json": {"problem": "How many?", "answer": "3"},
            "b.json": {"problem": EVIL},
            "c.0.png": png(1)[:40],
            "c.json": {"problem": "How many?", "answer": "3"},
            "d.json": {"problem": "q", "answer": "3", "template": "see_think", "response": "no layout"},
        },
    )
    printed = show(capsys, str(shard), "--model", str(model_dir))
    assert (
        "4 samples looked at: 2 good; 1 responses break the layout of their template, first sample 'd', 2" in printed
        and "\x1b" not in printed
    )
    for reason in ("'b': the required field 'answer'", "sample 'c', image 0: cannot be decoded"):
        assert reason in printed, printed
    rows = write_jsonl(tmp_path / "rows", [{"question": "Which?", "answer": "3"}, "{", {"question": "?", "answer": ""}])
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps({"data": {"train": [str(rows)], "train_columns": {"question": "problem"}}}))
    printed = show(capsys, "--config", str(config), "--model", str(model_dir))
    assert "3 samples looked at: 1 good, 2" in printed and "line 2: unreadable_sample: not JSON" in printed
    printed = show(capsys, str(rows), "--format", "jsonl")
    assert "3 samples looked at: 0 good" in printed and "it has no problem" in printed


def test_what_can_not_be_shown_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing is fetched" in refused(capsys, "data", "show", "https://host/a.tar")
    assert "nothing is fetched" in refused(capsys, "data", "show", "pipe:curl https://host/a.tar")
    assert "nothing to show" in refused(capsys, "data", "show")
    assert "'no/such.tar' matches no file" in refused(capsys, "data", "show", "no/such.tar")
    (tmp_path / "a.tar").write_bytes(b"x" * 1024)
    assert "a.tar" in refused(capsys, "data", "show", str(tmp_path / "a.tar"))
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "nothing in it" in refused(capsys, "data", "show", str(tmp_path / "empty.jsonl"))
    assert "is a folder" in refused(capsys, "data", "show", "x.tar", "--out", str(tmp_path))
    assert "Name it .html" in refused(capsys, "data", "show", "x.tar", "--out", str(tmp_path / "x.tar"))
    assert "0 or more" in refused(capsys, "data", "show", "x.tar", "--num", "-1")


def test_bars_hold_every_value() -> None:
    assert bars([5]) == [("5", 1, 40)]
    found = bars([1, 2, 3, 100])
    assert sum(count for _, count, _ in found) == 4 and found[0][1] == 3 and found[-1][0].endswith("100")
    assert visible("a\tb\ud800c\nd é 漢") == r"a\tb\ud800c" + "\nd é 漢"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"])
def test_a_tiny_model_of_every_family(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForImageTextToText

    out = [tmp_path / "a" / "one", tmp_path / "two", tmp_path / "three"]
    out[1].mkdir()
    for folder, seed in zip(out, ("7", "7", "8"), strict=True):
        main(["model", "tiny", "--family", family, "--out", str(folder), "--seed", seed])
    one, two, three = ({path.name: _digest(path) for path in folder.iterdir()} for folder in out)
    assert one == two and {name for name in one if one[name] != three[name]} == {"model.safetensors"}
    check_model(load_config(None, [f"model.hf_dir={out[0]}"]))
    AutoModelForImageTextToText.from_pretrained(out[0])
    Processor.from_pretrained(str(out[0]))
    assert "is there already" in refused(capsys, "model", "tiny", "--family", family, "--out", str(out[0]))
    file = tmp_path / "file"
    file.touch()
    assert "is there already" in refused(capsys, "model", "tiny", "--family", family, "--out", str(file))
    assert {path.name for path in tmp_path.iterdir()} == {"a", "two", "three", "file"}, "nothing else is left"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
