"""Linear layers that read the same input, multiplied as one, on a GPU.

Queries, keys and values, or a gated layer's two halves, are small products that each leave a GPU waiting for memory to
begin and end. Their weights are laid together, and in compiled steps one product takes the place of several.
Shapes: I inputs, O outputs.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import linear


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
    """In a recorded graph, multiplies by rows that lie side by side as by one, where they are given the same input.

    Invariant: every output is the same product as before, up to rounding.
    """
    runs: list[list[fx.Node]] = []
    ends: dict[tuple[fx.Node, fx.Node, int], list[fx.Node]] = {}  # by input, block and row there: what may go on
    for node in graph.graph.find_nodes(op="call_function", target=linear):
        rows = _rows(node)
        if rows is None:
            continue
        block, start, end = rows
        run = ends.pop((node.args[0], block, start), None)
        if run is None:
            run = []
            runs.append(run)
        run.append(node)
        ends[node.args[0], block, end] = run
    for run in runs:
        if len(run) > 1:
            _join(graph.graph, run)
    graph.graph.eliminate_dead_code()
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


def _join(graph: fx.Graph, run: Sequence[fx.Node]) -> None:
    rows = [cast(tuple[fx.Node, int, int], _rows(node)) for node in run]
    block, start, _ = rows[0]
    counts = [end - begin for _, begin, end in rows]
    with graph.inserting_before(run[0]):
        weight = graph.call_function(operator.getitem, (block, slice(start, start + sum(counts))))
        joined = graph.call_function(linear, (run[0].args[0], weight))
        for node, count, end in zip(run, counts, accumulate(counts), strict=True):
            node.replace_all_uses_with(graph.call_function(torch.narrow, (joined, -1, end - count, count)))
    for node in run:
        graph.erase_node(node)
