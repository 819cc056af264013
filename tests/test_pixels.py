"""model.min_pixels and model.max_pixels: what they refuse, and the same grid everywhere: ours, transformers' own image
processor, the exported files, the builder of shards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoImageProcessor, Qwen2VLImageProcessor

from megatron_sr1.config import (
    Config,
    ConfigError,
    ModelConfig,
    PixelLimits,
    check_command,
    check_pixels,
    load_config,
    pixel_limits,
    write_pixel_limits,
)
from megatron_sr1.processor import Processor
from megatron_sr1.weights import write_hf_dir
from tests.hf_config_cases import SMALL, write_config

SIZES = ((1, 1), (28, 28), (3, 100), (100, 3), (1900, 10), (27, 29), (333, 1001), (1500, 1499))
PATCHES = {"Qwen2.5-VL": 14, "Qwen3-VL": 16}
FILES: dict[str, dict[str, Any]] = {  # as the families are published, and what else is found
    "pixels": {"min_pixels": 3136, "max_pixels": 12_845_056},
    "size": {"size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}},
    "both": {"min_pixels": 3136, "max_pixels": None, "size": {"shortest_edge": 1, "longest_edge": 999_999}},
    "neither": {},
}


@pytest.fixture(params=[(name, family) for name in FILES for family in PATCHES], ids="-".join)
def folder(request: pytest.FixtureRequest, tiny_model_dir: str, tmp_path: Path) -> Path:
    """A model folder whose image processor says the limits in one of the ways."""
    name, family = request.param
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    path = tmp_path / "model" / "preprocessor_config.json"
    kept = {key: value for key, value in json.loads(path.read_text()).items() if not key.endswith("_pixels")}
    path.write_text(json.dumps(kept | FILES[name] | {"patch_size": PATCHES[family]}))
    return tmp_path / "model"


def _grids(processor: Any, sizes: tuple[tuple[int, int], ...] = SIZES) -> list[tuple[int, ...]]:
    found = processor(images=[Image.new("RGB", size) for size in sizes])["image_grid_thw"]
    return [tuple(grid.tolist()) for grid in found]


@pytest.mark.parametrize("asked", [(None, 40_000), (40_000, None), (20_000, 30_000), (None, 1024), (1024, 1024)])
def test_the_grid_is_transformers_of_the_same_limits(folder: Path, asked: tuple[int | None, int | None]) -> None:
    """Also where an image becomes one token, and where a thin one cannot be held by its limit."""
    theirs = AutoImageProcessor.from_pretrained(folder)
    least, most = (own if value is None else value for value, own in zip(asked, _limits(theirs), strict=True))
    limits = pixel_limits(ModelConfig(hf_dir=str(folder), min_pixels=asked[0], max_pixels=asked[1]))
    assert limits == PixelLimits(least, most)
    ours = Processor.from_pretrained(str(folder), pixels=limits)
    wanted = _grids(Qwen2VLImageProcessor(size={"shortest_edge": least, "longest_edge": most}, **_cut(theirs)))
    assert [ours.grid(size) for size in SIZES] == wanted
    image = Image.effect_noise((211, 97), 90).convert("RGB")
    assert ours.encode_image(image).patches().shape[0] == _patches(wanted_of(least, most, theirs, image.size))

    write_hf_dir([], str(folder), folder.parent / "export", pixels=limits)
    exported = AutoImageProcessor.from_pretrained(folder.parent / "export")
    assert _grids(exported) == wanted, "what is exported sees the same"
    assert [Processor.from_pretrained(str(folder.parent / "export")).grid(size) for size in SIZES] == wanted
    _check_unchanged(folder, folder.parent / "export")


def wanted_of(least: int, most: int, theirs: Any, size: tuple[int, int]) -> tuple[int, ...]:
    size_of = {"shortest_edge": least, "longest_edge": most}
    return _grids(Qwen2VLImageProcessor(size=size_of, **_cut(theirs)), (size,))[0]


def _patches(grid: tuple[int, ...]) -> int:
    return grid[0] * grid[1] * grid[2]


def _limits(processor: Any) -> tuple[int, int]:
    return processor.size["shortest_edge"], processor.size["longest_edge"]


def _cut(processor: Any) -> dict[str, int]:
    return {name: getattr(processor, name) for name in ("patch_size", "merge_size", "temporal_patch_size")}


def _check_unchanged(source: Path, export: Path) -> None:
    """Nothing but the limits, in the one file."""
    for file in source.iterdir():
        if file.suffix == ".json" and file.name != "preprocessor_config.json":
            assert (export / file.name).read_bytes() == file.read_bytes(), file.name
    before, after = (json.loads((path / "preprocessor_config.json").read_text()) for path in (source, export))
    names = ("size", "min_pixels", "max_pixels")
    assert {key: before[key] for key in before if key not in names} == {
        key: after[key] for key in after if key not in names
    }
    assert "size" not in after or "size" in before


def test_without_limits_an_export_has_the_files_as_they_are(folder: Path) -> None:
    assert pixel_limits(ModelConfig(hf_dir=str(folder))) is None
    (folder / "preprocessor_config.json").chmod(0o444)  # as a cache of downloads has it
    write_hf_dir([], str(folder), folder.parent / "export", pixels=None)
    assert (folder.parent / "export" / "preprocessor_config.json").read_bytes() == (
        folder / "preprocessor_config.json"
    ).read_bytes()
    write_hf_dir([], str(folder), folder.parent / "export", pixels=PixelLimits(2000, 3000))
    assert _limits(AutoImageProcessor.from_pretrained(folder.parent / "export")) == (2000, 3000)


def test_both_files_of_an_image_processor_get_the_limits(folder: Path) -> None:
    """transformers from 5 on reads the one, older releases the other."""
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    other = {"processor_class": "Qwen2_5_VLProcessor", "image_processor": settings | {"min_pixels": 5000}}
    (folder / "processor_config.json").write_text(json.dumps(other))
    limits = pixel_limits(ModelConfig(hf_dir=str(folder), max_pixels=50_000))
    assert limits == PixelLimits(5000, 50_000), "the one that transformers reads counts"
    write_pixel_limits(folder, limits)
    assert _limits(AutoImageProcessor.from_pretrained(folder)) == (5000, 50_000)
    (folder / "processor_config.json").unlink()
    assert _limits(AutoImageProcessor.from_pretrained(folder)) == (5000, 50_000)


# ---------------------------------------------------------------- refusals
@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A model of 28 x 28 pixels a visual token, whose image processor allows 3136 to 100352 of them."""
    write_config(tmp_path, SMALL)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 3136, "max_pixels": 100_352}))
    return tmp_path


