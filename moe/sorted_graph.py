"""Sorted dispatch as one traceable graph: each expert runs once, on the images that chose it.

Shapes: B images, E experts, C experts that take part in one image, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from moe.export import LogitsOf, exportable, exportable_parts, exportable_with_route
from moe.exported_model import ExportedModel, Part
from moe.network import Network


def exportable_for_batches(model: Network) -> nn.Module:
    """Copy a model as a module that returns logits (B, K) and the route, fast at every batch size.

    The number of images of an expert is a size of the graph that its data decide (``nonzero``), so
    ``torch.export`` takes the sorted dispatch of ``moe.exported_model`` in one program. Where every
    layer routes for itself there is no pathway to sort for, and the gathered form is returned.

    Raises:
        ValueError: Tokens and not images are routed.
    """
    try:
        parts, tree = exportable_parts(model)
    except ValueError:
        return exportable_with_route(model)
    return SortedGraph(parts, tree).eval()


def loggable(model: Network) -> tuple[nn.Module, nn.Module | None]:
    """Copy a model as a module of logits alone, and one of logits and route where images have one.

    Raises:
        ValueError: The images of a batch share the experts' capacity.
    """
    try:
        classifier = exportable_for_batches(model)
    except ValueError:  # tokens are routed
        return exportable(model), None
    return LogitsOf(classifier).eval(), classifier


class SortedGraph(nn.Module):
    """Router and pathways of ``exportable_parts`` as one module."""

    def __init__(self, parts: Mapping[str, nn.Module], tree: Mapping[str, Any]):
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.dispatch = _TracedDispatch(self.parts, tree)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Classify pixels in [0, 1]; return logits (B, K) and the route (B,)."""
        return self.dispatch.run(x_BCHW)


class _TracedDispatch(ExportedModel):
    """The loader's sorted dispatch without a host number in it."""

    def __init__(self, parts: nn.ModuleDict, tree: Mapping[str, Any]):
        self.tree, self.parts = tree, cast("dict[str, Part]", parts)

    def _router(self, name: str, x_BCHW: Tensor) -> Tensor:
        scores_BE: Tensor = self.parts[name](x_BCHW)
        return scores_BE.float()

    def _dispatch(self, tree: Mapping[str, Any], x_BCHW: Tensor, chosen_BC: Tensor) -> Tensor:
        if len(tree["experts"]) == 1:
            only_BK: Tensor = self.parts[tree["experts"][0]](x_BCHW)
            return only_BK[:, None]
        chosen_F, width = chosen_BC.flatten(), chosen_BC.shape[1]
        places = [(chosen_F == e).nonzero().squeeze(1) for e in range(len(tree["experts"]))]
        parts = [
            self.parts[name](x_BCHW[place_f // width])
            for name, place_f in zip(tree["experts"], places, strict=True)
        ]
        sorted_FK = torch.cat(parts)
        shape = (chosen_F.shape[0], sorted_FK.shape[1])
        whole_FK = sorted_FK.new_zeros(shape).index_copy(0, torch.cat(places), sorted_FK)
        return whole_FK.reshape(chosen_BC.shape[0], width, sorted_FK.shape[1])
