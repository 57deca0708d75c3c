"""Model that loads from and saves to the Hugging Face Hub and local folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from moe.routing import Routed
from pipeline.checkpoint import build_model
from pipeline.config import read


class HubModel(nn.Module, PyTorchModelHubMixin):  # type: ignore[misc]
    """A network with ``from_pretrained``, ``save_pretrained`` and ``push_to_hub``.

    Reads what ``python -m pipeline.export`` wrote: its ``config.json`` names the settings, and
    ``model.safetensors`` has the network's own parameter names.

    Args:
        settings: Dotted config of the run.
        stage: Of an algorithm that changes its network; -1 is the last.
    """

    def __init__(self, settings: dict[str, Any], stage: int = -1):
        super().__init__()
        self.network = build_model(read(settings), stage).eval()

    def forward(self, x_BCHW: Tensor) -> Routed:
        """Classify pixels in [0, 1]."""
        routed: Routed = self.network(x_BCHW)
        return routed

    def _save_pretrained(self, save_directory: Path) -> None:
        from safetensors.torch import save_file

        weights = {k: v.detach().cpu().contiguous() for k, v in self.network.state_dict().items()}
        save_file(weights, save_directory / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def _load_as_safetensor(
        cls, model: HubModel, model_file: str, map_location: str, strict: bool
    ) -> HubModel:
        from safetensors.torch import load_file

        model.network.load_state_dict(load_file(model_file), strict=strict)
        return model.to(map_location).eval()
