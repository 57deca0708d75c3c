"""Loader of an exported model: ``torch.export`` programs, put together by a sorted dispatch.

Needs torch alone. A copy of this file lies in every exported folder as ``load.py``::

    from load import ExportedModel
    model = ExportedModel(".")                # form="gathered" for single images
    logits, route = model(images)             # float32 pixels in [0, 1], (B, 3, H, W)

Shapes: B images, E experts, C experts that take part in one image, K classes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PIECE = 64  # images at most that run end to end at a time on a CPU: activations stay in cache

Part = Callable[[Tensor], Any]


class ExportedModel:
    """A classifier of pixels in [0, 1], from the programs of an exported folder.

    Args:
        folder: What ``python -m pipeline.export`` wrote.
        form: ``sorted``: each expert runs once, on the images that chose it. ``gathered``: one
            program, whose convolutions gather each image's filters; for single images.
            ``compiled``: as ``sorted``, from packages that AOTInductor compiled for this machine.
            Empty: ``sorted`` where the folder has it.

    Attributes:
        config: Contents of ``config.json``: labels, image size, programs and their hashes.

    Raises:
        ValueError: The folder has no such form, or a file is not the one that was exported.
    """

    def __init__(self, folder: str | Path, form: str = ""):
        folder = Path(folder)
        try:
            self.config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
            forms = self.config["forms"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} is no exported model: config.json: {error!r}") from None
        self.form = form or next(iter(forms))
        if self.form not in forms:
            raise ValueError(f"form must be one of {', '.join(forms)}, got {form!r}")
        self.tree: Mapping[str, Any] = forms[self.form]["tree"]
        self.parts: dict[str, Part] = {}
        for name, file in forms[self.form]["files"].items():
            found = hashlib.sha256((folder / file).read_bytes()).hexdigest()
            if found != self.config["sha256"][file]:
                raise ValueError(f"{file} has sha256 {found[:12]}, which config.json does not have")
            self.parts[name] = _load(folder / file)

    def __call__(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, K) and the route, (B,), or (B, L) where every layer routes.

        Raises:
            ValueError: The images have another shape, or no pixels in [0, 1].
        """
        side = self.config["image_size"]
        if x_BCHW.ndim != 4 or x_BCHW.shape[1:] != (3, side, side):
            raise ValueError(f"images must be (B, 3, {side}, {side}), got {tuple(x_BCHW.shape)}")
        if len(x_BCHW) and not (x_BCHW.min() >= 0 and x_BCHW.max() <= 1):  # NaN is refused too
            raise ValueError("pixels must be from 0 to 1")
        return self.run(x_BCHW)

    def run(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Classify as a call does, without its checks."""
        if self.tree["kind"] == "whole":
            logits_BK, route = self.parts["model"](x_BCHW)
            return logits_BK, route
        scores_BE = self.scores(x_BCHW)
        return self._held(self.tree, x_BCHW, scores_BE), best(scores_BE, 1)[:, 0]

    def scores(self, x_BCHW: Tensor) -> Tensor:
        """Score the experts (B, E), of a dual model the pairs of them; not in a whole program."""
        return self._scores(self.tree, x_BCHW)

    def along(self, x_BCHW: Tensor, route_B: Tensor) -> Tensor:
        """Classify along a given route; return logits (B, K). Not in a whole program."""
        return self._along(self.tree, x_BCHW, route_B)

    def _scores(self, tree: Mapping[str, Any], x_BCHW: Tensor) -> Tensor:
        if tree["kind"] == "dual":
            standard_BS = self._scores(tree["standard"], x_BCHW)
            robust_BR = self._scores(tree["robust"], x_BCHW)
            return (standard_BS[:, :, None] + robust_BR[:, None, :]).flatten(1)
        if tree["router"] is None:
            return x_BCHW.new_zeros(x_BCHW.shape[0], 1)  # len() fixes a traced batch size
        return self._router(tree["router"], x_BCHW)

    def _router(self, name: str, x_BCHW: Tensor) -> Tensor:
        return torch.cat([self.parts[name](part) for part in _pieces(x_BCHW)]).float()

    def _held(self, tree: Mapping[str, Any], x_BCHW: Tensor, scores_BE: Tensor) -> Tensor:
        if tree["kind"] == "dual":
            pairs_BSR = scores_BE.reshape(scores_BE.shape[0], -1, _experts(tree["robust"]))
            standard_BK = self._held(tree["standard"], x_BCHW, pairs_BSR[:, :, 0])
            robust_BK = self._held(tree["robust"], x_BCHW, pairs_BSR[:, 0, :])
            return _blend(tree, standard_BK, robust_BK)
        if tree["kind"] == "network":
            return self._dispatch(tree, x_BCHW, scores_BE.argmax(1)[:, None])[:, 0]
        chosen_BC = best(scores_BE, tree["top_k"])
        z_BCK = self._dispatch(tree, x_BCHW, chosen_BC)
        logs = tree["mix"] != "logits"
        z_BCK = z_BCK.log_softmax(2) if logs else z_BCK
        if tree["gate"] == "hard":
            return z_BCK[:, 0]
        weights_BC = scores_BE.gather(1, chosen_BC)
        if logs:
            return torch.logsumexp(weights_BC.log_softmax(1)[:, :, None] + z_BCK, 1)
        return torch.einsum("bc,bck->bk", weights_BC.softmax(1), z_BCK)

    def _along(self, tree: Mapping[str, Any], x_BCHW: Tensor, route_B: Tensor) -> Tensor:
        if tree["kind"] != "dual":
            return self._dispatch(tree, x_BCHW, route_B[:, None])[:, 0]
        many = _experts(tree["robust"])
        standard_BK = self._along(tree["standard"], x_BCHW, route_B // many)
        return _blend(tree, standard_BK, self._along(tree["robust"], x_BCHW, route_B % many))

    def _dispatch(self, tree: Mapping[str, Any], x_BCHW: Tensor, chosen_BC: Tensor) -> Tensor:
        """Run each expert on the images that chose it alone; return (B, C, K)."""
        chosen_F = chosen_BC.flatten()
        order_F = chosen_F.argsort(stable=True)
        counts = torch.bincount(chosen_F, minlength=len(tree["experts"])).tolist()
        rows = torch.split(order_F // chosen_BC.shape[1], counts)
        parts = [
            self.parts[name](part)
            for name, rows_b in zip(tree["experts"], rows, strict=True)
            if len(rows_b)
            for part in _pieces(x_BCHW[rows_b])
        ]
        whole_FK = torch.cat(parts)[order_F.argsort()]
        return whole_FK.reshape(*chosen_BC.shape, whole_FK.shape[1])


def best(scores_BE: Tensor, top_k: int) -> Tensor:
    """Name the best experts of each image, best first (B, C); ties go to the lowest index."""
    return scores_BE.argsort(dim=1, descending=True, stable=True)[:, :top_k]


def _experts(tree: Mapping[str, Any]) -> int:
    if tree["kind"] == "dual":
        return _experts(tree["standard"]) * _experts(tree["robust"])
    return len(tree["experts"])


def _blend(tree: Mapping[str, Any], standard_BK: Tensor, robust_BK: Tensor) -> Tensor:
    """Mix the outputs of a dual model, ``(1 - alpha) F_S + alpha F_R``."""
    alpha = tree["alpha"]
    if tree["mix"] == "logits":
        mixed_BK: Tensor = (1 - alpha) * standard_BK + alpha * robust_BK
        return mixed_BK
    log_BK = [standard_BK.log_softmax(1), robust_BK.log_softmax(1)]
    if alpha in (0, 1):
        return log_BK[1] if alpha else log_BK[0]
    return torch.logaddexp(log_BK[0] + math.log(1 - alpha), log_BK[1] + math.log(alpha))


def _pieces(x_BCHW: Tensor) -> tuple[Tensor, ...]:
    if x_BCHW.device.type != "cpu":
        return (x_BCHW,)
    return x_BCHW.chunk(max(1, math.ceil(len(x_BCHW) / PIECE)))


def _load(file: Path) -> Part:
    if file.name.endswith(".aoti.pt2"):
        from torch._inductor import aoti_load_package

        package: Part = aoti_load_package(str(file))
        return package
    return torch.export.load(file).module()
