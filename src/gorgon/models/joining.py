"""In a recorded graph: products of the same input, whose weights lie side by side, multiplied as one.

Each product begins and ends with a wait, of threads for each other or of a GPU for memory. How weights lie side by side
is the layout's own matter (`models.panels`, `models.siblings`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import fx


@dataclass(frozen=True)
class Product:
    """One product in the graph.

    Attributes:
        shared: what is the same for products that can be joined: the input, and the block that holds the weights.
        start, end: where its weight lies there; None where no weight can go on behind it.
        outputs: columns of its result.
    """

    node: fx.Node
    shared: Hashable
    start: int
    end: int | None
    outputs: int


def join(graph: fx.Graph, products: Iterable[Product], multiply: Callable[[Product, int], fx.Node]) -> None:
    """Joins each run of products that follow one another in their block; the caller recompiles the graph.

    Args:
        products: in the graph's order.
        multiply: makes the product of so many outputs that begins where the given one does.
    Invariant: every output is the same sum as before.
    """
    runs: list[list[Product]] = []
    ends: dict[tuple[Hashable, int], list[Product]] = {}  # by what is shared and the place there: what may go on
    for product in products:
        run = ends.pop((product.shared, product.start), None)
        if run is None:
            run = []
            runs.append(run)
        run.append(product)
        if product.end is not None:
            ends[product.shared, product.end] = run
    for run in runs:
        if len(run) > 1:
            _join_run(graph, run, multiply)


def _join_run(graph: fx.Graph, run: list[Product], multiply: Callable[[Product, int], fx.Node]) -> None:
    counts = [product.outputs for product in run]
    with graph.inserting_before(run[0].node):
        joined = multiply(run[0], sum(counts))
        for product, end in zip(run, accumulate(counts), strict=True):
            part = graph.call_function(torch.narrow, (joined, -1, end - product.outputs, product.outputs))
            product.node.replace_all_uses_with(part)
    for product in run:
        graph.erase_node(product.node)
