"""Attention masks of a step: what each node of a draft tree, or each token of a prompt, may look at.

Source: tree attention, Medusa, arXiv:2401.10774, section 2.1.2. A node sees the committed context and its own path.
Shapes: B sequences, N nodes, S cache rows that the step reads. Rows [0, length) of a sequence are its context; row
length + i is node i of the step.
"""

from __future__ import annotations

import torch
from torch import Tensor


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


def additive(visible_BNS: Tensor, dtype: torch.dtype) -> Tensor:
    """Mask [B, 1, N, S] to be added to attention scores: 0 where visible, else the lowest finite number."""
    zero = torch.zeros((), dtype=dtype, device=visible_BNS.device)
    return torch.where(visible_BNS, zero, torch.finfo(dtype).min)[:, None]
