"""The parser of prediction requests: what it reads, and what it refuses with which status."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.serving.request_images import Limits, RequestError, read_images

LIMITS = Limits(image_size=8, max_images=4, max_bytes=20_000)
JSON = "application/json"


def pixels(count: int = 2) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (count, 3, 8, 8), dtype=np.uint8)


def encoded(image_CHW: np.ndarray[Any, Any], kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(image_CHW.transpose(1, 2, 0)).save(out, kind)
    return out.getvalue()


def form(contents: list[bytes], name: bytes = b"xyz") -> bytes:
    head = b"\r\nContent-Disposition: form-data; name=image; filename=a.png\r\n\r\n"
    return b"".join(b"--" + name + head + c + b"\r\n" for c in contents) + b"--" + name + b"--\r\n"


def huge_png() -> bytes:
    """A PNG of 100 bytes that promises 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data


def test_all_ways_to_send_the_same_images_give_the_same_pixels() -> None:
    pixels_BCHW = pixels()
    wanted = pixels_BCHW.astype(np.float32) / np.float32(255)
    pngs = [encoded(image) for image in pixels_BCHW]
    texts = [base64.b64encode(png).decode() for png in pngs]
    requests = [
        (json.dumps({"images": wanted.tolist()}).encode(), JSON),
        (json.dumps(wanted.tolist()).encode(), f"{JSON}; charset=utf-8"),
        (json.dumps({"images": texts}).encode(), JSON),
        (form(pngs), "multipart/form-data; boundary=xyz"),
        (form(pngs), 'multipart/form-data; boundary="xyz"'),
    ]
    for body, kind in requests:
        np.testing.assert_array_equal(read_images(body, kind, LIMITS), wanted)
    for kind in ("image/png", "application/octet-stream"):
        np.testing.assert_array_equal(read_images(pngs[0], kind, LIMITS), wanted[:1])
    one = json.dumps(wanted[0].tolist()).encode()
    np.testing.assert_array_equal(read_images(one, JSON, LIMITS), wanted[:1])


def test_jpeg_is_decoded_as_pillow_does() -> None:
    jpeg = encoded(pixels(1)[0], "JPEG")
    wanted = np.asarray(Image.open(io.BytesIO(jpeg))).transpose(2, 0, 1) / np.float32(255)
    np.testing.assert_array_equal(read_images(jpeg, "image/jpeg", LIMITS)[0], wanted)


def test_other_sizes_are_resized_where_that_is_asked() -> None:
    picture = encoded(np.full((3, 30, 50), 51, dtype=np.uint8))
    found = read_images(picture, "image/png", Limits(image_size=8, resize=True))
    np.testing.assert_allclose(found, np.full((1, 3, 8, 8), 0.2), atol=1e-6)


NAN = pixels(1).tolist()
NAN[0][0][0][0] = float("nan")
RAGGED = pixels(1).tolist()
RAGGED[0][0][0] = [0.0]
TEXT = pixels(1).tolist()
TEXT[0][0][0][0] = "1"
GIF = encoded(pixels(1)[0], "GIF")
BAD: dict[str, tuple[bytes, str, int, str]] = {
    "no JSON": (b"{", JSON, 400, "no JSON"),
    "not UTF-8": (b"\xff\xfe\x80", JSON, 400, "no JSON"),
    "a deep list": (b"[" * 9_000, JSON, 400, "no JSON"),
    "a number": (b"3", JSON, 400, "images must be a list, got int"),
    "another key": (b'{"image": []}', JSON, 400, "the key"),
    "nothing": (b"[]", JSON, 422, "no image"),
    "nothing in it": (b"[[]]", JSON, 422, "images must be"),
    "NaN": (json.dumps(NAN).encode(), JSON, 422, "from 0 to 1"),
    "too bright": (json.dumps(pixels(1).tolist()).encode(), JSON, 422, "from 0 to 1"),
    "ragged": (json.dumps(RAGGED).encode(), JSON, 422, "ragged"),
    "text as a pixel": (json.dumps(TEXT).encode(), JSON, 422, "numbers"),
    "null": (b"[null]", JSON, 422, "numbers"),
    "a huge integer": (b"[[[[1" + b"0" * 400 + b"]]]]", JSON, 422, "images must be"),
    "another shape": (json.dumps(np.zeros((1, 3, 9, 9)).tolist()).encode(), JSON, 422, "3, 9, 9"),
    "9,000 images": (json.dumps([0] * 9_000, separators=",:").encode(), JSON, 413, "got 9000"),
    "not base64": (b'["?"]', JSON, 400, "base64"),
    "text as an image": (b"hello", "image/png", 422, "no PNG or JPEG"),
    "an empty body": (b"", "image/png", 422, "no PNG or JPEG"),
    "a GIF": (GIF, "image/png", 422, "no PNG or JPEG"),
    "a huge PNG": (huge_png(), "image/png", 413, "pixels per image"),
    "half a PNG": (encoded(pixels(1)[0])[:-40], "image/png", 422, "cannot be decoded"),
    "a larger PNG": (encoded(np.zeros((3, 9, 8), np.uint8)), "image/png", 422, "got 8 x 9"),
    "bytes": (b"0" * 20_001, "image/png", 413, "20000 bytes"),
    "a type": (b"hello", "text/plain", 415, "Content-Type must be"),
    "no type": (b"hello", "", 415, "Content-Type must be"),
    "no boundary": (form([b""]), "multipart/form-data", 400, "boundary"),
    "another boundary": (form([b""]), "multipart/form-data; boundary=a", 400, "no end"),
    "no end": (form([b""])[:-4], "multipart/form-data; boundary=xyz", 400, "no end"),
    "five parts": (form([GIF] * 5), "multipart/form-data; boundary=xyz", 413, "got 5"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_refused_in_one_line(name: str) -> None:
    body, kind, status, text = BAD[name]
    with pytest.raises(RequestError) as caught:
        read_images(body, kind, LIMITS)
    assert caught.value.status == status
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_limits_are_at_least_one() -> None:
    with pytest.raises(ValueError, match="max_bytes must be at least 1, got 0"):
        Limits(image_size=8, max_bytes=0)
