"""Linear layers laid out for a few rows at a time, on the CPU.

A decoding step multiplies 1 to 32 rows by every weight. BLAS kernels for such skinny products are far from the
memory's bandwidth in the usual [out, in] layout. Panels and our own kernel come near it where there is a C++ compiler.
Elsewhere the layout that helps depends on the processor (an Intel core runs MKL well on a transposed weight, an AMD
core wants oneDNN's blocked weight), so the layouts are timed when an engine is loaded (docs/lab-notes.md, "Weight
layout" and "Panels"). Values stay the same; only sums may round differently.
Shapes: R rows, I inputs, O outputs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from gorgon.models.kernels import kernels_work
from gorgon.models.panels import PanelLinear, panels_size
from gorgon.models.toolchain import cpp_compiler

Layout = Literal["as stored", "transposed", "packed", "panels"]
ROWS = (1, 8, 16)
"""Rows that are timed: plain decoding, a small tree, a larger one."""
TRIALS = 9
SAMPLE_BYTES = 64 << 20
"""At most this much of a shape's weights is timed: enough to leave the caches, little enough to take no time."""


class PackedLinear(nn.Module):
    """A linear layer whose weight oneDNN has blocked for its own kernels; float32, CPU, inference only."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self._weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
        return result


def packing_works() -> bool:
    """Whether this build of torch has oneDNN's packed products (PyPI's x86 builds do), and steps are not compiled.

    What oneDNN has packed is closed to torch's compiler. Where steps can be compiled, panels can be built.
    """
    if cpp_compiler() is not None:
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def lay_out_linear_weights(model: nn.Module) -> dict[str, Layout]:
    """Lays out every float32 CPU linear layer, in panels or as is fastest for its shape; returns "OxI" -> layout.

    Invariant: the products stay the same up to rounding.
    """
    if kernels_work():
        return _lay_out_in_panels(model)
    chosen: dict[str, Layout] = {}
    places = _places(model)
    for shape in dict.fromkeys(_shape(layer) for _, _, layer in places):
        alike = [place for place in places if _shape(place[2]) == shape]
        layout = chosen[shape] = _fastest_layout([layer for _, _, layer in alike])
        for parent, name, layer in alike:
            if layout == "packed":
                setattr(parent, name, PackedLinear(layer))
            elif layout == "transposed":
                _transpose(layer)
    return chosen


def _lay_out_in_panels(model: nn.Module) -> dict[str, Layout]:
    places = _places(model)[::-1]
    if not places:
        return {}
    chosen: dict[str, Layout] = {_shape(layer): "panels" for _, _, layer in places}
    sizes = [panels_size(layer.out_features, layer.in_features) for _, _, layer in places]
    block, offset = places[0][2].weight.new_empty(sum(sizes)), 0
    while places:  # one by one, so that each weight as it was is given back before the next one is packed
        parent, name, layer = places.pop()
        setattr(parent, name, PanelLinear(layer, block, offset))
        offset += sizes.pop()
    return chosen


def _shape(layer: nn.Linear) -> str:
    return f"{layer.out_features}x{layer.in_features}"


def _places(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The layers that may be laid out, in the model's order, with their parents and names there."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and type(child.weight) is nn.Parameter  # quantised: a type of its own
        and child.weight.device.type == "cpu" and child.weight.dtype == torch.float32
    ]  # fmt: skip


def _transpose(layer: nn.Linear) -> None:
    """Stores the layer's weight by column; an embedding that shared it keeps its rows, which it reads one by one."""
    layer.weight = nn.Parameter(_transposed(layer.weight.detach()), requires_grad=False)


def _transposed(weight_OI: Tensor) -> Tensor:
    """The same matrix, stored column by column."""
    return weight_OI.t().contiguous().t()


def _fastest_layout(layers: list[nn.Linear]) -> Layout:
    times = _time_layouts(layers)
    return min(times, key=lambda layout: times[layout])


@torch.inference_mode()
def _time_layouts(layers: list[nn.Linear]) -> dict[Layout, float]:
    """Seconds for one layer of that shape in each layout, summed over `ROWS`."""
    weight_OI = layers[0].weight
    count = min(len(layers), max(1, SAMPLE_BYTES // (weight_OI.numel() * 4)))
    weights = [layer.weight.detach() for layer in layers[:count]]
    transposed = [_transposed(weight) for weight in weights]
    products: dict[Layout, Callable[[Tensor], object]] = {
        "as stored": lambda x: [linear(x, weight) for weight in weights],
        "transposed": lambda x: [linear(x, weight) for weight in transposed],
    }
    if packing_works():
        packed = [PackedLinear(layer) for layer in layers[:count]]
        products["packed"] = lambda x: [layer(x) for layer in packed]
    spent: dict[Layout, float] = dict.fromkeys(products, 0.0)
    for rows in ROWS:
        x_RI = torch.ones(rows, weight_OI.shape[1])
        times: dict[Layout, list[float]] = {layout: [] for layout in products}
        for trial in range(TRIALS + 1):
            for layout, product in products.items():  # interleaved, so that a busy moment hits all alike
                start = time.perf_counter()
                product(x_RI)
                if trial:  # the first pass builds kernels
                    times[layout].append(time.perf_counter() - start)
        for layout, samples in times.items():
            spent[layout] += statistics.median(samples) / count
    return spent
