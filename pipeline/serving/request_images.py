"""Parser of a prediction request: JSON arrays, PNG or JPEG bytes, multipart forms to pixels.

Shapes: B images, H = W the model's image side. Nothing here needs Ray.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.crops import CentreCrop
from pipeline.data.decode import as_rgb, open_picture

MIB = 1 << 20
EMPTY = "no image in the request"


class RequestError(Exception):
    """A request that is refused, in one line.

    Attributes:
        status: HTTP status: 400 malformed, 413 too large, 415 of an unknown type, 422 of a wrong
            size or range.
    """

    def __init__(self, status: int, text: str):
        super().__init__(" ".join(text.split())[:300])
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may hold.

    Attributes:
        image_size: Pixels a side of the model's images.
        max_bytes: Of a body.
        max_images: Of a body.
        max_pixels: Of one encoded image, checked before it is decoded.
        resize: Whether encoded images of other sizes are resized and cropped as test images of
            large pictures are; else they are refused.

    Raises:
        ValueError: A limit is below 1.
    """

    image_size: int
    max_bytes: int = 16 * MIB
    max_images: int = 256
    max_pixels: int = 4096 * 4096
    resize: bool = False

    def __post_init__(self) -> None:
        for key in ("image_size", "max_bytes", "max_images", "max_pixels"):
            if (value := getattr(self, key)) < 1:
                raise ValueError(f"{key} must be at least 1, got {value}")


def read_images(body: bytes, content_type: str, limits: Limits) -> NDArray[np.float32]:
    """Read the images of a request as pixels in [0, 1], float32 (B, 3, H, W).

    Raises:
        RequestError: The body is no such images, or exceeds a limit.
    """
    if len(body) > limits.max_bytes:
        raise too_many_bytes(limits)
    kind, _, rest = content_type.partition(";")
    match kind.strip().lower():
        case "application/json":
            return read_json(body, limits)
        case "multipart/form-data":
            return read_encoded(split_form(body, boundary(rest)), limits)
        case "image/png" | "image/jpeg" | "application/octet-stream":
            return read_encoded([body], limits)
    raise RequestError(
        415,
        "Content-Type must be application/json, image/png, image/jpeg, application/octet-stream or "
        f"multipart/form-data, got {kind!r}",
    )


def too_many_bytes(limits: Limits) -> RequestError:
    """Refuse a body for its length."""
    return RequestError(413, f"the body must be at most {limits.max_bytes} bytes")


def check_count(count: int, limits: Limits) -> None:
    """Refuse no image, and too many.

    Raises:
        RequestError: There are.
    """
    if count == 0:
        raise RequestError(422, EMPTY)
    if count > limits.max_images:
        raise RequestError(413, f"at most {limits.max_images} images per request, got {count}")


def read_json(body: bytes, limits: Limits) -> NDArray[np.float32]:
    """Read ``{"images": ...}`` or its value alone: arrays of pixels, or base64 of encoded images.

    Raises:
        RequestError: It is neither.
    """
    try:
        found: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"no JSON: {error}") from None
    if isinstance(found, dict):
        if set(found) != {"images"}:
            raise RequestError(400, 'the JSON object must have the key "images" alone')
        found = found["images"]
    if not isinstance(found, list):
        raise RequestError(400, f"images must be a list, got {type(found).__name__}")
    if found and depth(found) == 3:
        found = [found]  # one image
    check_count(len(found), limits)
    if all(isinstance(item, str) for item in found):
        return read_encoded([decode_base64(item) for item in found], limits)
    return read_arrays(found, limits)


def depth(found: Any) -> int:
    """Count the lists around the first value, up to 5."""
    levels = 0
    while isinstance(found, list) and found and levels < 5:
        found, levels = found[0], levels + 1
    return levels


