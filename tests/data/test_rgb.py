"""Pictures of every mode become the RGB that they show; the values are worked out by hand."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from perl.data.pictures import open_image
from perl.types import UserError
from tests.messages import refused, tells

LEAST, MOST = 340, 341
"""TIFF's tags for the range of the values."""


def tiff(values: Any, dtype: str, **tags: Any) -> bytes:
    """A TIFF of one row, of any type and byte order, by hand: Pillow writes few of them. `tags` are t262=(type, value)."""
    array = np.array(values, dtype)
    order, data = "MM" if array.dtype.byteorder == ">" else "II", array.tobytes()
    sign = {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    entries = {256: (4, array.size), 257: (4, 1), 258: (3, 8 * array.itemsize), 259: (3, 1)}
    entries |= {262: (3, 1), 273: (4, 8), 278: (4, 1), 279: (4, len(data)), 339: (3, sign)}
    entries |= {int(name[1:]): value for name, value in tags.items()}
    big = ">" if order == "MM" else "<"
    start = 8 + len(data)
    out = order.encode() + np.array([42], big + "u2").tobytes()
    out += np.array([start], big + "u4").tobytes() + data
    out += np.array([len(entries)], big + "u2").tobytes()
    for tag, (kind, value) in sorted(entries.items()):
        out += np.array([tag, kind], big + "u2").tobytes() + np.array([1], big + "u4").tobytes()
        form = {3: "u2", 4: "u4", 9: "i4", 11: "f4"}[kind]
        out += np.array([value], big + form).tobytes().ljust(4, b"\0")
    return out + bytes(4)


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def deep_colours(values: list[int], clear: int) -> bytes:
    """A PNG of 16 bits for each of red, green and blue, which Pillow does not write; one value is transparent."""
    pixels = np.repeat(np.array(values, ">u2"), 3).tobytes()
    header = struct.pack(">IIBBBBB", len(values), 1, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", struct.pack(">HHH", *[clear] * 3))]
    chunks += [(b"IDAT", zlib.compress(b"\0" + pixels)), (b"IEND", b"")]
    out = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(out)


def greys(source: Any) -> list[int]:
    """The row of greys that is seen."""
    seen = np.asarray(open_image(source, "row 3, image 1"))
    assert seen.ndim == 3 and (seen == seen[..., :1]).all()
    return seen[0, :, 0].tolist()


SIXTEEN = [0, 128, 129, 257, 32768, 65406, 65407, 65535]  # 257 of them a step; halves from 128.5 on
EIGHT = [0, 0, 1, 1, 128, 254, 255, 255]


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_16_bits_are_scaled_by_their_type(dtype: str) -> None:
    assert greys(tiff(SIXTEEN, dtype)) == EIGHT
    signed = [value - 32768 for value in SIXTEEN]
    assert greys(tiff(signed, dtype.replace("u", "i"))) == EIGHT
    # White is 0 where the file says so, which Pillow reads in one byte order.
    if dtype == "<u2":
        assert greys(tiff(SIXTEEN, dtype, t262=(3, 0))) == [255 - grey for grey in EIGHT]


def test_16_bits_in_png_and_pgm() -> None:
    array = np.array([SIXTEEN], np.uint16)
    assert greys(saved(Image.fromarray(array))) == EIGHT
    assert greys(Image.fromarray(array)) == EIGHT
    assert greys(saved(Image.fromarray(array), "PPM")) == EIGHT
    # 257 stands for what is transparent, which becomes white.
    assert greys(saved(Image.fromarray(array), transparency=257)) == [0, 0, 1, 255, *EIGHT[4:]]
    colours = deep_colours([258, 128, 65535], clear=258)  # their high bytes
    assert greys(colours) == [255, 0, 255]
    ten = b"P5 4 1 1023\n" + np.array([0, 2, 512, 1023], ">u2").tobytes()
    assert greys(ten) == [0, 0, 128, 255]


def test_12_bits_are_scaled_by_theirs() -> None:
    packed = bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x10])  # 0, 2048, 4095, 16
    whole = tiff([0] * 3, "<u2", t258=(3, 12), t256=(4, 4), t279=(4, 6))
    assert greys(whole[:8] + packed + whole[14:]) == [0, 128, 255, 1]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    ("kind", "tag_type", "values", "ends"),
    [
        ("f4", 11, [0.0, 0.25, 0.5, 1.0], (0.0, 1.0)),
        ("f4", 11, [-1.0, -0.5, 0.0, 1.0], (-1.0, 1.0)),
        ("i4", 9, [-100, -50, 0, 100], (-100, 100)),
    ],
)
def test_32_bits_are_scaled_where_the_file_gives_their_range(
    order: str, kind: str, tag_type: int, values: list[float], ends: tuple[float, float]
) -> None:
    least, most = ((tag_type, end) for end in ends)
    assert greys(tiff(values, order + kind, t340=least, t341=most)) == [0, 64, 128, 255]
    narrow = tiff(values, order + kind, t340=least, t341=(tag_type, values[2]))
    with refused("row 3, image 1", f"{ends[0]:g} to {values[2]:g}"):
        open_image(narrow, "row 3, image 1")


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("name", ["<f4", ">f4", "<u4", "<i4", ">i4", "I", "F", "pfm"])
def test_32_bits_without_a_range_are_refused(name: str, decode: bool, tmp_path: Path) -> None:
    """At the start, by the header, with what to do; they were white or black."""
    source: Any = Image.new(name, (2, 1)) if name in "IF" else tmp_path / "deep"
    if name == "pfm":
        source.write_bytes(b"Pf\n2 1\n-1.0\n" + np.array([0.0, 1.0], "<f4").tobytes())
    elif isinstance(source, Path):
        source.write_bytes(tiff([0, 1], name))
    what = "floating-point" if "f" in name.lower() else "32-bit"
    with refused("row 3, image 1", what, "8 bits", "astype('uint8')"):
        open_image(source, "row 3, image 1", decode=decode)


