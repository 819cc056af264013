"""How many pixels of an image the model sees: `model.min_pixels` and `model.max_pixels` over its image processor's own.

Before it is cut into patches an image is resized to multiples of one visual token's side, between these numbers of
pixels where that is possible: a very thin image keeps one token's side and may have more.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sr1.config.hf_config import read_hf_config
from megatron_sr1.config.json_section import JsonSection, read_json
from megatron_sr1.config.model import ModelConfig
from megatron_sr1.config.rules import require

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
# what transformers' class takes where a file says nothing: Qwen2VLImageProcessor, which all families have
_DEFAULTS = (56 * 56, 28 * 28 * 1280)
_KEYS = (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))  # both names of either limit; not lengths
_LARGEST = 2**40


@dataclass(frozen=True)
class PixelLimits:
    """Of an image as it is cut into patches."""

    least: int
    most: int


def image_processor(folder: Path) -> JsonSection:
    """The image processor's section: of processor_config.json, where releases from 5 on keep it and where they look
    first, else preprocessor_config.json.

    Raises:
        ConfigError: the file cannot be read.
    """
    if (folder / PROCESSOR).is_file():
        processor = read_json(folder / PROCESSOR)
        if not processor.is_null("image_processor"):
            return processor.section("image_processor")
    return read_json(folder / PREPROCESSOR)


def check_stated_pixels(found: JsonSection) -> None:
    """
    Raises:
        ConfigError: a limit of the image processor is no number, or its limits exclude each other.
    """
    limits = [(found, "min_pixels", "max_pixels")]
    if isinstance(found.values.get("size"), dict):
        limits.append((found.section("size"), "shortest_edge", "longest_edge"))
    for section, low, high in limits:
        if not section.is_null(low) and not section.is_null(high):
            most = section.count(high, largest=_LARGEST)
            section.check(section.count(low, largest=_LARGEST) <= most, low, f"at most {high}={most}")


def pixel_limits(model: ModelConfig) -> PixelLimits | None:
    """What is asked for; a key that is null has what the model's files say. None: both are, so the files are all.

    Raises:
        ConfigError: the files cannot be read.
    """
    if model.min_pixels is None and model.max_pixels is None:
        return None
    least, most = model.min_pixels, model.max_pixels
    if least is None or most is None:
        stated = _stated(image_processor(Path(model.hf_dir)))
        least, most = (own if asked is None else asked for asked, own in zip((least, most), stated, strict=True))
    return PixelLimits(least, most)


def check_pixels(model: ModelConfig, room: int | None = None) -> None:
    """Whether images can be made of such a size; what the image processor's file says counts where it is there.

    Args:
        room: tokens that an engine leaves to a prompt; None: there is no engine.

    Raises:
        ConfigError: a limit below one visual token, limits that exclude each other, or images that fit no prompt.
    """
    side = read_hf_config(model.hf_dir).visual_token_side
    for name in ("min_pixels", "max_pixels"):
        value = getattr(model, name)
        require(
            value is None or value >= side**2,
            f"model.{name}",
            value,
            f"at least {side**2}, one visual token of {side} x {side} pixels",
            "Raise it, or leave it out for what the model's files say.",
        )
    has_file = any((Path(model.hf_dir) / name).is_file() for name in (PREPROCESSOR, PROCESSOR))
    limits = pixel_limits(model) if has_file or None not in (model.min_pixels, model.max_pixels) else None
    if limits is not None:  # both keys in the wrong order are refused already: one is the file's
        name = "max_pixels" if model.min_pixels is None else "min_pixels"
        bound = f"at least min_pixels={limits.least}" if name == "max_pixels" else f"at most max_pixels={limits.most}"
        require(
            limits.least <= limits.most,
            f"model.{name}",
            getattr(model, name),
            f"{bound} of the image processor in {model.hf_dir}",
            "Set model.min_pixels and model.max_pixels both.",
        )
    if room is not None and model.min_pixels is not None:
        least = model.min_pixels // side**2
        require(
            least < room,
            "model.min_pixels",
            model.min_pixels,
            f"less than {room} visual tokens of {side**2} pixels, which rollout.max_model_tokens - max_response_tokens "
            f"leave to a prompt; these are {least}",
            "Lower it, or raise rollout.max_model_tokens.",
        )


def write_pixel_limits(folder: Path, limits: PixelLimits) -> None:
    """Sets the limits in the image processor's files of a model folder, under the names that they stand there; nothing
    else in them changes.

    Raises:
        ConfigError: a file cannot be read.
    """
    for file in (folder / PREPROCESSOR, folder / PROCESSOR):
        if not file.is_file():
            continue
        tree: dict[str, Any] = dict(read_json(file).values)
        settings = tree if file.name == PREPROCESSOR else tree.get("image_processor")
        if not isinstance(settings, dict):
            continue
        has_size = isinstance(settings.get("size"), dict)
        for (pixels, _), value in zip(_KEYS, (limits.least, limits.most), strict=True):
            if not has_size or settings.get(pixels) is not None:
                settings[pixels] = value
        if has_size:
            settings["size"] = {"shortest_edge": limits.least, "longest_edge": limits.most}
        file.unlink()  # a copy of a file that nobody may write to is one itself
        file.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _stated(found: JsonSection) -> tuple[int, int]:
    """As transformers reads them: the older names win."""
    size = found.section("size") if isinstance(found.values.get("size"), dict) else None
    limits = []
    for (pixels, edge), default in zip(_KEYS, _DEFAULTS, strict=True):
        if not found.is_null(pixels):
            limits.append(found.count(pixels, largest=_LARGEST))
        elif size is not None and not size.is_null(edge):
            limits.append(size.count(edge, largest=_LARGEST))
        else:
            limits.append(default)
    return limits[0], limits[1]
