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
SATURATED = {"sigmoid": 0.25, "tanh": 1.0}
"""Functions whose gradient dies away from zero, and their slope at zero."""
COMPARED = {"gt": 1, "__gt__": 1, "greater": 1, "ge": 1, "__ge__": 1}
COMPARED |= {"lt": -1, "__lt__": -1, "less": -1, "le": -1, "__le__": -1}
RESTS = set("remainder fmod frac __mod__".split())
"""What is left over: its gradient is one, and takes away that of ``x - x % step``."""


class StraightThrough(TorchFunctionMode):
    """Gives functions without a gradient that of the identity (BPDA, arXiv:1802.00420, section 4).

    They are found as they are called, so that nobody has to name a defence's layers. A cast to
    whole numbers stays a float of the same values, for the gradient to pass. What dies away gets a
    slow decay instead (``slow``); so does a comparison, where its outcome becomes a number or picks
    one of two; a one-hot code of an argmax gets the gradient of a softmax.
    """

    def __init__(self) -> None:
        super().__init__()
        self._compared: dict[int, tuple[Tensor, Tensor]] = {}
        self._chosen: dict[int, tuple[Tensor, Tensor]] = {}

    def __exit__(self, *error: Any) -> None:
        self._compared.clear()
        self._chosen.clear()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        x = args[0] if args else None
        if not isinstance(found, Tensor):
            return found
        name = (resolve_name(func) or getattr(func, "__name__", "")).rpartition(".")[2]
        if (indirect := self._indirect(name, args, found)) is not None:
            return indirect
        if isinstance(x, Tensor) and x.requires_grad:
            self._remember(name, args, kwargs or {}, found)
            return straight_through(name, x, found)
        return found

    def _remember(
        self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], found: Tensor
    ) -> None:
        """Keep what a comparison or an argmax was made of."""
        x = args[0]
        if name in COMPARED and len(args) > 1 and found.shape == x.shape:
            other = args[1].detach() if isinstance(args[1], Tensor) else args[1]
            self._compared[id(found)] = (found, COMPARED[name] * (x - other))
        if name == "argmax" and x.dim() == 2:
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            if dim in (1, -1) and found.dim() == 1:
                self._chosen[id(found)] = (found, x)

    def _indirect(self, name: str, args: tuple[Any, ...], found: Tensor) -> Tensor | None:
        """Give a gradient to what is made of a comparison or an argmax; None: it is neither."""
        x = args[0] if args else None
        if name in ("to", "float", "double", "type", "where") and id(x) in self._compared:
            soft = slow(self._compared[id(x)][1]) / 4
            if name == "where":
                if len(args) < 3 or found.shape != soft.shape:
                    return None
                either: Tensor = found + (args[1] - args[2]) * (soft - soft.detach())
                return either
            return found + soft - soft.detach() if found.is_floating_point() else None
        coded = id(x) in self._chosen and name == "one_hot"
        picked = name == "__getitem__" and len(args) > 1 and id(args[1]) in self._chosen
        if coded or picked:
            scores_BK = self._chosen[id(x if coded else args[1])][1]
            if found.shape == scores_BK.shape:
                spread = scores_BK.detach().std(1, keepdim=True).clamp(min=1e-12)
                soft = (scores_BK / spread).softmax(1)
                return found.to(soft) + soft - soft.detach()
        return None


def straight_through(name: str, x: Tensor, found: Tensor) -> Tensor:
    """Give what a function made of ``x`` the gradient of the identity, or a slow decay."""
    if name in SATURATED:
        soft = SATURATED[name] * slow(x)
        return found.detach() + soft - soft.detach()
    if name in RESTS and found.is_floating_point():
        return found.detach()
    whole = name in CASTS and not found.is_floating_point() and found.dtype != torch.bool
    if (name in FLAT or whole) and found.shape == x.shape:
        return x + (found.to(x.dtype) - x).detach()
    return found


def slow(x: Tensor) -> Tensor:
    """A function of slope ``1 / (1 + |x|)``: no distance is too far for its gradient."""
    return x.sign() * x.abs().log1p()


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
                logits = [model(x).logits for _ in range(passes)]
            return torch.stack([dlr_per_image(z_BK, y_B[index]) for z_BK in logits]).mean(0)

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
