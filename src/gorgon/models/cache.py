"""The key-value cache: preallocated once, written in place, and after each step only the accepted rows are kept.

It speaks the protocol of transformers' `Cache`, so every model class takes it as `past_key_values`.
Shapes: L layers, B sequences in a step, C sequences in the buffer, G key-value heads, M capacity in tokens, D head
size, N new rows of a sequence in a step, Q those of all sequences, P accepted rows, S rows that a step's attention
reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from gorgon.errors import LimitError
from gorgon.models.kernels import triton_works


class TreeCache(Cache):  # type: ignore[misc]  # transformers is untyped here
    """Per layer two buffers [C, G, M, D]. A step writes its rows where `place` said; `keep` moves the accepted ones.

    The cache does not know how long its sequences are: the caller passes lengths with every step, so the same buffers
    serve one request or many, and a step is a pure function of tensors that a compiler or a CUDA graph can hold.
    Invariant: after `keep` a sequence's rows are exactly what plain decoding would have written, in the same order.
    """

    def __init__(self, layers: int, sequences: int, capacity: int) -> None:
        """Args: layers: L. sequences: C. capacity: M, the longest context plus the nodes of the largest tree."""
        super().__init__(layers=[])
        self.num_layers, self.sequences, self.capacity = layers, sequences, capacity
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._sequences: Tensor | None = None
        self._read = 0  # of how many sequences the next forward reads
        self._slots_BN: Tensor | None = None
        self._visible = 0

    @classmethod
    def over(cls, keys: Sequence[Tensor], values: Sequence[Tensor]) -> TreeCache:
        """A cache on another one's `buffers`, inside a step function."""
        sequences, capacity = keys[0].shape[0], keys[0].shape[2]
        for buffer in (*keys, *values):  # one number each to the compiler, not one for every buffer
            torch._check(buffer.shape[0] == sequences)  # type: ignore[no-untyped-call]
            torch._check(buffer.shape[2] == capacity)  # type: ignore[no-untyped-call]
        cache = cls(len(keys), sequences, capacity)
        cache.keys, cache.values = list(keys), list(values)
        return cache

    def place(self, slots_BN: Tensor, visible: int, sequences_1Q: Tensor | None = None) -> None:
        """Says where the next forward writes: row `slots_BN[b, i]` of sequence b, and that it reads rows [0, visible).

        Args: sequences_1Q: which sequence each row belongs to, where B is one and rows of several sequences are packed.
        Raises: LimitError when that is more than the cache holds.
        """
        if visible > self.capacity:
            raise LimitError("the cache is full", field="capacity", value=visible, allowed=f"at most {self.capacity}")
        self._slots_BN, self._visible = slots_BN, visible
        if sequences_1Q is None:
            self._read = slots_BN.shape[0]
            self._sequences = torch.arange(self._read, device=slots_BN.device)[:, None]
        else:
            self._read, self._sequences = self.sequences, sequences_1Q

    @property
    def placed(self) -> tuple[Tensor, int]:
        """What `place` said."""
        assert self._slots_BN is not None
        return self._slots_BN, self._visible

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes the step's rows [B, G, N, D] and returns all visible rows, as views; no copy.

        Returns: [B, G, S, D]; [C, G, S, D] where rows of several sequences are packed.
        """
        if layer_idx == len(self.keys):
            self._allocate(key_states, value_states)
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[self._sequences, :, self._slots_BN] = key_states.transpose(1, 2)
        values[self._sequences, :, self._slots_BN] = value_states.transpose(1, 2)
        return keys[: self._read, :, : self._visible], values[: self._read, :, : self._visible]

    def _allocate(self, keys_BGND: Tensor, values_BGND: Tensor) -> None:
        for states, buffers in ((keys_BGND, self.keys), (values_BGND, self.values)):
            _, groups, _, size = states.shape
            buffers.append(states.new_zeros(self.sequences, groups, self.capacity, size))

    def keep(self, lengths_B: Tensor, nodes_BP: Tensor) -> None:
        """Moves the accepted rows of every sequence to the front of the step's rows.

        Args:
            lengths_B: rows that were committed before the step.
            nodes_BP: int64, strictly increasing along the accepted path, then padding: rows moved by padding land
                behind the accepted ones, where the next step overwrites them.
        """
        if self.keys[0].is_cuda and triton_works():
            from gorgon.models.triton_kernels import keep_rows

            for buffers, addresses in self._alike:
                keep_rows(buffers, addresses, lengths_B, nodes_BP)
            return
        from_BP = lengths_B[:, None] + nodes_BP
        to_BP = lengths_B[:, None] + torch.arange(nodes_BP.shape[1], device=nodes_BP.device)
        rows_B1 = torch.arange(nodes_BP.shape[0], device=nodes_BP.device)[:, None]
        for buffer in (*self.keys, *self.values):
            buffer[rows_B1, :, to_BP] = buffer[rows_B1, :, from_BP]

    @cached_property
    def _alike(self) -> list[tuple[list[Tensor], Tensor]]:
        """Buffers by shape, and where they are. A captured step is bound to both; other buffers are another cache's."""
        shapes: dict[torch.Size, list[Tensor]] = {}
        for buffer in (*self.keys, *self.values):
            shapes.setdefault(buffer.shape, []).append(buffer)
        return [(b, torch.tensor([t.data_ptr() for t in b], device=b[0].device)) for b in shapes.values()]

    @torch.inference_mode()
    def copy_sequence(self, source: TreeCache, origin: int, target: int, length: int) -> None:
        """Copies the first `length` rows of `source`'s sequence `origin` to this cache's sequence `target`."""
        if not self.keys:
            for mine, theirs in ((self.keys, source.keys), (self.values, source.values)):
                mine.extend(t.new_zeros(self.sequences, t.shape[1], self.capacity, t.shape[3]) for t in theirs)
        for mine, theirs in ((self.keys, source.keys), (self.values, source.values)):
            for to, from_ in zip(mine, theirs, strict=True):
                to[target, :, :length] = from_[origin, :, :length]

    @torch.inference_mode()
    def clear_sequence(self, sequence: int, start: int = 0) -> None:
        """Makes a sequence's rows from `start` on zeros, as they were at first."""
        for buffer in (*self.keys, *self.values):
            buffer[sequence, :, start:].zero_()

    @property
    def buffers(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Keys and values of all layers: what a step function is given."""
        return tuple(self.keys), tuple(self.values)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the buffers are: what a captured step is bound to."""
        return tuple(t.data_ptr() for t in (*self.keys, *self.values))

    @property
    def bytes(self) -> int:
        """Memory of the buffers, 0 before the first step."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def __len__(self) -> int:
        return self.num_layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Rows before the step; part of transformers' protocol. Positions and masks are given, so any will do."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the first new row; part of transformers' protocol, unused because positions are given."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(rows visible to the step, first row); part of transformers' protocol."""
        return self._visible, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Capacity; part of transformers' protocol."""
        return self.capacity

    @property
    def is_sliding(self) -> list[bool]:
        """No layer drops rows: a sliding window is a matter of the mask (`Backbone.forward_tree`)."""
        return [False] * self.num_layers

    @property
    def is_compileable(self) -> bool:
        """False: transformers must not compile on its own what we compile as a whole step."""
        return False
