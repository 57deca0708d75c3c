"""Compiled pathways under a sorted dispatch: what ``torch.compile`` makes of the folded network.

The dispatch asks the host how many images each expert has, so router and pathways are compiled one
by one and the sorting stays outside. Shapes: B images, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe.export import exportable_parts
from moe.exported_model import ExportedModel
from moe.network import Network


class CompiledDispatch(ExportedModel):
    """Router and pathways in channels-last, in fp32 or bf16, maybe compiled.

    Raises:
        ValueError: Every layer routes for itself, or tokens are routed: there are no pathways.
    """

    def __init__(self, model: Network, dtype: torch.dtype, compiler: Callable[..., Any] | None):
        modules, self.tree = exportable_parts(model)
        self.parts = {name: prepared(part, dtype, compiler) for name, part in modules.items()}

    def logits(self, x_BCHW: Tensor) -> Tensor:
        """Classify (B, K)."""
        return self.run(x_BCHW)[0]


def prepared(module: nn.Module, dtype: torch.dtype, compiler: Callable[..., Any] | None) -> Any:
    """Lay a module's filters out for its images, and compile it for any batch size."""
    module = module.to(dtype=dtype)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        elif tensor.ndim == 5:  # filters of the one expert of a pathway
            tensor.data = tensor.data[0].contiguous(memory_format=torch.channels_last)[None]
    return module if compiler is None else compiler(module, dynamic=True)
