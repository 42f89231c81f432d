"""What a step is given, as tensors: drafts and lengths, written into memory that is used again.

Making a small tensor of a list takes torch longer than a small kernel; copying numbers into one's memory does not.
Shapes: B sequences, N nodes.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gorgon.core.draft import BITS, DEPTHS, PARENTS, TOKENS, Draft

Room = tuple["array[int]", Tensor]
"""Memory, and the tensor that lies in it."""


@dataclass(slots=True)
class DraftBatch:
    """The drafts of B sequences on the device, filled up to the largest: tokens, parents, depths and bits.

    Attributes: longest: P, nodes of the longest path.
    """

    flat_4BN: Tensor
    longest: int

    @property
    def nodes(self) -> int:
        """N."""
        return int(self.flat_4BN.shape[2])


class Inputs:
    """Tensors on the device, each made once for its shape. What one call returns holds until the next."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._rooms: dict[tuple[int, ...], Room] = {}

    def drafts(self, drafts: Sequence[Draft], nodes: int | None = None, *, least: int = 1) -> DraftBatch:
        """Args:
        nodes: fill up to this many, and call none deeper, where shapes must not change from step to step.
        least: fill up to this many; two keep a draft of the root alone from being a shape of its own to the compiler.
        """
        size = max([least, *[d.nodes for d in drafts]]) if nodes is None else nodes
        memory, flat_4BN = self._room(4, len(drafts), size)
        at = 0
        for row in (TOKENS, PARENTS, DEPTHS, BITS):
            for draft in drafts:
                memory[at : at + size] = draft.numbers[row : row + size]
                at += size
        longest = size if nodes is not None else max([least, *[d.longest for d in drafts]])
        return DraftBatch(self._on_device(flat_4BN), longest)

    def lengths(self, lengths: Sequence[int]) -> Tensor:
        """Committed rows of every sequence, int64 [B]."""
        memory, lengths_B = self._room(len(lengths))
        for b, length in enumerate(lengths):
            memory[b] = length
        return self._on_device(lengths_B)

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor if self.device.type == "cpu" else tensor.to(self.device, non_blocking=True)

    def _room(self, *shape: int) -> Room:
        found = self._rooms.get(shape)
        if found is None:
            memory = array("q", [0]) * math.prod(shape)
            found = self._rooms[shape] = memory, torch.frombuffer(memory, dtype=torch.int64).view(shape)
        return found
