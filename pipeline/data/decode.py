"""From the bytes of an image file to RGB, or an error: never to something that only looks right."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # 8 bits a channel
MAX_PIXELS = 89_478_485  # where Pillow itself begins to suspect a decompression bomb


def open_picture(data: bytes) -> Image.Image:
    """Read the header of an image, and check what can be checked before decoding.

    Raises:
        ValueError: It is not an image, too large, of a mode that does not become RGB, or damaged.
    """
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


def to_rgb(picture: Image.Image) -> NDArray[np.uint8]:
    """Decode to uint8 (3, H, W), see ``as_rgb``.

    Raises:
        ValueError: The image is damaged.
    """
    return np.asarray(as_rgb(picture)).transpose(2, 0, 1)


def as_rgb(picture: Image.Image) -> Image.Image:
    """Decode to mode RGB: grey is repeated, alpha dropped, a camera's rotation applied.

    Raises:
        ValueError: The image is damaged.
    """
    try:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode == "P" and "transparency" in picture.info:
            picture = picture.convert("RGBA")
        return picture.convert("RGB")
    except Exception as error:  # decoders raise nearly anything when fed with damaged bytes
        raise ValueError(f"cannot be decoded: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """Shorten a library's message to its first line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
