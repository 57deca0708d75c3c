"""How far each output of a function can move, carried through every operation that it makes.

All constants are of the largest change of a pixel: ``|f(x') - f(x)| <= L max_p |x'_p - x_p|``.
Shapes: K outputs, F features before the last linear map, CHW channels and sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROUND_UP = 1 + 1e-9  # above the rounding of sums of 10^6 terms in float64

STEEPEST: dict[str, float] = {  # largest slope of an elementwise function
    **dict.fromkeys("relu hardtanh clamp clamp_min clamp_max abs neg tanh softplus".split(), 1.0),
    "sigmoid": 0.25,
    "silu": 1.0999,  # 1.09984 at x = 2.3994
    "gelu": 1.1300,  # 1.12890 at x = sqrt 2, and 1.12899 in its tanh form
}
CARRIED = frozenset(
    """view _unsafe_view permute transpose t expand slice select index index_select split
    split_with_sizes unbind squeeze unsqueeze clone _to_copy detach alias cat stack
    mean sum avg_pool2d _adaptive_avg_pool2d amax flip constant_pad_nd""".split()
)
"""Operations that do to the bounds what they do to the values: they move entries, add them with
weights that are not negative, or take the largest."""
ROW_STAYS = frozenset("cat index clone _to_copy detach alias slice".split())
"""Of those, the ones that can hand on the only row of a batch of one as it is."""
CONSTANT = frozenset(
    "new_zeros new_ones new_empty new_full zeros_like ones_like full_like empty_like".split()
)
NORMS = frozenset("native_batch_norm cudnn_batch_norm _batch_norm_no_update".split())
PRODUCTS = frozenset("mm bmm baddbmm addmm".split())
LINEAR = frozenset("add sub mul div addcmul neg convolution addmm mm".split())
AFFINE = (CARRIED - {"amax"}) | NORMS | LINEAR
EXCLUDED = (
    "transformers are left out: attention has no global Lipschitz constant "
    "(Kim et al., ICML 2021, arXiv:2006.04710)"
)


class NoBoundError(ValueError):
    """A network does something whose effect on its outputs is not bounded here."""


@dataclass(frozen=True)
class Reach:
    """How far each output can move for each unit that pixels move by: certified constants.

    Attributes:
        each: Constant of every entry, in the shape of the output.
        rows_KF, inner_F: Where the output is a linear map of features: its weights, and the
            constants of the features. Differences of outputs then have less than their sum.
        affine: Whether the whole function is affine in the pixels.
    """

    each: Tensor
    rows_KF: Tensor | None = None
    inner_F: Tensor | None = None
    affine: bool = False

    @property
    def pairs(self) -> Tensor:
        """Bound the differences ``f_k - f_l`` of one image's outputs, (K, K).

        ``sum_f |W_kf - W_lf| c_f`` behind a linear map, ``c_k + c_l`` elsewhere.
        """
        each_K = self.each.flatten()
        if self.rows_KF is None or self.inner_F is None:
            return (each_K[:, None] + each_K).fill_diagonal_(0)
        scaled_KF = self.rows_KF * self.inner_F
        return torch.cdist(scaled_KF, scaled_KF, p=1) * ROUND_UP


def reach(function: Callable[[Tensor], Tensor], image_1CHW: Tensor) -> Reach:
    """Bound the L-inf Lipschitz constant of each output of a function of one image.

    Carries through every operation that the function makes how far each entry can move: ``|W| c``
    behind a convolution or linear map, ``|gamma| / sqrt(var + eps)`` times as much behind BatchNorm
    in eval mode, the sum over branches behind a residual, each branch's own behind a concatenation,
    the largest behind max pooling, no more behind ReLU. One linear layer gets its operator norm,
    the largest absolute row sum, exactly; several get at most the product of theirs, as the sums
    are those of the channels and not the worst channel's at every layer.

    Args:
        function: Of pixels; of a mixture, along a fixed route.
        image_1CHW: Any image of the right size; the bounds hold for all. float64 keeps them above
            what rounding does.

    Raises:
        NoBoundError: An operation has no bound here, attention among them; names it.
    """
    tracker, image = _Tracker(), image_1CHW.detach().clone()
    tracker.keep(image, Reach(torch.ones_like(image)))
    with torch.no_grad(), tracker:
        out = function(image)
    found = tracker.find(out)
    if found is None:
        return Reach(torch.zeros_like(out), affine=True)
    affine = tracker.names <= AFFINE
    return Reach(found.each * ROUND_UP, found.rows_KF, found.inner_F, affine)


class _Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches every operation, and keeps the reach of what depends on the image."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known: dict[int, tuple[Tensor, Reach]] = {}
        self.names: set[str] = set()

    def keep(self, tensor: Tensor, found: Reach) -> None:
        self.known[id(tensor)] = tensor, found  # the reference keeps the id its own

    def find(self, item: object) -> Reach | None:
        entry = self.known.get(id(item))
        return None if entry is None else entry[1]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out, name = func(*args, **kwargs), func.overloadpacket.__name__
        given = [*_tensors(args), *_tensors(kwargs.values())]
        moving = [tensor for tensor in given if self.find(tensor) is not None]
        if not moving or name in CONSTANT:
            return out
        base = name.removesuffix("_")
        self.names.add(base)
        call = _Call(base, getattr(torch.ops.aten, base), args, kwargs, moving, self)
        found = call.bound()
        if base != name:
            self._overwrite(args[0], found[0])
            return out
        parts = out if isinstance(out, (tuple, list)) else [out]
        for tensor, own in zip(parts, found, strict=False):  # indices and statistics come last
            if not tensor.is_floating_point():
                raise NoBoundError(f"no bound for {name}: it makes whole numbers of the pixels")
            self.keep(tensor, own)
        return out

    def _overwrite(self, target: Tensor, found: Reach) -> None:
        """Give a tensor that was written in place its new reach, under all its names."""
        where = target.untyped_storage().data_ptr()
        for other, _ in list(self.known.values()):
            if other.untyped_storage().data_ptr() != where:
                continue
            if (other.shape, other.stride(), other.data_ptr()) != (
                *(target.shape, target.stride()),
                target.data_ptr(),
            ):
                raise NoBoundError("no bound for writing in place to a part of a tensor")
            self.keep(other, found)
        self.keep(target, found)


def _tensors(items: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for item in items:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (tuple, list)):
            found += _tensors(item)
    return found


@dataclass(frozen=True)
class _Call:
    """One operation, of which the tensors in ``moving`` depend on the image."""

    name: str
    func: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    moving: list[Tensor]
    tracker: _Tracker

    def bound(self) -> list[Reach]:
        """Bound the outputs, as many as can move."""
        if self.name in CARRIED:
            return self._carried()
        simple = self._elementwise()
        return self._weighted() if simple is None else [Reach(simple)]

    def _elementwise(self) -> Tensor | None:
        """Bound what works entry by entry; None: it does not."""
        first, name = self.args[0], self.name
        bound: Tensor | None = None
        alone = len(self.moving) == 1
        if name in STEEPEST and alone:
            bound = STEEPEST[name] * self.each(first)
        elif name in ("add", "sub"):
            parts = [self.each(item) for item in self.args[:2]]
            bound = parts[0] + abs(self.kwargs.get("alpha", 1)) * parts[1]
        elif name in ("mul", "div") and alone and (name == "mul" or self.moving[0] is first):
            bound = self._scaled()
        elif name in ("maximum", "minimum"):
            bound = torch.maximum(*(self.each(item) for item in self.args))
        elif name == "addcmul" and alone and self.moving[0] is self.args[1]:
            size = abs(self.kwargs.get("value", 1))
            bound = self.each(self.args[1]) * self.args[2].abs() * size
        elif name in NORMS:
            bound = self._normed()
        return bound

    def each(self, item: Any) -> Any:
        """Replace what moves by its bounds, and other numbers by zeros."""
        if isinstance(item, (tuple, list)):
            return [self.each(part) for part in item]
        found = self.tracker.find(item)
        if found is not None:
            return found.each
        return torch.zeros_like(item) if isinstance(item, Tensor) else 0.0

    def _carried(self) -> list[Reach]:
        first, rest = self.args[0], self.args[1:]
        if any(self.tracker.find(tensor) is not None for tensor in _tensors(rest)):
            raise NoBoundError(f"no bound for {self.name} by places that depend on the image")
        if self.name == "constant_pad_nd":
            rest = (rest[0], 0.0)
        done = self.func(self.each(first), *rest, **self.kwargs)
        if isinstance(done, (tuple, list)):
            return [Reach(part) for part in done]
        source = self.tracker.find(first[0] if isinstance(first, (tuple, list)) else first)
        row = source is not None and self.name in ROW_STAYS and len(done) == 1
        if source is not None and row and done.shape == source.each.shape:
            return [Reach(done, source.rows_KF, source.inner_F)]
        return [Reach(done)]

    def _scaled(self) -> Tensor:
        mine = self.moving[0]
        factor = self.args[1] if mine is self.args[0] else self.args[0]
        size, bound = abs(factor), self.each(mine)
        scaled: Tensor = bound * size if self.name == "mul" else bound / size
        return scaled

    def _normed(self) -> Tensor:
        x_BCHW, weight_C, _, _, var_C, training = self.args[:6]
        if training is True:
            raise NoBoundError("no bound for BatchNorm in training mode, which couples the images")
        scale_C = (var_C + self.args[-1]).rsqrt()
        scale_C = scale_C if weight_C is None else scale_C * weight_C.abs()
        normed: Tensor = self.each(x_BCHW) * scale_C.view(-1, *[1] * (x_BCHW.dim() - 2))
        return normed

    def _weighted(self) -> list[Reach]:
        """Bound what has weights of its own or chooses; refuse the rest."""
        args, name, moves = self.args, self.name, [id(tensor) for tensor in self.moving]
        if name == "convolution" and moves == [id(args[0])]:
            return [Reach(self.func(self.each(args[0]), args[1].abs(), None, *args[3:]))]
        if name in ("addmm", "mm") and moves == [id(args[-2])]:
            inner_BF, weight_FK = self.each(args[-2]), args[-1]
            one = len(inner_BF) == 1
            rows = (weight_FK.t(), inner_BF[0]) if one else (None, None)
            return [Reach(inner_BF @ weight_FK.abs(), *rows)]
        if name == "max_pool2d_with_indices":
            return [Reach(self.func(self.each(args[0]), *args[1:])[0])]
        if name == "_softmax":  # the gradient of p_k sums to 0: p_k (1 - p_k) <= 1/4 on either side
            bound = self.each(args[0])
            return [Reach((bound + bound.amax(args[1], keepdim=True)) / 4)]
        if "attention" in name or "layer_norm" in name or name in PRODUCTS:
            raise NoBoundError(f"no bound for {name}: {EXCLUDED}")
        both = " of two things that both depend on the image" if len(moves) > 1 else ""
        raise NoBoundError(f"no bound for the operation {name}{both}")
