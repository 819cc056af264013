"""From image files to pixels: every kind, orientation and depth is seen upright, as 8-bit RGB, and once."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image, ImageOps

from megatron_sr1.data.index import index_path, read_index
from megatron_sr1.data.pictures import SHARD_FORMATS, SOURCE_FORMATS, as_seen, decode_picture, picture_size
from tests.build_cases import load_tool, problems, run_jsonl, samples
from tests.data_cases import encoded
from tests.picture_cases import SIDES, blocks, picture_files, stored, upright


@pytest.mark.parametrize("seed", range(8))
def test_every_picture_is_seen_upright_in_8_bits_on_white(seed: int) -> None:
    for file in picture_files(seed):
        picture = decode_picture(file.data, SOURCE_FORMATS)
        assert (picture.mode, picture.info) == ("RGB", {}), file.name
        assert not picture.getexif(), file.name
        found = np.asarray(picture).astype(int)
        assert found.shape == file.seen.shape, file.name
        assert np.abs(found - file.seen).max() <= file.tolerance, file.name


@pytest.mark.parametrize("seed", range(4))
def test_sizes_from_headers_are_those_of_the_pictures(seed: int) -> None:
    for file in picture_files(seed):
        if Image.open(io.BytesIO(file.data)).format in SHARD_FORMATS:
            height, width, _ = file.seen.shape
            assert picture_size(file.data, SHARD_FORMATS) == (width, height), file.name


@pytest.mark.parametrize("orientation", SIDES)
def test_turns_agree_with_pillows(orientation: int) -> None:
    pixels = blocks(np.random.default_rng(orientation), 40, 24, 3)
    assert (upright(stored(pixels, orientation), orientation) == pixels).all()
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(stored(pixels, orientation))).save(buffer, format="PNG", exif=exif.tobytes())
    theirs = ImageOps.exif_transpose(Image.open(buffer))
    assert (np.asarray(decode_picture(buffer.getvalue(), SHARD_FORMATS)) == np.asarray(theirs)).all()
    assert (np.asarray(theirs) == pixels).all()


def test_the_header_of_a_png_without_marks_costs_no_decoding() -> None:
    """Its pixels are cut off: whoever decoded them would fail."""
    buffer = io.BytesIO()
    Image.fromarray(blocks(np.random.default_rng(0), 400, 240, 3)).save(buffer, format="PNG")
    assert picture_size(buffer.getvalue()[:200], SHARD_FORMATS) == (400, 240)


def test_damaged_or_odd_exif_leaves_the_picture_as_it_is() -> None:
    image = Image.fromarray(blocks(np.random.default_rng(0), 40, 24, 3))
    for exif in (b"Exif\x00\x00nonsense", b"Exif\x00\x00MM\x00*\x00\x00", b"Exif\x00\x00II*\x00\xff\xff\xff\xff"):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", exif=exif)
        assert decode_picture(buffer.getvalue(), SHARD_FORMATS).size == (40, 24)
    exif = Image.Exif()
    exif[0x0112] = 99
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", exif=exif.tobytes())
    assert decode_picture(buffer.getvalue(), SHARD_FORMATS).size == (40, 24)


def test_a_16_bit_picture_with_white_as_zero_and_one_with_a_transparent_grey() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, format="TIFF", tiffinfo={262: 0})
    seen = np.asarray(decode_picture(buffer.getvalue(), SOURCE_FORMATS))[..., 0]
    assert (seen[0, 0], seen[-1, -1]) == (255, 0)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, format="PNG", transparency=0)
    seen = np.asarray(decode_picture(buffer.getvalue(), SHARD_FORMATS))[..., 0]
    assert (seen[0, 0], seen[0, 1], seen[-1, -1]) == (255, 0, 255)


def _chunk(name: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize(("bits", "colour"), [(2, 0), (4, 0), (16, 2)])
def test_the_transparent_colour_of_a_png_of_any_depth_is_white(bits: int, colour: int) -> None:
    """Written here after the PNG specification: Pillow writes 8 and 16 bit."""
    values, scale = [0, 1, 2, 3], 16384 if bits == 16 else 1
    fields = [value * scale for value in values for _ in range(1 if colour == 0 else 3)]
    packed = int("".join(f"{field:0{bits}b}" for field in fields), 2).to_bytes(len(fields) * bits // 8, "big")
    key = struct.pack(">H", scale) * (1 if colour == 0 else 3)
    parts = [
        _chunk(b"IHDR", struct.pack(">IIBBBBB", len(values), 1, bits, colour, 0, 0, 0)),
        *(_chunk(b"tRNS", key), _chunk(b"IDAT", zlib.compress(b"\0" + packed)), _chunk(b"IEND", b"")),
    ]
    seen = np.asarray(decode_picture(b"\x89PNG\r\n\x1a\n" + b"".join(parts), SHARD_FORMATS))[0, :, 0]
    levels = [round(value * scale * 255 / (2**bits - 1)) for value in values]
    assert abs(seen.astype(int) - [levels[0], 255, *levels[2:]]).max() <= 1


def _png_of_16_bit(colours: np.ndarray) -> bytes:
    height, width, channels = colours.shape
    kind = {2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    parts = [_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))]
    parts += [_chunk(b"IDAT", zlib.compress(rows)), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _tiff_of_16_bit(colours: np.ndarray, order: str) -> bytes:
    """After TIFF 6.0: one strip, not compressed."""
    height, width, _ = colours.shape
    data = colours.astype(f"{order}u2").tobytes()
    behind = 8 + 2 + 9 * 12 + 4
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, behind), (259, 3, 1, 1), (262, 3, 1, 2)]
    tags += [(273, 4, 1, behind + 6), (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(data))]
    file = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    for tag, kind, count, value in tags:
        short = kind == 3 and count == 1
        written = struct.pack(f"{order}HH", value, 0) if short else struct.pack(f"{order}I", value)
        file += struct.pack(f"{order}HHI", tag, kind, count) + written
    return file + bytes(4) + struct.pack(f"{order}HHH", 16, 16, 16) + data


def test_colours_of_16_bit_are_seen_by_their_range_or_refused() -> None:
    """Pillow keeps their high byte without a word: 12-bit values in 16 bits would be seen black."""
    full = blocks(np.random.default_rng(0), 32, 24, 3).astype(np.uint16) * np.uint16(257)
    opaque = np.full((24, 32, 1), 65535, dtype=np.uint16)

    def ppm(colours: np.ndarray) -> bytes:
        return b"P6\n32 24\n65535\n" + colours.astype(">u2").tobytes()

    def files(colours: np.ndarray) -> list[tuple[bytes, int]]:
        return [
            (_png_of_16_bit(colours), 3),
            (_png_of_16_bit(np.dstack([colours, opaque])), 3),
            (_png_of_16_bit(np.dstack([colours[..., :1], opaque])), 1),
            (_tiff_of_16_bit(colours, "<"), 3),
            (_tiff_of_16_bit(colours, ">"), 3),
            (ppm(colours), 3),
        ]

    for data, channels in files(full):
        seen = np.asarray(decode_picture(data, SOURCE_FORMATS))
        wanted = full[..., :channels].astype(int) // 257
        assert np.abs(seen[..., :channels].astype(int) - wanted).max() <= 1
    for data, _ in files(full // 16):  # 12 bit
        with pytest.raises(ValueError, match="stay below 4096 of 65535"):
            decode_picture(data, SOURCE_FORMATS)


def test_a_picture_that_is_transparent_everywhere_is_refused() -> None:
    for image in (Image.new("RGBA", (8, 8), (200, 0, 0, 0)), Image.new("LA", (8, 8), (9, 0))):
        with pytest.raises(ValueError, match="transparent everywhere"):
            as_seen(image)
    strokes = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    strokes.putpixel((3, 3), (255, 255, 255, 255))
    with pytest.raises(ValueError, match="white on transparency"):
        as_seen(strokes)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.full((4, 4), 7.0, dtype=np.float32), "all its values are 7"),
        (np.array([[0.0, np.nan]], dtype=np.float32), "not all finite"),
        (np.array([[0.0, np.inf]], dtype=np.float32), "not all finite"),
    ],
)
def test_values_without_a_range_are_refused(values: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        as_seen(Image.fromarray(values))


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    yield from load_tool()


def test_shards_give_the_pictures_of_their_files(tool: ModuleType, tmp_path: Path) -> None:
    """Also the sizes in the index are those of the upright pictures; what has no range is left out by name."""
    files = picture_files(99)
    images = {f"{number}.bin": file.data for number, file in enumerate(files)}
    flat = io.BytesIO()
    Image.fromarray(np.full((16, 16), 7.0, dtype=np.float32)).save(flat, format="TIFF")
    long = encoded(Image.new("RGB", (2010, 10)))
    images |= {"flat.bin": flat.getvalue(), "long.bin": long}
    rows = [{"problem": f"What is {name}?", "answer": name, "images": [name]} for name in images]
    out = run_jsonl(tool, tmp_path, rows, images)
    found = {sample.answer: sample for sample in samples(out)}
    assert len(found) == len(files)
    for number, file in enumerate(files):
        seen = np.asarray(found[f"{number}.bin"].images[0]).astype(int)
        assert np.abs(seen - file.seen).max() <= file.tolerance, file.name
    sizes = {
        sample.key: sample.image_sizes for path in out.glob("*.tar") for sample in read_index(index_path(path)).samples
    }
    assert all(sizes[sample.key] == (sample.images[0].size,) for sample in found.values())
    reasons = {problem["kind"]: problem["reason"] for problem in problems(out)}
    assert reasons == {
        "unreadable_image": "image 0: all its values are 7 (mode F), which have no range to scale to 8 bit by",
        "image_size": "image 0: one side of 2010 x 10 pixels is over 200 times the other",
    }
