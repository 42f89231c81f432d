"""Calling generated code directly, without what torch does around it at every call.

`torch.compile` checks its conditions, enters and leaves its contexts and unpacks the arguments in Python, 0.15 ms of a
small model's step: little in a loop of its own, but a step's weights push all of it out of the processor's caches
(docs/lab-notes.md, "What torch does around a call"). Here torch compiles and says under which conditions the code
holds; its own check of them stays, and the rest is one list of arguments. What does not hang from the arguments is
taken to stay the same: the function is one of a frozen model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

Code = Callable[[list[Any]], Sequence[Tensor]]


@dataclass(frozen=True)
class _Run:
    """Generated code that has run: itself, what it was given, and what it returned."""

    code: Code
    inputs: list[Any]
    outputs: Sequence[Tensor]


@dataclass(frozen=True)
class _Version:
    """Generated code: whether it holds for given arguments, what it is given of them, by place, and itself."""

    holds: Callable[[dict[str, Any]], bool]
    inputs: Callable[[dict[str, Any]], list[Any]]
    places: Sequence[str]
    code: Code


class DirectCalls:
    """A function of `arguments` that returns a tuple of tensors, compiled for the arguments it meets.

    Invariant: generated code runs only where torch's own conditions for it hold; for all else torch is asked.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        options: dict[str, Any],
        conditions: Any,
        improve: Callable[[Any], None] | None = None,
    ) -> None:
        """Args:
        function: takes `*arguments`; its code must be its own, for torch keeps versions by code.
        options: of inductor, `cpp_wrapper` among them.
        conditions: torch's `guard_filter_fn`.
        improve: changes a recorded graph before code is generated of it.
        """
        self._code, self._options, self._improve = function.__code__, options, improve
        self._compiling: list[list[str]] = []  # by graph that one call had compiled, where its inputs are
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        self._free = {name: cell.cell_contents for name, cell in cells}
        self._versions: list[_Version] = []
        self._compiled = torch.compile(
            function, dynamic=True, backend=self._generate, options={"guard_filter_fn": conditions}
        )

    def __call__(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Raises: what torch raises when it cannot compile."""
        known = self.known(arguments)
        version = self.version(known)
        if version is not None:
            return tuple(version.code(version.inputs(known)))
        compiled = self._compiling = list[list[str]]()  # anew, for a call that failed may have left something
        with _watching() as runs:
            result: tuple[Tensor, ...] = self._compiled(*arguments)
        if len(compiled) == 1:  # else torch has cut the function in pieces, or has compiled nothing
            self._keep(compiled[0], runs, known, result)
        return result

    def bind(self, *fixed: Any) -> BoundCalls:
        """The function whose last arguments are these."""
        return BoundCalls(self, fixed)

    def known(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        """What the function's names stand for in a call: torch's conditions and places are about these."""
        return {**self._free, "arguments": arguments}

    def version(self, known: dict[str, Any]) -> _Version | None:
        """The version that holds for these arguments."""
        for place, version in enumerate(self._versions):
            if version.holds(known):
                if place:
                    self._versions.insert(0, self._versions.pop(place))
                return version
        return None

    def _generate(self, graph: Any, examples: Sequence[Any]) -> Any:
        """The backend: inductor's; where in the function's arguments its inputs are is written down."""
        from torch._inductor.compile_fx import compile_fx

        self._compiling.append([node.meta["grapharg"].source.name for node in graph.graph.find_nodes(op="placeholder")])
        if self._improve is not None:
            self._improve(graph)
        return compile_fx(graph, list(examples), config_patches=self._options)

    def _keep(
        self, places: Sequence[str], runs: Sequence[_Run], known: dict[str, Any], result: Sequence[Tensor]
    ) -> None:
        """Remembers code that was given what is at those places, and whose outputs are the function's result."""
        from torch._dynamo import eval_frame

        if not all(place.startswith("L[") for place in places):
            return
        given = [eval(place, {"L": known}) for place in places]  # noqa: S307 - torch's own names of the inputs
        run = next((r for r in runs if _same(r.outputs, result) and _same(r.inputs, given)), None)
        list_entries = getattr(eval_frame, "_debug_get_cache_entry_list", None)  # torch promises nothing of the kind
        entries = [] if list_entries is None else list_entries(self._code)
        holds = next((e.guard_manager.check for e in entries if e.guard_manager.check(known)), None)
        if run is not None and holds is not None:
            self._versions.append(_Version(holds, _inputs_of(places, known), places, run.code))


@contextlib.contextmanager
def _watching() -> Iterator[list[_Run]]:
    """Lists the generated code that runs meanwhile: below it torch has nothing more to do, above it much."""
    from torch._inductor.output_code import CompiledFxGraph

    original, runs = CompiledFxGraph.__call__, list[_Run]()

    def call(graph: CompiledFxGraph, inputs: Sequence[Any]) -> Any:
        given = list(inputs)
        outputs = original(graph, inputs)
        runs.append(_Run(cast(Code, graph.current_callable), given, outputs))
        return outputs

    CompiledFxGraph.__call__ = call  # type: ignore[method-assign, assignment]
    try:
        yield runs
    finally:
        CompiledFxGraph.__call__ = original  # type: ignore[method-assign]


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """The same objects, or equal numbers, in the same order."""
    return len(some) == len(others) and all(
        a is b or (type(a) is type(b) is int and a == b) for a, b in zip(some, others, strict=True)
    )


MOST_SHAPES = 4096
"""Shapes that are remembered for bound arguments; then they are forgotten, and asked for anew."""


@dataclass(frozen=True)
class _Ready:
    """Generated code for a shape, its inputs as they were once, and which of them are which arguments of each call."""

    code: Code
    inputs: list[Any]
    changing: list[tuple[int, int]]


class BoundCalls:
    """Calls whose last arguments stay the same objects, unchanged.

    What torch has said of the first ones holds for all of their shape: its conditions are about nothing else. So for
    each shape it is asked once, and the inputs that cannot change are listed once.
    """

    def __init__(self, calls: DirectCalls, fixed: Sequence[Any]) -> None:
        self._calls, self._fixed = calls, fixed
        self._ready: dict[tuple[Any, ...], _Ready] = {}

    def __call__(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Args: arguments: tensors without gradients, numbers, and None.
        Raises: what torch raises when it cannot compile.
        """
        shapes = tuple([a if a is None or type(a) is int else (a.shape, a.stride(), a.dtype) for a in arguments])
        ready = self._ready.get(shapes) or self._prepare(shapes, arguments)
        if ready is None:
            return self._calls(*arguments, *self._fixed)
        inputs = ready.inputs.copy()
        for at, place in ready.changing:
            inputs[at] = arguments[place]
        return tuple(ready.code(inputs))

    def _prepare(self, shapes: tuple[Any, ...], arguments: Sequence[Any]) -> _Ready | None:
        """Remembers the shape's version and its inputs, if there is one already."""
        known = self._calls.known((*arguments, *self._fixed))
        version = self._calls.version(known)
        if version is None:
            return None
        if len(self._ready) >= MOST_SHAPES:
            self._ready.clear()
        whole = {f"L['arguments'][{i}]": i for i, a in enumerate(arguments) if isinstance(a, Tensor)}
        changing = [(at, whole[place]) for at, place in enumerate(version.places) if place in whole]
        ready = self._ready[shapes] = _Ready(version.code, version.inputs(known), changing)
        return ready


def _inputs_of(places: Sequence[str], known: dict[str, Any]) -> Callable[[dict[str, Any]], list[Any]]:
    """Lists the inputs at those places: what hangs from `arguments` anew at every call, the others as they are now."""
    names: dict[str, Any] = {"as_input": _as_input}
    inputs = []
    for number, place in enumerate(places):
        if place.startswith("L['arguments']"):
            inputs.append(f"as_input({place})")
        else:
            inputs.append(f"constant_{number}")
            names[inputs[-1]] = _as_input(eval(place, {"L": known}))  # noqa: S307 - torch's own names of the inputs
    return cast(Callable[[dict[str, Any]], list[Any]], eval(f"lambda L: [{', '.join(inputs)}]", names))  # noqa: S307


def _as_input(value: Any) -> Any:
    """What generated code takes: of a number, the tensor that it would otherwise make at every call."""
    return _number(value) if type(value) is int else value


@cache
def _number(value: int) -> Tensor:
    """Made once, because making it takes longer than a kernel."""
    return torch.tensor(value)