def read_arrays(found: list[Any], limits: Limits) -> NDArray[np.float32]:
    """Read nested lists of pixels.

    Raises:
        RequestError: They are of another shape, or no numbers from 0 to 1.
    """
    side = limits.image_size
    if not all(is_number(value) for value in flat(found)):
        raise RequestError(422, "pixels must be numbers")
    try:
        x_BCHW = np.asarray(found, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        raise RequestError(422, f"images must be (B, 3, {side}, {side}), and are ragged") from None
    if x_BCHW.shape[1:] != (3, side, side):
        raise RequestError(422, f"images must be (B, 3, {side}, {side}), got {x_BCHW.shape}")
    if not (x_BCHW.min() >= 0 and x_BCHW.max() <= 1):  # NaN is refused too
        raise RequestError(422, "pixels must be from 0 to 1")
    return x_BCHW.astype(np.float32)


def flat(found: list[Any]) -> Iterator[Any]:
    """Yield the values of nested lists."""
    stack = [iter(found)]
    while stack:
        for item in stack[-1]:
            if isinstance(item, list):
                stack.append(iter(item))
                break
            yield item
        else:
            stack.pop()


def is_number(value: object) -> bool:
    """Tell a JSON number from text, null and booleans, which numpy would convert."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def decode_base64(text: str) -> bytes:
    """Decode base64.

    Raises:
        RequestError: It is none.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(400, "images given as text must be base64 of PNG or JPEG") from None


def read_encoded(encoded: list[bytes], limits: Limits) -> NDArray[np.float32]:
    """Decode PNG and JPEG images.

    Raises:
        RequestError: One cannot be decoded, has too many pixels, or another size than the model's.
    """
    check_count(len(encoded), limits)
    pixels_BCHW = np.stack([decode(data, limits) for data in encoded])
    return pixels_BCHW.astype(np.float32) / np.float32(255)


def decode(data: bytes, limits: Limits) -> NDArray[np.uint8]:
    """Decode one PNG or JPEG image to uint8 (3, H, W), its size checked before its pixels are read.

    Raises:
        RequestError: See ``read_encoded``.
    """
    side = limits.image_size
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as head:
            width, height = head.size
    except Image.DecompressionBombError:
        raise RequestError(413, f"at most {limits.max_pixels} pixels per image") from None
    except Exception:  # decoders raise nearly anything when fed with damaged bytes
        raise RequestError(422, "an image is no PNG or JPEG that can be decoded") from None
    if width * height > limits.max_pixels:
        raise RequestError(
            413, f"at most {limits.max_pixels} pixels per image, got {width} x {height}"
        )
    if not limits.resize and (width, height) != (side, side):
        raise RequestError(422, f"images must be {side} x {side} pixels, got {width} x {height}")
    try:
        picture = as_rgb(open_picture(data))
    except ValueError as error:
        raise RequestError(422, f"an image {error}") from None
    if picture.size != (side, side):
        return CentreCrop(side)(picture, 0)
    return np.asarray(picture).transpose(2, 0, 1)


def boundary(parameters: str) -> bytes:
    """Read the boundary of a form from the parameters of its content type.

    Raises:
        RequestError: There is none.
    """
    for parameter in parameters.split(";"):
        key, _, value = parameter.strip().partition("=")
        if key.lower() == "boundary" and (name := value.strip('"')):
            return name.encode("latin-1", "replace")
    raise RequestError(400, "multipart/form-data needs a boundary")


def split_form(body: bytes, name: bytes) -> list[bytes]:
    """Return the contents of a form's parts (RFC 2046, section 5.1.1).

    Raises:
        RequestError: It has no end, or a part has no header.
    """
    pieces = (b"\r\n" + body).split(b"\r\n--" + name)
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise RequestError(400, "the form has no end")
    contents = []
    for piece in pieces[1:-1]:
        header, found, content = piece.partition(b"\r\n\r\n")
        if not found or not header.startswith(b"\r\n"):
            raise RequestError(400, "a part of the form has no header")
        contents.append(content)
    return contents
