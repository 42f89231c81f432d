"""Linear layers that read the same input, multiplied as one, on a GPU.

Queries, keys and values, or a gated layer's two halves, are small products that each leave a GPU waiting for memory to
begin and end. Their weights are laid together, and in compiled steps one product takes the place of several.
Shapes: I inputs, O outputs.
"""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import linear

from gorgon.models.joining import Product, join


class SiblingLinear(nn.Module):
    """A linear layer without bias whose weight is some rows of a block that it shares with its siblings."""

    block: Tensor

    def __init__(self, block_OI: Tensor, start: int, end: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.start, self.end = block_OI.shape[1], end - start, start, end
        self.register_buffer("block", block_OI, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        return linear(x, self.block[self.start : self.end])


def lay_siblings_together(model: nn.Module) -> None:
    """Gives the linear layers of one parent that read as many inputs one block of weights; one parent at a time, so
    that little memory is needed for both.

    Invariant: what a layer computes stays the same.
    """
    for parent in list(model.modules()):
        alike: dict[tuple[int, torch.dtype], dict[str, nn.Linear]] = {}
        for name, child in parent.named_children():
            if type(child) is nn.Linear and type(child.weight) is nn.Parameter and child.bias is None:
                alike.setdefault((child.in_features, child.weight.dtype), {})[name] = child
        for layers in alike.values():
            if len(layers) > 1:
                _lay_together(parent, layers)


def _lay_together(parent: nn.Module, layers: dict[str, nn.Linear]) -> None:
    block_OI = torch.cat([layer.weight.detach() for layer in layers.values()])
    start = 0
    for name, layer in layers.items():
        setattr(parent, name, SiblingLinear(block_OI, start, start + layer.out_features))
        start += layer.out_features


def join_siblings(graph: fx.GraphModule) -> None:
    """In a recorded graph, multiplies by rows that lie side by side as by one (`models.joining`)."""
    products = []
    for node in graph.graph.find_nodes(op="call_function", target=linear):
        rows = _rows(node)
        if rows is not None:
            block, start, end = rows
            products.append(Product(node, (node.args[0], block), start, end, end - start))

    def joined(first: Product, outputs: int) -> fx.Node:
        x, block = cast(tuple[fx.Node, fx.Node], first.shared)
        weight = graph.graph.call_function(operator.getitem, (block, slice(first.start, first.start + outputs)))
        return graph.graph.call_function(linear, (x, weight))

    weights = dict.fromkeys(cast(fx.Node, product.node.args[1]) for product in products)
    join(graph.graph, products, joined)
    for weight in weights:  # not `eliminate_dead_code`: to it a method that writes in place, as routers do, is dead
        if not weight.users:
            graph.graph.erase_node(weight)
    graph.recompile()


def _rows(product: fx.Node) -> tuple[fx.Node, int, int] | None:
    """The block and the rows by which this product without bias multiplies."""
    weight = product.args[1] if len(product.args) == 2 and not product.kwargs else None
    if not isinstance(weight, fx.Node) or weight.target is not operator.getitem:
        return None
    block, rows = weight.args[0], weight.args[1]
    if isinstance(rows, slice) and isinstance(rows.start, int) and isinstance(rows.stop, int):
        return cast(fx.Node, block), rows.start, rows.stop
    return None
