"""The nodes of a batch of drafts without those that only fill it up: what each node costs is paid for these alone.

Shapes: B sequences, N nodes of the largest draft, Q nodes that there are.
"""

from __future__ import annotations

from torch import Tensor


def pack(x_BN: Tensor, rows_Q: Tensor) -> Tensor:
    """[B, N, ...] to [Q, ...]. Args: rows_Q: int64, the nodes' places in [B * N], ascending."""
    return x_BN.flatten(0, 1)[rows_Q]


def unpack(x_Q: Tensor, rows_Q: Tensor, batch: int, nodes: int) -> Tensor:
    """[Q, ...] back to [B, N, ...], with zeros where nothing was."""
    empty = x_Q.new_zeros(batch * nodes, *x_Q.shape[1:])
    return empty.index_copy(0, rows_Q, x_Q).reshape(batch, nodes, *x_Q.shape[1:])
