"""Control of the layers' operator norms: what makes a certificate say something."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


@torch.no_grad()
def bound_norms(parameters: Iterable[nn.Parameter], bound: float) -> None:
    """Shrink linear maps and convolutions to an L-inf operator norm of at most ``bound``.

    That norm is the largest sum of absolute weights into one output (of any expert). Each output
    whose sum is larger is scaled down by itself; the others stay as they are. The Lipschitz
    constant of the network is then at most the product of the bounds, times what normalization of
    the pixels adds; BatchNorm scales features up again and is better left out
    (``backbone=lipschitz``). Norm control by layer: Cisse et al., ICML 2017, arXiv:1704.08847; in
    this norm Anil et al., ICML 2019, arXiv:1811.05381.
    """
    for weight in parameters:
        if weight.dim() > 1:
            stacked = weight.dim() == 3 and len(weight) > 1  # linear maps of several experts
            rows_DF = weight.flatten(0, 1) if stacked else weight.flatten(1)
            shrink_D1 = (bound / rows_DF.abs().sum(1, keepdim=True)).clamp(max=1)
            weight.copy_((rows_DF * shrink_D1).view_as(weight))
    torch.clear_autocast_cache()  # it holds bf16 copies of the weights as they were
