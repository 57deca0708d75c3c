"""Metadata never decides whether pixels count."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.data.decode import open_picture, to_rgb

PIXELS = np.random.default_rng(0).integers(0, 255, (4, 6, 3), np.uint8)


def jpeg(exif: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "JPEG", quality=100, exif=exif)
    return buffer.getvalue()


def exif_block(orientation: int, broken: bool) -> bytes:
    """TIFF header, one directory: the orientation, and a rational that points nowhere."""
    entries = [struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)]
    if broken:
        entries.append(struct.pack("<HHII", 0x011A, 5, 7, 0xFFFF))
        entries.append(struct.pack("<HHII", 0x9999, 2, 4, 0xFFFFFF))
    body = struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", 0)
    return b"Exif\x00\x00II*\x00\x08\x00\x00\x00" + body


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_whatever_else_the_metadata_hold(
    orientation: int, broken: bool
) -> None:
    want = ImageOps.exif_transpose(Image.open(io.BytesIO(jpeg(exif_block(orientation, False)))))
    found = to_rgb(open_picture(jpeg(exif_block(orientation, broken))))
    assert np.array_equal(found, np.asarray(want.convert("RGB")).transpose(2, 0, 1))


@pytest.mark.parametrize("exif", [b"Exif\x00\x00II*\x00", b"Exif\x00\x00" + b"\xff" * 40])
def test_metadata_that_cannot_be_read_leave_the_image_as_it_is(exif: bytes) -> None:
    want = np.asarray(Image.open(io.BytesIO(jpeg())).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(to_rgb(open_picture(jpeg(exif))), want)


def png(kind: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk after its header."""
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG")
    whole, head = buffer.getvalue(), 8 + 25
    size, check = struct.pack(">I", len(content)), struct.pack(">I", zlib.crc32(kind + content))
    return whole[:head] + size + kind + content + check + whole[head:]


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (b"zTXt", b"Comment\x00\x00" + zlib.compress(bytes(2 << 20))),
        (b"iCCP", b"icc\x00\x00" + zlib.compress(bytes(2 << 20))),
        (b"zTXt", b"Raw profile type exif\x00\x00" + zlib.compress(b"\nexif\n 4\nzzzz")),
    ],
)
def test_text_of_a_png_does_not_keep_its_pixels_out(kind: bytes, content: bytes) -> None:
    assert np.array_equal(to_rgb(open_picture(png(kind, content))), PIXELS.transpose(2, 0, 1))


def test_damaged_pixels_are_still_refused() -> None:
    whole = png(b"tEXt", b"a\x00b")
    place = whole.index(b"IDAT") + 8
    with pytest.raises(ValueError, match="cannot be decoded"):
        to_rgb(open_picture(whole[:place] + b"\x00\x01" + whole[place + 2 :]))
