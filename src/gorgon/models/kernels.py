"""Our own CPU kernels: products in panels (panels.cpp), attention over spans (attention.cpp), and argmax.cpp.

They are built with the machine's C++ compiler on first use, and kept. What they compute for a node of a draft tree is,
to the last bit, what they compute for it in plain decoding: no sum depends on what is computed beside it.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gorgon.models.toolchain import build_library, can_build

HEADER = Path(__file__).with_name("kernels.h")
SOURCES = tuple(HEADER.with_name(name) for name in ("panels.cpp", "attention.cpp", "argmax.cpp"))


@cache
def kernels_work() -> bool:
    """Whether there is a C++ compiler, and it builds the kernels; if it fails to, a warning says why."""
    return can_build(load_kernels, "our own kernels are not used, so steps take longer")


@cache
def triton_works() -> bool:
    """Whether Triton, which our GPU kernels are written in, is here with a GPU that it knows."""
    from torch.utils._triton import has_triton

    return bool(has_triton())


@cache
def load_kernels() -> None:
    """Builds the kernels unless they were, and makes them known to torch as operations of `gorgon`.

    Raises: MissingDependencyError when they cannot be built.
    """
    library = str(build_library("kernels", SOURCES, [HEADER]))
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)  # generated code finds its doors among the process's symbols
    torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    torch.library.register_fake("gorgon::panel_linear", _product)
    torch.library.register_fake("gorgon::panel_products", _products)
    torch.library.register_fake("gorgon::tree_attention", _attended)
    torch.library.register_fake("gorgon::first_max", _largest)


def _product(x: Tensor, _block: Tensor, _offset: int, _inputs: int, _bias: Tensor | None, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


def _products(x_KRI: Tensor, _panels: Tensor, bias_KO: Tensor) -> Tensor:
    return x_KRI.new_empty(*x_KRI.shape[:-1], bias_KO.shape[1])


def _attended(queries_BHND: Tensor, _keys: Tensor, values_BGSD: Tensor, _spans: Tensor, _scale: float) -> Tensor:
    batch, heads, nodes, _ = queries_BHND.shape
    return queries_BHND.new_empty(batch, nodes, heads, values_BGSD.shape[3])


def _largest(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


class Doors(dict[Any, list[str]]):
    """For inductor's option `aot_inductor.custom_ops_to_c_shims`: by operation, how generated code calls it.

    It calls them by the linker's names, so that nothing is looked up at every call. Keyed by name, because torch keeps
    what it compiled under a key that it cannot make of an operation.
    """

    def __contains__(self, operation: object) -> bool:
        return super().__contains__(str(operation))


DOORS = Doors({
    "gorgon.panel_linear.default": [
        "AOTITorchError aoti_torch_cpu_panel_linear("
        "AtenTensorHandle, AtenTensorHandle, int64_t, int64_t, AtenTensorHandle*, int64_t, AtenTensorHandle*)"
    ],
    "gorgon.panel_products.default": [
        "AOTITorchError aoti_torch_cpu_panel_products("
        "AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*)"
    ],
    "gorgon.tree_attention.default": [
        "AOTITorchError aoti_torch_cpu_tree_attention("
        "AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, double, AtenTensorHandle*)"
    ],
    "gorgon.first_max.default": ["AOTITorchError aoti_torch_cpu_first_max(AtenTensorHandle, AtenTensorHandle*)"],
})  # fmt: skip
