"""The functions of a step: of the backbone and of tensors alone, so that they can be compiled or captured.

A step is the forward over its trees and the settling of what came out; between them sampling may choose the tokens.
Shapes: B sequences, N nodes, Q nodes of all sequences that are no fillers, P nodes of the longest path, K heads, R
choices per head, T tokens of a prompt, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gorgon.core.accept import accept
from gorgon.core.heads import Layer, batched_products, read_heads
from gorgon.core.packing import pack, unpack
from gorgon.models.backbone import Backbone
from gorgon.models.cache import TreeCache
from gorgon.models.panels import panel_products

Buffers = Sequence[Tensor]
Reads = tuple[tuple[Layer, ...], int, Tensor | None]
"""The heads as a step function is given them: `PackedHeads.layers`, in panels or not, R, and the draft vocabulary."""


def verify(
    backbone: Backbone,
    cache: TreeCache,
    flat_4BN: Tensor,
    lengths_B: Tensor,
    visible: int,
    rows_Q: Tensor | None = None,
) -> Tensor:
    """Hidden states [B, N, H] of all nodes, or of those at `rows_Q`; their rows go to the cache."""
    tokens_BN, _, depths_BN, bits_BN = flat_4BN.unbind(0)
    return backbone.forward_tree(cache, tokens_BN, depths_BN, bits_BN, lengths_B, visible, rows_Q)


def settle(
    backbone: Backbone,
    cache: TreeCache,
    flat_4BN: Tensor,
    lengths_B: Tensor,
    longest: int,
    hidden_BNH: Tensor,
    choices_BN: Tensor | None,
    reads: Reads | None,
    rows_Q: Tensor | None = None,
) -> Tensor:
    """Accepts, keeps the accepted rows, and says everything that was decided (`_table`)."""
    accepted = _accept(backbone, flat_4BN, longest, hidden_BNH, choices_BN, rows_Q)
    if longest > 1:
        cache.keep(lengths_B, accepted[1])
    return _table(flat_4BN, hidden_BNH, accepted, reads)


def decide(
    backbone: Backbone,
    flat_4BN: Tensor,
    longest: int,
    hidden_BNH: Tensor,
    choices_BN: Tensor | None,
    reads: Reads | None,
) -> tuple[Tensor, Tensor]:
    """`settle` without the cache: the accepted paths [B, P], whose rows are to be kept, and the table."""
    accepted = _accept(backbone, flat_4BN, longest, hidden_BNH, choices_BN, None)
    return accepted[1], _table(flat_4BN, hidden_BNH, accepted, reads)


Accepted = tuple[Tensor, Tensor, Tensor, Tensor]
"""Deepest accepted nodes [B], paths to them [B, P], the backbone's tokens after each node and their logits [B, N]."""


def _accept(
    backbone: Backbone,
    flat_4BN: Tensor,
    longest: int,
    hidden_BNH: Tensor,
    choices_BN: Tensor | None,
    rows_Q: Tensor | None,
) -> Accepted:
    tokens_BN, parents_BN, depths_BN, bits_BN = flat_4BN.unbind(0)
    if rows_Q is None:
        top_BN, largest_BN = _argmax(backbone, hidden_BNH)
    else:
        top_Q, largest_Q = _argmax(backbone, pack(hidden_BNH, rows_Q))
        top_BN, largest_BN = (unpack(x_Q, rows_Q, *tokens_BN.shape) for x_Q in (top_Q, largest_Q))
    chosen_BN = top_BN if choices_BN is None else choices_BN
    best_B, path_BP = accept(tokens_BN, chosen_BN, parents_BN, depths_BN, bits_BN, longest)
    return best_B, path_BP, chosen_BN, largest_BN


def _argmax(backbone: Backbone, hidden_NH: Tensor) -> tuple[Tensor, Tensor]:
    """The backbone's token after each node, and its logit."""
    logits_NV = backbone.logits(hidden_NH)
    top_N = backbone.likeliest(logits_NV)
    return top_N, logits_NV.gather(-1, top_N.unsqueeze(-1)).squeeze(-1)


def _table(flat_4BN: Tensor, hidden_BNH: Tensor, accepted: Accepted, reads: Reads | None) -> Tensor:
    """Everything a step decides, as one float64 table [B, 3 + 2P + 2KR], so that it comes back in one transfer.

    Float64 holds every token id and every float32 log-probability exactly.
    """
    tokens_BN, _, depths_BN, _ = flat_4BN.unbind(0)
    best_B, path_BP, chosen_BN, largest_BN = accepted
    rows_B = torch.arange(len(best_B), device=best_B.device)
    parts = [
        torch.stack((best_B, depths_BN[rows_B, best_B], chosen_BN[rows_B, best_B]), dim=1),
        tokens_BN.gather(1, path_BP),
        torch.isfinite(largest_BN.gather(1, path_BP)),
    ]
    if reads is not None:
        layers, width, vocabulary_U = reads
        multiply = panel_products if layers[-1][0].dim() == 4 else batched_products
        logits_KBU = read_heads(hidden_BNH[rows_B, best_B], layers, multiply)
        top_KBR = logits_KBU.topk(width, dim=-1)
        found_KBR = top_KBR.indices if vocabulary_U is None else vocabulary_U[top_KBR.indices]
        logprobs_KBR = top_KBR.values.float() - logits_KBU.float().logsumexp(-1, keepdim=True)
        parts += [found_KBR.transpose(0, 1).flatten(1), logprobs_KBR.transpose(0, 1).flatten(1)]
    return torch.cat([part.double() for part in parts], dim=1)


def forward(
    backbone: Backbone,
    flat_4BN: Tensor,
    rows_Q: Tensor | None,
    lengths_B: Tensor,
    visible: int,
    keys: Buffers,
    values: Buffers,
    _reads: Reads | None,
) -> tuple[Tensor]:
    """`verify`, with the cache as its buffers."""
    return (verify(backbone, TreeCache.over(keys, values), flat_4BN, lengths_B, visible, rows_Q),)


def greedy(
    backbone: Backbone,
    flat_4BN: Tensor,
    rows_Q: Tensor | None,
    lengths_B: Tensor,
    visible: int,
    longest: int,
    keys: Buffers,
    values: Buffers,
    reads: Reads | None,
) -> tuple[Tensor, Tensor]:
    """A whole step whose tokens are the argmax: hidden states of all nodes, and the table."""
    cache = TreeCache.over(keys, values)
    hidden_BNH = verify(backbone, cache, flat_4BN, lengths_B, visible, rows_Q)
    return hidden_BNH, settle(backbone, cache, flat_4BN, lengths_B, longest, hidden_BNH, None, reads, rows_Q)


def prompt(
    backbone: Backbone,
    tokens_1T: Tensor,
    start_1: Tensor,
    visible: int,
    root_411: Tensor,
    keys: Buffers,
    values: Buffers,
    reads: Reads | None,
) -> tuple[Tensor, Tensor]:
    """A part of a prompt: its last hidden state [1, 1, H], and the table for a tree that is its end."""
    cache = TreeCache.over(keys, values)
    hidden_1TH = backbone.forward_prompt(cache, tokens_1T, start_1, visible)
    last_11H = hidden_1TH[:, -1:].clone()
    return last_11H, settle(backbone, cache, root_411, start_1, 1, last_11H, None, reads)
