"""What a step is given, as tensors: drafts and lengths, written into memory that is used again.

Making a small tensor of a list takes torch longer than a small kernel; writing numbers into one does not.
Shapes: B sequences, N nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gorgon.core.draft import Draft

Room = tuple[npt.NDArray[np.int64], Tensor]


@dataclass(frozen=True)
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
        size = max(least, *(d.nodes for d in drafts)) if nodes is None else nodes
        array, flat_4BN = self._room(4, len(drafts), size)
        for b, draft in enumerate(drafts):
            array[:, b] = np.array(draft.flat(size)).reshape(4, size)
        longest = size if nodes is not None else max(least, *(max(d.depths) + 1 for d in drafts))
        return DraftBatch(self._on_device(flat_4BN), longest)

    def lengths(self, lengths: Sequence[int]) -> Tensor:
        """Committed rows of every sequence, int64 [B]."""
        array, lengths_B = self._room(len(lengths))
        array[:] = lengths
        return self._on_device(lengths_B)

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor if self.device.type == "cpu" else tensor.to(self.device, non_blocking=True)

    def _room(self, *shape: int) -> Room:
        found = self._rooms.get(shape)
        if found is None:
            tensor = torch.empty(shape, dtype=torch.int64)
            found = self._rooms[shape] = tensor.numpy(), tensor
        return found