def test_no_number_is_no_colour() -> None:
    bad = tiff([0.0, np.nan], "<f4", t340=(11, 0.0), t341=(11, 1.0))
    with refused("row 3, image 1", "0 to 1"):
        open_image(bad, "row 3, image 1")


def test_8_bits_of_every_mode() -> None:
    row = Image.new("L", (3, 1))
    row.putdata([0, 100, 255])
    assert greys(saved(row)) == [0, 100, 255]
    assert greys(saved(row, transparency=100)) == [0, 255, 255]
    assert greys(saved(row.convert("1", dither=Image.Dither.NONE))) == [0, 0, 255]
    clear = Image.merge("LA", [row, Image.frombytes("L", (3, 1), bytes([255, 0, 128]))])
    assert greys(saved(clear)) == [0, 255, 255]
    half = Image.merge("LA", [row, Image.new("L", (3, 1), 51)])  # a fifth of it on white
    assert greys(saved(half)) == [204, 224, 255]
    palette = Image.new("P", (3, 1))
    palette.putdata([0, 1, 2])
    palette.putpalette([0, 0, 0, 100, 100, 100, 9, 9, 9])
    assert greys(saved(palette)) == [0, 100, 9]
    assert greys(saved(palette, transparency=1)) == [0, 255, 9]
    assert greys(saved(palette, transparency=bytes([255, 0, 51]))) == [0, 255, 206]
    colours = Image.merge("RGB", [row] * 3)
    assert greys(saved(colours, transparency=(100, 100, 100))) == [0, 255, 255]
    ink = Image.merge("CMYK", [Image.new("L", (3, 1))] * 3 + [row])
    assert greys(saved(ink, "TIFF")) == [255, 155, 0]
    assert greys(ink) == [255, 155, 0]
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    seen = open_image(saved(red, "JPEG", quality=100), "").getpixel((0, 0))
    assert seen == pytest.approx((255, 0, 0), abs=3)


def test_what_is_deep_is_turned_upright_too() -> None:
    image = Image.fromarray(np.array([[0, 65535]], np.uint16))
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[274] = 8  # a quarter turn
    seen = open_image(saved(image, "TIFF", tiffinfo=tags), "")
    assert seen.size == (1, 2)
    assert [seen.getpixel((0, y)) for y in (0, 1)] == [(255,) * 3, (0,) * 3]


def test_what_is_wrong_with_a_sound_picture_is_said_once() -> None:
    with pytest.raises(UserError) as error:
        open_image(saved(Image.new("1", (40000, 1))), "row 3, image 1")
    tells(error.value, "40000 x 1", "32,768")
    assert str(error.value).count("row 3") == 1 and "broken" not in str(error.value)
