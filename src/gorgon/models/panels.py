"""Weights that lie in panels, multiplied by our own kernel: a few rows cost little more than one.

The kernel is panels.cpp, which says how it works.
Shapes: K weights, R rows, I inputs, O outputs; P panels of W outputs each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gorgon.core.heads import PackedHeads
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


def in_panels(heads: PackedHeads) -> PackedHeads:
    """The heads with weights [K, P, I, W], for `panel_products`.

    Raises: MissingDependencyError when the kernel cannot be built.
    """
    load_kernels()
    pack = torch.ops.gorgon.pack_panels
    return PackedHeads(
        [(pack(weight_KIO.transpose(1, 2).contiguous()), bias_KO) for weight_KIO, bias_KO in heads.layers]
    )


def panel_products(x_KRI: Tensor, panels_KPIW: Tensor, bias_KO: Tensor) -> Tensor:
    """Each weight's product with its own rows, [K, R, O]."""
    result: Tensor = torch.ops.gorgon.panel_products(x_KRI, panels_KPIW, bias_KO)
    return result
