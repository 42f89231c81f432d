"""Linear layers whose weight lies in panels, multiplied by our own kernel: a few rows cost little more than one.

The kernel is panels.cpp, which says how it works.
Shapes: I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gorgon.models.kernels import load_kernels


class PanelLinear(nn.Module):
    """A linear layer in panels; float32, CPU, inference only."""

    def __init__(self, layer: nn.Linear) -> None:
        """Raises: MissingDependencyError when the kernel cannot be built."""
        load_kernels()
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = None if layer.bias is None else layer.bias.detach()
        self.register_buffer("panels", torch.ops.gorgon.pack_panels(layer.weight.detach().contiguous()))

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        result: Tensor = torch.ops.gorgon.panel_linear(x, self.panels, self.bias, self.out_features)
        return result
