"""How a step's functions are run: as they are, recorded, or compiled.

On a small model the walk through transformers' modules in Python, and one kernel launch per operation, are most of a
step (docs/engine.md). `torch.compile` removes both; its code generator needs a C++ compiler, its recorder needs none.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gorgon.config import StepMode
from gorgon.errors import MissingDependencyError

TensorFunction = Callable[..., Tensor]
RECOMPILES = 64
"""Shapes that are special to the compiler (one sequence or several, one node or several) times trees that differ in what
they read from the heads; torch's own limit of 8 would silently fall back to uncompiled steps."""


def has_cpp_compiler() -> bool:
    """Whether torch's CPU code generator finds a C++ compiler."""
    from torch._inductor import config

    configured = config.cpp.cxx
    names = [configured] if isinstance(configured, str) else [n for n in configured if n]
    return any(shutil.which(name) for name in (*names, "g++", "clang++"))


def pick_mode(mode: StepMode) -> StepMode:
    """'auto' compiles where a C++ compiler is installed, and records elsewhere.

    Raises: MissingDependencyError when compiling is asked for and no compiler is there.
    """
    if mode == "auto":
        return "compiled" if has_cpp_compiler() else "recorded"
    if mode == "compiled" and not has_cpp_compiler():
        raise MissingDependencyError(
            "compiled steps need a C++ compiler and none is installed", field="steps", value=mode,
            allowed="auto, eager, recorded", hint="install g++ or clang, or use 'recorded'",
        )  # fmt: skip
    return mode


@functools.lru_cache(maxsize=None)
def _prepare() -> None:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILES)


def step_function(function: TensorFunction, mode: StepMode) -> TensorFunction:
    """The function, run in that mode; sizes of batch, tree and context may change from call to call."""
    if mode == "eager":
        return function
    _prepare()
    options: dict[str, Any] = {"dynamic": True}
    if mode == "recorded":
        options["backend"] = "eager"
    compiled: TensorFunction = torch.compile(function, **options)
    return compiled
