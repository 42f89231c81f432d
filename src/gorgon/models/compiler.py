"""How a step's functions are run: as they are, recorded, or compiled; on a GPU captured, too (`models.graphs`).

On a small model the walk through transformers' modules in Python, and one kernel launch per operation, are most of a
step (docs/engine.md). `torch.compile` removes both; its code generator needs a C++ compiler, its recorder needs none.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gorgon.config import StepMode
from gorgon.errors import MissingDependencyError
from gorgon.models.direct import DirectCalls
from gorgon.models.kernels import DOORS, triton_works
from gorgon.models.panels import join_products
from gorgon.models.siblings import join_siblings
from gorgon.models.toolchain import cpp_compiler

StepFunction = Callable[..., Any]
BoundFunction = Callable[..., Any]
"""A step function that is given its first arguments, those that change from call to call."""
Binder = Callable[..., BoundFunction]
"""Gives a step function its last arguments, those that stay the same."""
LARGEST_COMPILED = 300_000_000
"""Parameters up to which 'auto' compiles: of a larger model's step the products are nearly all (docs/engine.md)."""
RECOMPILES = 64
"""Shapes that are special to the compiler (one sequence or several, one node or several) times drafters that differ in
what they read from the heads; torch's own limit of 8 would silently fall back to uncompiled steps."""


SERIAL_ELEMENTS = 8192
"""Elements per thread below which a fused loop runs on one thread: waking another takes longer."""


def pick_mode(mode: StepMode, parameters: int, device: torch.device) -> StepMode:
    """'auto' compiles on a GPU with Triton, and small models on a CPU with a C++ compiler; else it captures or records.

    Raises: MissingDependencyError when compiling is asked for and no compiler is there, capturing without CUDA, or
        recording on a GPU, where capturing does more.
    """
    if device.type == "cuda":
        return _pick_on_gpu(mode)
    if mode == "auto":
        return "compiled" if cpp_compiler() is not None and parameters <= LARGEST_COMPILED else "recorded"
    if mode == "compiled" and cpp_compiler() is None:
        raise MissingDependencyError(
            "compiled steps need a C++ compiler and Python's headers", field="steps", value=mode,
            allowed="auto, eager, recorded", hint="install g++ and python3-dev, or use 'recorded'",
        )  # fmt: skip
    if mode == "captured":
        raise MissingDependencyError(
            "captured steps need a CUDA GPU", field="steps", value=mode, allowed="auto, eager, recorded, compiled"
        )
    return mode


def _pick_on_gpu(mode: StepMode) -> StepMode:
    if mode == "auto":
        return "compiled" if triton_works() else "captured"
    if mode == "compiled" and not triton_works():
        raise MissingDependencyError(
            "compiled steps need Triton on a GPU", field="steps", value=mode, allowed="auto, eager, captured",
            hint="install triton, which comes with torch for CUDA, or use 'captured'",
        )  # fmt: skip
    if mode == "recorded":
        raise MissingDependencyError(
            "recorded steps are for CPUs", field="steps", value=mode, allowed="auto, eager, captured, compiled"
        )
    return mode


def step_function(function: StepFunction, backbone: Any, mode: StepMode) -> Binder:
    """The function on that backbone, run in that mode; sizes of batch, tree and context may change from call to call.

    In 'captured' mode it is the function itself: whole steps are captured where they are made (`decode.step`).
    Args:
        function: of the backbone, then of tensors and numbers, then of those arguments that stay the same for many
            calls, tuples of tensors among them; returns a tuple of tensors.
    Returns: what binds the arguments that stay the same.
    Raises (when called): MissingDependencyError when the C++ compiler cannot build what torch generates.
    """

    def bound(*arguments: Any) -> Any:
        return function(backbone, *arguments)

    if mode in ("eager", "captured"):
        return _binder(bound)
    import torch._dynamo.exc  # seconds, so not at the top
    import torch._inductor.exc

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILES)
    torch._dynamo.config.specialize_float = True  # else the modules' own numbers are made tensors at every call
    own = _own_code(bound)
    if backbone.device.type == "cuda":
        return _binder(
            torch.compile(own, backend=_for_gpu, dynamic=True, options={"guard_filter_fn": _about_the_arguments})
        )
    if mode == "recorded":
        return _binder(
            torch.compile(own, backend="eager", dynamic=True, options={"guard_filter_fn": _about_the_arguments})
        )
    options: dict[str, Any] = {
        "cpp_wrapper": True,  # the kernels are called from C++: Python would take a fifth of a small model's step
        "cpp.min_chunk_size": SERIAL_ELEMENTS,
        "cpp.weight_prepack": False,  # `models.linear` has laid out the weights
        "size_asserts": False,  # torch's conditions have said what the sizes are; asking again is a fifteenth of a step
        "aot_inductor.custom_ops_to_c_shims": DOORS,
    }
    compiled = DirectCalls(own, options, _about_the_arguments, join_products if backbone.kernels else None)

    def bind(*fixed: Any) -> BoundFunction:
        calls = compiled.bind(*fixed)

        def run(*arguments: Any) -> Any:
            try:
                return calls(*arguments)
            except (torch._dynamo.exc.BackendCompilerFailed, torch._inductor.exc.InductorError) as error:
                raise MissingDependencyError(
                    "the C++ compiler cannot build the step functions", field="steps", value=mode,
                    allowed="auto, eager, recorded", hint="update the compiler, or use 'recorded'",
                ) from error  # fmt: skip

        return run

    return bind


def _for_gpu(graph: Any, examples: Sequence[Any]) -> Any:
    """Inductor, after products of the same rows were joined. What it generates is captured as a part of a step."""
    from torch._inductor.compile_fx import compile_fx

    join_siblings(graph)
    return compile_fx(graph, list(examples))


def _binder(function: StepFunction) -> Binder:
    return lambda *fixed: lambda *arguments: function(*arguments, *fixed)


def _own_code(function: StepFunction) -> StepFunction:
    """The same function with code of its own: what is compiled belongs to code, so backbones never share it."""
    assert isinstance(function, types.FunctionType)
    return types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__
    )


def _about_the_arguments(guards: Sequence[Any]) -> list[bool]:
    """Which conditions are checked at each call: sizes, and those on the arguments.

    By default every attribute of every module is looked at again, 0.2 to 0.4 ms for four layers. Code is compiled for
    each backbone on its own, and a backbone is frozen, so nothing that hangs from it changes.
    """
    return [
        guard.guard_type == "SHAPE_ENV" or re.split(r"[.\[]", guard.name, maxsplit=1)[0] == "arguments"
        for guard in guards
    ]
