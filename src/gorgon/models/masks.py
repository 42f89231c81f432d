"""What each node of a draft tree, or each token of a prompt, may look at: as spans for our kernel, or as a mask.

Source: tree attention, Medusa, arXiv:2401.10774, section 2.1.2. A node sees the committed context and its own path.
Shapes: B sequences, N nodes, Q nodes of all sequences that are no fillers, S cache rows that the step reads. Rows
[0, length) of a sequence are its context; row length + i is node i of the step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gorgon.core.accept import ancestors
from gorgon.core.draft import MOST_NODES
from gorgon.core.packing import pack


def tree_spans(bits_BN: Tensor, positions_BN: Tensor, lengths_B: Tensor, window: int | None) -> Tensor:
    """Spans [B, 1, N, 3] of a tree's nodes, int64: the first and the end of the context's rows, bits of the nodes.

    Args:
        bits_BN: ancestors as `core.accept.ancestors` reads them.
        window: how many positions back a node sees, itself included; None is all of them.
    """
    first_BN, ends_BN = torch.zeros_like(bits_BN), lengths_B[:, None].expand_as(bits_BN)
    if window is not None:
        first_BN = torch.minimum((positions_BN - window + 1).clamp(min=0), ends_BN)
        if window < MOST_NODES:
            near_BNN = positions_BN[:, None, :] > positions_BN[:, :, None] - window
            places_N = torch.arange(bits_BN.shape[1], device=bits_BN.device)
            bits_BN = ((ancestors(bits_BN) & near_BNN).long() << places_N).sum(-1)
    return torch.stack((first_BN, ends_BN, bits_BN), dim=-1)[:, None]


def packed_spans(spans_B1N3: Tensor, rows_Q: Tensor, visible: int) -> Tensor:
    """Spans [1, 1, Q, 3] of the nodes that are there, which count the rows of all sequences through, `visible` of each.

    Args: rows_Q: int64, the nodes' places in [B * N].
    """
    first_BN, ends_BN, bits_BN = spans_B1N3[:, 0].unbind(-1)
    begins_B1 = visible * torch.arange(len(first_BN), device=first_BN.device)[:, None]
    spans_BN3 = torch.stack((first_BN + begins_B1, ends_BN + begins_B1, bits_BN), dim=-1)
    return pack(spans_BN3, rows_Q)[None, None]


def prompt_spans(positions_1T: Tensor, window: int | None) -> Tensor:
    """The same for a part of a prompt: every token sees what stands before it, and itself."""
    first_1T = torch.zeros_like(positions_1T) if window is None else (positions_1T - window + 1).clamp(min=0)
    return torch.stack((first_1T, positions_1T + 1, torch.zeros_like(positions_1T)), dim=-1)[:, None]


def tree_visibility(
    ancestors_BNN: Tensor, positions_BN: Tensor, lengths_B: Tensor, visible: int
) -> tuple[Tensor, Tensor]:
    """Which rows a tree's nodes see, and each row's position.

    Returns: visible_BNS bool; positions_BS int64 (of rows beyond the step: of no meaning).
    """
    batch, nodes = positions_BN.shape
    columns_S = torch.arange(visible, device=lengths_B.device)
    node_BS = columns_S[None, :] - lengths_B[:, None]  # negative: context
    inside_BS = (node_BS >= 0) & (node_BS < nodes)
    index_BS = node_BS.clamp(0, nodes - 1)
    own_BNS = ancestors_BNN.gather(2, index_BS[:, None, :].expand(batch, nodes, visible))
    visible_BNS = (node_BS < 0)[:, None, :] | (inside_BS[:, None, :] & own_BNS)
    positions_BS = torch.where(inside_BS, positions_BN.gather(1, index_BS), columns_S[None, :])
    return visible_BNS, positions_BS


def prompt_visibility(positions_1T: Tensor, visible: int) -> tuple[Tensor, Tensor]:
    """The same for a part of a prompt: every token sees what stands before it, and itself."""
    columns_1S = torch.arange(visible, device=positions_1T.device)[None]
    return columns_1S[:, None, :] <= positions_1T[:, :, None], columns_1S


def within(visible_BNS: Tensor, queries_BN: Tensor, keys_BS: Tensor, window: int | None) -> Tensor:
    """Of the visible rows [B, N, S] those of at most `window` positions back; None is all of them."""
    if window is None:
        return visible_BNS
    return visible_BNS & (keys_BS[:, None, :] > queries_BN[:, :, None] - window)


def additive(visible_BNS: Tensor, dtype: torch.dtype) -> Tensor:
    """Mask [B, 1, N, S] to be added to attention scores: 0 where visible, else the lowest finite number."""
    zero = torch.zeros((), dtype=dtype, device=visible_BNS.device)
    return torch.where(visible_BNS, zero, torch.finfo(dtype).min)[:, None]
