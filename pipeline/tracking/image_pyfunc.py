"""MLflow ``pyfunc`` of an image classifier: pixels or PNG/JPEG bytes in, label and route out.

A copy of this file lies in the logged model, which needs mlflow, torch, numpy, pandas and Pillow,
and nothing of this project. Shapes: B images, H = W the model's image side, K classes.
"""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

MAX_IMAGES = 1024
MAX_BYTES = 16 << 20  # of one encoded image
COLUMNS = ("image", "pixels")


class ImageClassifier:
    """Classifies the rows of a table, each with ``image`` (bytes) or ``pixels`` (3, H, W).

    Args:
        folder: ``classifier.pt2``, a program of logits and route, and ``facts.json``.
    """

    def __init__(self, folder: str):
        self.program = torch.export.load(Path(folder) / "classifier.pt2").module()
        facts = json.loads((Path(folder) / "facts.json").read_text(encoding="utf-8"))
        self.side: int = facts["image_size"]
        self.labels: list[str] = facts["labels"]

    def predict(self, data: Any, params: Any = None) -> Any:
        """Return a table of label, class, probabilities and route, one row per image.

        Raises:
            MlflowException: A row is no such image; answered 400 by a scoring server.
        """
        import pandas as pd

        if len(data) > MAX_IMAGES:
            raise refusal(f"at most {MAX_IMAGES} images per request, got {len(data)}")
        if not len(data):
            raise refusal("no image in the request")
        rows = [self.read(row) for row in data.to_dict("records")]
        with torch.inference_mode():
            logits_BK, route = self.program(torch.from_numpy(np.stack(rows)))
        probabilities_BK = logits_BK.float().softmax(1)
        labels = probabilities_BK.argmax(1).tolist()
        return pd.DataFrame(
            {
                "label": labels,
                "class": [self.labels[label] for label in labels],
                "probabilities": probabilities_BK.tolist(),
                "route": route.reshape(len(labels), -1).tolist(),
            }
        )

    def read(self, row: dict[str, Any]) -> Any:
        """Read one image as float32 (3, H, W) in [0, 1]."""
        given = [name for name in COLUMNS if present(row.get(name))]
        if len(given) != 1:
            raise refusal(f"a row needs one of {', '.join(COLUMNS)}, got {len(given)}")
        value = row[given[0]]
        return self.decode(value) if given == ["image"] else self.check(value)

    def check(self, value: Any) -> Any:
        """Check pixels."""
        wanted = (3, self.side, self.side)
        try:
            pixels_CHW = np.asarray(_plain(value), dtype=np.float32)
        except (ValueError, TypeError):
            raise refusal(f"pixels must be numbers of shape {wanted}") from None
        if pixels_CHW.shape != wanted:
            raise refusal(f"pixels must have shape {wanted}, got {pixels_CHW.shape}")
        if not (pixels_CHW.min() >= 0 and pixels_CHW.max() <= 1):  # NaN is refused too
            raise refusal("pixels must be from 0 to 1")
        return pixels_CHW

    def decode(self, data: bytes) -> Any:
        """Decode PNG or JPEG bytes, whose size is checked before their pixels are read."""
        from PIL import Image

        if len(data) > MAX_BYTES:
            raise refusal(f"an image must be at most {MAX_BYTES} bytes, got {len(data)}")
        wanted = (self.side, self.side)
        try:
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as picture:
                size = picture.size
                pixels_HWC = np.asarray(picture.convert("RGB")) if size == wanted else None
        except Exception:  # decoders raise nearly anything when fed with damaged bytes
            raise refusal("an image is no PNG or JPEG that can be decoded") from None
        if pixels_HWC is None:
            raise refusal(f"images must be {wanted} pixels, got {size}")
        return np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1), np.float32) / np.float32(255)


def present(value: Any) -> bool:
    """Tell a value from the None or NaN of a table's empty cell."""
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _plain(value: Any) -> Any:
    """Turn the nested object arrays of an enforced schema into lists."""
    return [_plain(item) for item in value] if isinstance(value, (list, np.ndarray)) else value


def refusal(text: str) -> Exception:
    """Make the error that a scoring server answers with status 400."""
    from mlflow.exceptions import MlflowException

    error: Exception = MlflowException.invalid_parameter_value(text)
    return error


def _load_pyfunc(path: str) -> ImageClassifier:
    """Load the model; called by MLflow."""
    torch.set_num_threads(1)
    return ImageClassifier(path)
