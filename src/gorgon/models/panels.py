"""Weights that lie in panels, multiplied by our own kernel: a few rows cost little more than one.

The kernel is panels.cpp, which says how it works.
Shapes: K weights, R rows, I inputs, O outputs; P panels of W outputs each.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from gorgon.core.heads import PackedHeads
from gorgon.models.joining import Product, join
from gorgon.models.kernels import load_kernels


class PanelLinear(nn.Module):
    """A linear layer in panels, which lie in a block with those of a model's other layers.

    Float32, CPU, inference only. One block is one argument of a compiled step, and layers that lie side by side in it
    can be multiplied as one.
    """

    def __init__(self, layer: nn.Linear, block: Tensor, offset: int) -> None:
        """Packs the layer's weight into the block, where it takes up `panels_size` numbers from `offset` on."""
        super().__init__()
        self.in_features, self.out_features, self.offset = layer.in_features, layer.out_features, offset
        self.bias = None if layer.bias is None else layer.bias.detach()
        self.register_buffer("block", block, persistent=False)
        panels = torch.ops.gorgon.pack_panels(layer.weight.detach().contiguous())
        block[offset : offset + panels.numel()] = panels.flatten()

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        result: Tensor = torch.ops.gorgon.panel_linear(
            x, self.block, self.offset, self.in_features, self.bias, self.out_features
        )
        return result


def panels_size(outputs: int, inputs: int) -> int:
    """Numbers that a weight's panels hold.

    Raises: MissingDependencyError when the kernel cannot be built.
    """
    load_kernels()
    width = int(torch.ops.gorgon.panel_width())
    return -(-outputs // width) * width * inputs


def join_products(graph: fx.GraphModule) -> None:
    """Multiplies by weights that lie side by side as by one, where they are given the same rows: queries, keys and
    values, or a gated layer's two halves (`models.joining`)."""
    multiply, width = torch.ops.gorgon.panel_linear, int(torch.ops.gorgon.panel_width())
    products = []
    for node in graph.graph.find_nodes(op="call_function", target=multiply):
        x, block, offset, inputs, bias, outputs = node.args
        if bias is None:
            end = offset + panels_size(outputs, inputs) if outputs % width == 0 else None
            products.append(Product(node, (x, block), offset, end, outputs))

    def joined(first: Product, outputs: int) -> fx.Node:
        return graph.graph.call_function(multiply, (*first.node.args[:-1], outputs))

    join(graph.graph, products, joined)
    graph.recompile()


def in_panels(heads: PackedHeads) -> PackedHeads:
    """The heads with weights [K, P, I, W] in bfloat16, for `panel_products`.

    Reading them is what heads cost, and they only guess: half the bytes guess as well (docs/lab-notes.md).
    Raises: MissingDependencyError when the kernel cannot be built.
    """
    load_kernels()
    pack, pair = torch.ops.gorgon.pack_panels, torch.ops.gorgon.pair_halves
    return PackedHeads(
        [
            (pair(pack(weight_KIO.transpose(1, 2).contiguous()).bfloat16()), bias_KO)
            for weight_KIO, bias_KO in heads.layers
        ]
    )


def panel_products(x_KRI: Tensor, panels_KPIW: Tensor, bias_KO: Tensor) -> Tensor:
    """Each weight's product with its own rows, [K, R, O]."""
    result: Tensor = torch.ops.gorgon.panel_products(x_KRI, panels_KPIW, bias_KO)
    return result
