"""The key-value cache: preallocated once, written in place, and after each step only the accepted rows are kept.

It speaks the protocol of transformers' `Cache`, so every model class takes it as `past_key_values`.
Shapes: 2 (keys, values), L layers, B sequences, G key-value heads, M capacity in tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from gorgon.errors import LimitError, ModelError


class TreeCache(Cache):  # type: ignore[misc]  # transformers is untyped here
    """One buffer [2, L, B, G, M, D]; rows [0, length) are committed, rows behind them belong to the current step.

    Invariant: after `commit` the buffer holds exactly what plain decoding would have written, in the same order.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        """Args: layers: L. capacity: M, the longest context plus the nodes of the largest tree."""
        super().__init__(layers=[])
        self.num_layers, self.capacity, self.length = layers, capacity, 0
        self._buffer: Tensor | None = None
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes new rows behind the committed ones and returns all rows so far, as views (no copy)."""
        if self._buffer is None:
            self._allocate(key_states, value_states)
        end = self.length + key_states.shape[2]
        if end > self.capacity:
            raise LimitError("the cache is full", field="capacity", value=end, allowed=f"at most {self.capacity}")
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        keys[:, :, self.length : end] = key_states
        values[:, :, self.length : end] = value_states
        return keys[:, :, :end], values[:, :, :end]

    def _allocate(self, keys_BGTD: Tensor, values_BGTD: Tensor) -> None:
        if keys_BGTD.shape != values_BGTD.shape:
            raise ModelError("keys and values differ in shape; this attention is not supported", field="cache")
        batch, groups, _, size = keys_BGTD.shape
        self._buffer = keys_BGTD.new_zeros(2, self.num_layers, batch, groups, self.capacity, size)
        self._keys, self._values = list(self._buffer[0]), list(self._buffer[1])

    def commit(self, rows: Sequence[int]) -> None:
        """Keeps these rows of the current step, in this order, and forgets its others.

        Args: rows: strictly increasing, counted from the first row of the step.
        """
        count = len(rows)
        if rows[-1] != count - 1:  # else they already lie in place, as a chain of first choices does
            assert self._buffer is not None
            index = torch.tensor(rows, device=self._buffer.device) + self.length
            moved = self._buffer.index_select(4, index)
            self._buffer[..., self.length : self.length + count, :] = moved
        self.length += count

    def reset(self) -> None:
        """Forgets every row; the memory stays."""
        self.length = 0

    def __len__(self) -> int:
        return self.num_layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Committed rows; part of transformers' protocol."""
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the first new row; part of transformers' protocol."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(rows visible to the step, first row); part of transformers' protocol."""
        return self.length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Capacity; part of transformers' protocol."""
        return self.capacity

    @property
    def is_sliding(self) -> list[bool]:
        """No layer drops rows: contexts never exceed the window (`Backbone.max_length`)."""
        return [False] * self.num_layers

    @property
    def is_compileable(self) -> bool:
        """Rows are written at a Python offset, which a captured graph could not follow."""
        return False
