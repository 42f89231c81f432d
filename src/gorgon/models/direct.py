"""Calling generated code directly, without what torch does around it at every call.

`torch.compile` checks its conditions, enters and leaves its contexts and unpacks the arguments in Python, 0.15 ms of a
small model's step: little in a loop of its own, but a step's weights push all of it out of the processor's caches
(docs/lab-notes.md, "What torch does around a call"). Here torch compiles and says under which conditions the code
holds; its own check of them stays, and the rest is one list of arguments. What does not hang from the arguments is
taken to stay the same: the function is one of a frozen model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

Call = Callable[..., Sequence[Tensor]]


@dataclass(eq=False)
class _Made:
    """What the compiler made in one call of the function."""

    inputs: list[str]
    call: Call
    outputs: Sequence[Tensor] = ()


@dataclass(frozen=True)
class _Version:
    """Generated code: whether it holds for given arguments, what it is given of them, and itself."""

    holds: Callable[[dict[str, Any]], bool]
    inputs: Callable[[dict[str, Any]], list[Any]]
    places: Sequence[str]
    call: Call


class DirectCalls:
    """A function of `arguments` that returns a tuple of tensors, compiled for the arguments it meets.

    Invariant: generated code runs only where torch's own conditions for it hold; for all else torch is asked.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], options: dict[str, Any], conditions: Any) -> None:
        """Args:
        function: takes `*arguments`; its code must be its own, for torch keeps versions by code.
        options: of inductor, `cpp_wrapper` among them.
        conditions: torch's `guard_filter_fn`.
        """
        self._code, self._options, self._made = function.__code__, options, list[_Made]()
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        self._free = {name: cell.cell_contents for name, cell in cells}
        self._versions: list[_Version] = []
        self._compiled = torch.compile(
            function, dynamic=True, backend=self._generate, options={"guard_filter_fn": conditions}
        )

    def __call__(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Raises: what torch raises when it cannot compile."""
        known = {**self._free, "arguments": arguments}
        version = self.version(known)
        if version is not None:
            return tuple(version.call(*version.inputs(known)))
        made = self._made = list[_Made]()  # anew, for a call that failed may have left something
        result: tuple[Tensor, ...] = self._compiled(*arguments)
        self._made = []
        if len(made) == 1:  # else torch has cut the function in pieces, or has compiled nothing
            self._keep(made[0], known, result)
        return result

    def bind(self, *fixed: Any) -> BoundCalls:
        """The function whose last arguments are these."""
        return BoundCalls(self, self._free, fixed)

    def version(self, known: dict[str, Any]) -> _Version | None:
        """The version that holds for these arguments."""
        for place, version in enumerate(self._versions):
            if version.holds(known):
                if place:
                    self._versions.insert(0, self._versions.pop(place))
                return version
        return None

    def _generate(self, graph: Any, examples: Sequence[Any]) -> Call:
        """The backend: inductor's code, and where in the function's arguments its inputs are."""
        from torch._inductor.compile_fx import compile_fx

        places = [node.meta["grapharg"].source.name for node in graph.graph.find_nodes(op="placeholder")]
        made = _Made(places, cast(Call, compile_fx(graph, list(examples), config_patches=self._options)))
        self._made.append(made)

        def call(*inputs: Any) -> Sequence[Tensor]:
            outputs = made.call(*inputs)
            if made in self._made:
                made.outputs = outputs
            return outputs

        return call

    def _keep(self, made: _Made, known: dict[str, Any], result: tuple[Tensor, ...]) -> None:
        """Remembers a version whose outputs are the function's result and whose inputs hang from what it is given."""
        from torch._dynamo import eval_frame

        same = len(made.outputs) == len(result) and all(a is b for a, b in zip(made.outputs, result, strict=True))
        if not same or not all(place.startswith("L[") for place in made.inputs):
            return
        list_entries = getattr(eval_frame, "_debug_get_cache_entry_list", None)  # torch promises nothing of the kind
        entries = [] if list_entries is None else list_entries(self._code)
        holds = next((e.guard_manager.check for e in entries if e.guard_manager.check(known)), None)
        if holds is not None:
            self._versions.append(_Version(holds, _inputs_of(made.inputs, known), made.inputs, made.call))


MOST_SHAPES = 4096
"""Shapes that are remembered for bound arguments; then they are forgotten, and asked for anew."""


class BoundCalls:
    """Calls whose last arguments stay the same objects, unchanged.

    What torch has said of the first ones holds for all of their shape: its conditions are about nothing else. So for
    each shape it is asked once, and the inputs that cannot change are listed once.
    """

    def __init__(self, calls: DirectCalls, free: Mapping[str, Any], fixed: Sequence[Any]) -> None:
        self._calls, self._free, self._fixed = calls, free, fixed
        self._ready: dict[tuple[Any, ...], tuple[Call, list[Any], list[tuple[int, int]]]] = {}

    def __call__(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Args: arguments: tensors without gradients, and numbers.
        Raises: what torch raises when it cannot compile.
        """
        shapes = tuple([a if type(a) is int else (a.shape, a.stride(), a.dtype) for a in arguments])
        ready = self._ready.get(shapes)
        if ready is None:
            self._prepare(shapes, arguments)
            return self._calls(*arguments, *self._fixed)
        call, inputs, changing = ready
        inputs = inputs.copy()
        for at, place in changing:
            inputs[at] = arguments[place]
        return tuple(call(*inputs))

    def _prepare(self, shapes: tuple[Any, ...], arguments: Sequence[Any]) -> None:
        """Remembers the shape's version and its inputs, if there is one already."""
        known = {**self._free, "arguments": (*arguments, *self._fixed)}
        version = self._calls.version(known)
        if version is None:
            return
        if len(self._ready) >= MOST_SHAPES:
            self._ready.clear()
        whole = {f"L['arguments'][{i}]": i for i, a in enumerate(arguments) if isinstance(a, Tensor)}
        changing = [(at, whole[place]) for at, place in enumerate(version.places) if place in whole]
        self._ready[shapes] = version.call, version.inputs(known), changing


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
