"""Attack through layers that round, clip or cast (BPDA), and on stochastic networks (EOT).

Shapes: B images, CHW channels and sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from moe.network import Network
from pipeline.attacks.pgd import PGD, Draw
from pipeline.measures.base import Attacked, break_images, untouched
from pipeline.optimization.losses import dlr_per_image

FLAT = set("round floor ceil trunc fix sign sgn clamp clip clamp_min clamp_max hardtanh".split())
"""Functions whose gradient is zero, everywhere or outside a range, and that stand for ``x``."""
CASTS = set("to int long short byte char type".split())
RESTS = set("remainder fmod frac __mod__".split())
"""What is left over: its gradient is one, and takes away that of ``x - x % step``."""


class StraightThrough(TorchFunctionMode):
    """Gives functions without a gradient that of the identity (BPDA, arXiv:1802.00420, section 4).

    They are found as they are called, so that nobody has to name a defence's layers. A cast to
    whole numbers stays a float of the same values, for the gradient to pass.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        x = args[0] if args else None
        if not (isinstance(x, Tensor) and isinstance(found, Tensor) and x.requires_grad):
            return found
        name = (resolve_name(func) or getattr(func, "__name__", "")).rpartition(".")[2]
        if name in RESTS and found.is_floating_point():
            return found.detach()
        whole = name in CASTS and not found.is_floating_point() and found.dtype != torch.bool
        if (name in FLAT or whole) and found.shape == x.shape:
            return x + (found.to(x.dtype) - x).detach()
        return found


@dataclass(frozen=True, kw_only=True)
class HiddenGradients:
    """RA under PGD on the logits' ratio, straight through what has no gradient.

    Of a network whose answers to the same images differ, the mean over some passes is climbed
    (expectation over transformation, Athalye et al., ICML 2018, arXiv:1707.07397).

    Attributes:
        samples: Passes of such a network per gradient.
    """

    title: ClassVar[str] = "RA, straight through what has no gradient"
    attack: PGD = PGD(steps=50)
    samples: int = 8

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        with torch.no_grad():
            first, second = (model(x_BCHW).logits for _ in range(2))
        passes = 1 if torch.allclose(first, second, rtol=1e-4, atol=1e-6) else self.samples
        through: AbstractContextManager[object]
        through = StraightThrough() if takes(model, x_BCHW[:1]) else nullcontext()

        def objective(x: Tensor, index: Tensor) -> Tensor:
            with through:
                found = [dlr_per_image(model(x).logits, y_B[index]) for _ in range(passes)]
            return torch.stack(found).mean(0)

        before = untouched(model, x_BCHW, y_B)
        return break_images(self.attack, model, objective, before, x_BCHW, y_B, noise)


def takes(model: Network, x_1CHW: Tensor) -> bool:
    """Tell whether a network runs with whole numbers kept as floats: an index must not be one."""
    try:
        with StraightThrough(), torch.enable_grad():
            model(x_1CHW.detach().clone().requires_grad_())
    except (RuntimeError, IndexError, TypeError):
        return False
    return True
