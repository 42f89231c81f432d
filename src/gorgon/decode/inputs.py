"""What a step is given, as tensors: drafts and lengths, written into memory that is used again.

Making a small tensor of a list takes torch longer than a small kernel; copying numbers into one's memory does not. On a
GPU the memory is pinned, so that nothing waits for the copy, and the tensors there stay where they are, so that a
captured step can read them.
Shapes: B sequences, N nodes, Q nodes of all sequences that are no fillers.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gorgon.core.draft import BITS, DEPTHS, PARENTS, TOKENS, Draft


@dataclass(frozen=True, slots=True)
class _Room:
    """Memory that is written, the tensor that lies in it, and the one that a step reads: the same on a CPU."""

    memory: Any  # takes slices of an array("q"): one, or a view of pinned memory
    host: Tensor
    given: Tensor

    def tensor(self) -> Tensor:
        """The one that a step reads, with what the memory holds now."""
        if self.given is not self.host:
            self.given.copy_(self.host, non_blocking=True)
        return self.given


@dataclass(slots=True)
class DraftBatch:
    """The drafts of B sequences on the device, filled up to the largest: tokens, parents, depths and bits.

    Attributes:
        longest: P, nodes of the longest path.
        rows_Q: int64, places in [B * N] of the nodes that are no fillers; None where all are run.
    """

    flat_4BN: Tensor
    longest: int
    rows_Q: Tensor | None = None

    @property
    def nodes(self) -> int:
        """N."""
        return int(self.flat_4BN.shape[2])


class Inputs:
    """Tensors on the device, each made once for its shape. What one call returns holds until the next."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._rooms: dict[tuple[str | int, ...], _Room] = {}

    def drafts(
        self, drafts: Sequence[Draft], nodes: int | None = None, *, least: int = 1, packed: bool = False
    ) -> DraftBatch:
        """Args:
        nodes: fill up to this many, and call none deeper, where shapes must not change from step to step.
        least: fill up to this many; two keep a draft of the root alone from being a shape of its own to the compiler.
        packed: whether fillers are not to be run, where there may be any: among several drafts of several nodes.
        """
        size = max([least, *[d.nodes for d in drafts]]) if nodes is None else nodes
        room = self._room("drafts", 4, len(drafts), size)
        memory, at = room.memory, 0
        for row in (TOKENS, PARENTS, DEPTHS, BITS):
            for draft in drafts:
                memory[at : at + size] = draft.numbers[row : row + size]
                at += size
        longest = size if nodes is not None else max([least, *[d.longest for d in drafts]])
        rows_Q = self._rows(drafts, size) if packed and len(drafts) > 1 and size > 1 else None
        return DraftBatch(room.tensor(), longest, rows_Q)

    def _rows(self, drafts: Sequence[Draft], size: int) -> Tensor:
        places = array("q")
        for b, draft in enumerate(drafts):
            places.extend(range(b * size, b * size + draft.nodes))
        room = self._room("rows", len(places))
        room.memory[:] = places
        return room.tensor()

    def lengths(self, lengths: Sequence[int]) -> Tensor:
        """Committed rows of every sequence, int64 [B]."""
        room = self._room("lengths", len(lengths))
        for b, length in enumerate(lengths):
            room.memory[b] = length
        return room.tensor()

    def prompt(self, tokens: Sequence[int], size: int) -> Tensor:
        """A part of a prompt [1, T], filled up to `size`."""
        room = self._room("prompt", 1, size)
        room.memory[: len(tokens)] = array("q", tokens)
        return room.tensor()

    def _room(self, name: str, *shape: int) -> _Room:
        found = self._rooms.get((name, *shape))
        if found is None:
            found = self._rooms[name, *shape] = _make_room(shape, self.device)
        return found


def _make_room(shape: tuple[int, ...], device: torch.device) -> _Room:
    size = math.prod(shape)
    if device.type != "cuda":
        memory = array("q", [0]) * size
        host = torch.frombuffer(memory, dtype=torch.int64).view(shape)
        return _Room(memory, host, host if device.type == "cpu" else torch.empty_like(host, device=device))
    pinned = torch.zeros(size, dtype=torch.int64, pin_memory=True)
    values: Any = pinned.numpy()
    view = memoryview(values).cast("B").cast("q")  # an array's slices fit only a view of the same format
    return _Room(view, pinned.view(shape), torch.empty(shape, dtype=torch.int64, device=device))