def _config(folder: Path, *words: str) -> Config:
    return load_config(None, [f"model.hf_dir={folder}", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["min_pixels=0"], r"model\.min_pixels=0 is not allowed: it must be at least 1"),
        (["max_pixels=-784"], r"model\.max_pixels=-784 is not allowed: it must be at least 1"),
        (["max_pixels=true"], r"model\.max_pixels.*'True'"),
        (["min_pixels=5e5"], r"model\.min_pixels.*500000\.0"),
        (["max_pixels=[1000]"], r"model\.max_pixels=\[1000\] is not allowed"),
        (["min_pixels=5000", "max_pixels=4000"], r"min_pixels=5000 is not allowed: .* at most model\.max_pixels=4000"),
        (["max_pixels=783"], r"max_pixels=783 .* at least 784, one visual token of 28 x 28 pixels"),
        (["min_pixels=1"], r"min_pixels=1 .* at least 784"),
        (["max_pixels=2000"], r"model\.max_pixels=2000 .* at least min_pixels=3136 of the image processor in"),
        (["min_pixels=200000"], r"model\.min_pixels=200000 .* at most max_pixels=100352 of the image processor in"),
        (
            ["min_pixels=5000000", "max_pixels=9000000"],
            r"model\.min_pixels=5000000 .* less than 6144 visual tokens .* these are 6377\. Lower it",
        ),
    ],
)
def test_limits_that_cannot_be_are_refused_before_anything_starts(small: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_command("grpo", _config(small, *(f"model.{word}" for word in words)))


def test_limits_that_can_be_are_taken(small: Path) -> None:
    check_command("grpo", _config(small, "model.min_pixels=784", "model.max_pixels=784"))
    check_command("sft", _config(small, "model.min_pixels=5000000", "model.max_pixels=9000000"))  # has no engine
    (small / "preprocessor_config.json").unlink()  # a dry run needs no more than config.json
    check_command("grpo", _config(small, "model.max_pixels=2000"))
    with pytest.raises(ConfigError, match="max_pixels=783"):
        check_pixels(ModelConfig(hf_dir=str(small), max_pixels=783))


def test_an_engines_argument_may_not_say_it_otherwise(small: Path) -> None:
    with pytest.raises(ConfigError, match=r"mm_processor_kwargs=.* Set model\.min_pixels and model\.max_pixels"):
        check_command("grpo", _config(small, "rollout.engine={mm_processor_kwargs: {max_pixels: 5000}}"))
