"""Steps captured as CUDA graphs: everything a step launches is recorded once per shape and launched again in one call.

A captured graph reads and writes fixed addresses: the tensors that it was captured with, into which other inputs are
copied, and results that are to be read before the next step. What a graph does is fixed, too: functions that are
captured may not wait for the device, nor let a value decide a size (tests/unit/test_capturable.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gorgon.models.cache import TreeCache
from gorgon.progress import say

MOST = 256
"""Shapes that are kept for one cache; the one that was used longest ago goes first."""

Outputs = tuple[Tensor, ...]
Stage = Callable[[Sequence[Tensor], Sequence[Outputs]], Outputs]
"""A function of the static inputs and of the outputs of the stages before it."""


class Replay(Protocol):
    """A captured function.

    Attributes: outputs: the tensors that every replay writes.
    """

    outputs: Outputs

    def replay(self) -> None:
        """Runs it again, on what its inputs hold now."""
        ...


class Recorder(Protocol):
    """What captures and replays: CUDA, or in tests something that runs the function again."""

    def capture(self, function: Callable[[], Outputs]) -> Replay:
        """Runs the function to warm up, then records it. Raises: RuntimeError for what cannot be recorded."""
        ...

    def fetch(self, table: Tensor) -> list[list[float]]:
        """The table's values on the host, once everything that was launched before is done."""
        ...


class CudaRecorder:
    """CUDA graphs that share one pool of memory: they are replayed one after another, never at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own
        self._pool = torch.cuda.graph_pool_handle()
        self._host: dict[torch.Size, Tensor] = {}

    def capture(self, function: Callable[[], Outputs]) -> Replay:
        """Warms up on a side stream, where a wait for the device is an error, and captures there."""
        current = torch.cuda.current_stream(self._device)
        self._side.wait_stream(current)
        before = torch.cuda.get_sync_debug_mode()
        try:
            with torch.cuda.stream(self._side):
                function()  # libraries choose kernels and allocate workspaces
                torch.cuda.set_sync_debug_mode("error")  # a wait is named here, where nothing is broken by it
                function()
        finally:
            torch.cuda.set_sync_debug_mode(before)
            current.wait_stream(self._side)
        graph = torch.cuda.CUDAGraph()
        # Another thread's calls to CUDA must not end the capture: only this thread's are recorded.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
            outputs = function()
        return _CudaReplay(graph, outputs)

    def fetch(self, table: Tensor) -> list[list[float]]:
        """One copy into pinned memory, and one wait for the stream."""
        host = self._host.get(table.shape)
        if host is None:
            host = self._host[table.shape] = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
        host.copy_(table, non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        values: list[list[float]] = host.tolist()
        return values


class _CudaReplay:
    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Outputs) -> None:
        self._graph, self.outputs = graph, outputs

    def replay(self) -> None:
        self._graph.replay()


@dataclass
class Captured:
    """One shape: its inputs, which every use overwrites, and its stages, to be run in their order."""

    inputs: tuple[Tensor, ...]
    stages: list[Replay]

    def put(self, values: Sequence[Tensor]) -> None:
        """Copies values into the first inputs, unless they are those."""
        for mine, value in zip(self.inputs, values, strict=False):
            if mine is not value:
                mine.copy_(value)

    def run(self, stage: int) -> Outputs:
        """Runs one stage; its outputs hold until it is run again."""
        self.stages[stage].replay()
        return self.stages[stage].outputs


class Graphs:
    """The captured shapes by cache. A cache that is gone takes its graphs with it, for they point into its buffers."""

    def __init__(self, recorder: Recorder, most: int = MOST) -> None:
        self.recorder, self._most = recorder, most
        self._by_cache: WeakKeyDictionary[TreeCache, OrderedDict[Hashable, Captured]] = WeakKeyDictionary()
        self.failed = False

    def of(
        self,
        cache: TreeCache,
        key: Hashable,
        inputs: Sequence[Tensor],
        stages: Sequence[Stage],
        later: Sequence[Tensor] = (),
    ) -> Captured | None:
        """The captured shape with these inputs, captured now if it is new; None where steps cannot be captured.

        Args:
            key: everything besides the cache that decides what is launched; its objects live as long as the graph, so
                it names the object that holds the weights.
            inputs: which the graph reads where they are; their owner may use them again. A warm-up runs the stages on
                them for real, which is harmless: a step writes cache rows behind the committed ones only, and writes
                them all before it reads one.
            later: tensors like the inputs that come between the stages, and are the last of `Captured.inputs`.
        """
        if self.failed:
            return None
        place = (key, cache.addresses)
        shapes = self._by_cache.setdefault(cache, OrderedDict())
        found = shapes.get(place)
        if found is None:
            found = self._capture([*inputs, *map(torch.zeros_like, later)], stages)
            if found is None:
                self._by_cache.clear()
                return None
            while len(shapes) >= self._most:
                shapes.popitem(last=False)
            shapes[place] = found
        shapes.move_to_end(place)
        found.put(inputs)
        return found

    def _capture(self, inputs: Sequence[Tensor], stages: Sequence[Stage]) -> Captured | None:
        held = tuple(inputs)
        made: list[Replay] = []
        try:
            for stage in stages:
                outputs = [replay.outputs for replay in made]
                made.append(self.recorder.capture(partial(stage, held, outputs)))
                made[-1].replay()  # the next stage warms up on what this one writes
        except RuntimeError as error:  # an operation that waits for the device, or too little memory
            self.failed = True
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            say(f"warning: this model's steps cannot be captured, and run one by one: {first}")
            return None
        return Captured(held, made)

    def __len__(self) -> int:
        return sum(len(shapes) for shapes in self._by_cache.values())
