"""From the bytes of an image file to RGB, or an error: never to something that only looks right."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # 8 bits a channel
ORIENTATION = 0x0112  # tag of a camera's rotation
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its orientation; 1 is upright."""
PNG_HEAD = b"\x89PNG\r\n\x1a\n"
PNG_TEXT = {b"tEXt", b"zTXt", b"iTXt", b"iCCP"}
"""Chunks of a PNG that hold text or a colour profile, which decide nothing about its pixels."""
MAX_PIXELS = 89_478_485  # where Pillow itself begins to suspect a decompression bomb


def open_picture(data: bytes) -> Image.Image:
    """Read the header of an image, and check what can be checked before decoding.

    Raises:
        ValueError: It is not an image, too large, of a mode that does not become RGB, or damaged.
    """
    data = without_text(data)
    try:
        with Image.open(io.BytesIO(data)) as picture:
            kind, mode, (width, height) = picture.format, picture.mode, picture.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS}")
            if mode not in MODES:
                raise ValueError(f"mode {mode} is none of {', '.join(MODES)}")
            if kind == "PNG":
                picture.verify()  # the check sums, which decoding alone does not look at
        return Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise ValueError(f"more than {MAX_PIXELS} pixels") from error
    except Exception as error:  # decoders raise nearly anything when fed with damaged bytes
        raise ValueError(f"cannot be decoded: {one_line(error)}") from error


def without_text(data: bytes) -> bytes:
    """Leave out a PNG's text and colour profile: Pillow refuses an image for one above 1 MiB."""
    if not data.startswith(PNG_HEAD):
        return data
    kept, place = [PNG_HEAD], len(PNG_HEAD)
    while place + 12 <= len(data):  # length, type, so many bytes, check sum
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] not in PNG_TEXT:
            kept.append(data[place:end])
        place = end
    return b"".join(kept)


def to_rgb(picture: Image.Image) -> NDArray[np.uint8]:
    """Decode to uint8 (3, H, W), see ``as_rgb``.

    Raises:
        ValueError: The image is damaged.
    """
    return np.asarray(as_rgb(picture)).transpose(2, 0, 1)


def as_rgb(picture: Image.Image) -> Image.Image:
    """Decode to mode RGB: grey is repeated, alpha dropped, a camera's rotation applied.

    Metadata never decide whether pixels count: an orientation that cannot be read is none.

    Raises:
        ValueError: The image is damaged.
    """
    try:
        picture.load()
        if (turn := TURNS.get(orientation(picture))) is not None:
            picture = picture.transpose(turn)
        if picture.mode == "P" and "transparency" in picture.info:
            picture = picture.convert("RGBA")
        return picture.convert("RGB")
    except Exception as error:  # decoders raise nearly anything when fed with damaged bytes
        raise ValueError(f"cannot be decoded: {one_line(error)}") from error


def orientation(picture: Image.Image) -> int:
    """Read a camera's rotation, 1 to 8; 1, upright, where the metadata cannot be read.

    The one tag alone: ``ImageOps.exif_transpose`` writes all others again, and fails at any of
    them that is malformed (python-pillow/Pillow issues 4665 and 8965).
    """
    try:
        return int(picture.getexif().get(ORIENTATION, 1))
    except Exception:
        return 1


def one_line(error: Exception) -> str:
    """Shorten a library's message to its first line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
