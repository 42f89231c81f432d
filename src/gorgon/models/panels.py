"""Linear layers whose weight lies in panels, multiplied by our own kernel: a few rows cost little more than one.

The kernel is panels.cpp, which says how it works; it is built on first use and kept. Its products do not depend on how
many rows there are: what a step computes for a node is, to the last bit, what plain decoding computes there.
Shapes: I inputs, O outputs.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gorgon.errors import MissingDependencyError
from gorgon.models.toolchain import build_library, cpp_compiler

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("panels.cpp")
DOOR = (
    "AOTITorchError aoti_torch_cpu_panel_linear("
    "AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*, int64_t, AtenTensorHandle*)"
)
"""How generated C++ calls the kernel: by the linker's name, not looked up at every call."""


class PanelLinear(nn.Module):
    """A linear layer in panels; float32, CPU, inference only."""

    def __init__(self, layer: nn.Linear) -> None:
        """Raises: MissingDependencyError when the kernel cannot be built."""
        load_kernel()
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = None if layer.bias is None else layer.bias.detach()
        self.register_buffer("panels", torch.ops.gorgon.pack_panels(layer.weight.detach().contiguous()))

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        result: Tensor = torch.ops.gorgon.panel_linear(x, self.panels, self.bias, self.out_features)
        return result


@cache
def panels_work() -> bool:
    """Whether there is a C++ compiler, and it builds the kernel; if it fails to, a warning says why."""
    if cpp_compiler() is None:
        return False
    try:
        load_kernel()
    except MissingDependencyError as error:
        log.warning("weights are not laid out in panels, so steps take longer: %s", error)
        return False
    return True


@cache
def load_kernel() -> None:
    """Builds the kernel unless it was, and makes it known to torch as `gorgon::panel_linear`.

    Raises: MissingDependencyError when it cannot be built.
    """
    library = str(build_library(SOURCE))
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)  # generated code finds its door among the process's symbols
    torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    torch.library.register_fake("gorgon::panel_linear", _without_values)


def _without_values(x: Tensor, _panels: Tensor, _bias: Tensor | None, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


class Doors(dict[Any, list[str]]):
    """For inductor's option `aot_inductor.custom_ops_to_c_shims`: by operation, how generated code calls it.

    Keyed by name, because torch keeps what it compiled under a key that it cannot make of an operation.
    """

    def __contains__(self, operation: object) -> bool:
        return super().__contains__(str(operation))


DOORS = Doors({"gorgon.panel_linear.default": [DOOR]})
