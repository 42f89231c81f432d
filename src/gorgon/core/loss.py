"""What the heads learn: their labels, the weighted cross-entropy, and how often each head's best guesses hold.

Source: Medusa, arXiv:2401.10774, section 2.2.1.
Shapes: B texts are laid end to end in T tokens; N positions, K heads, H hidden size, V vocabulary, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from gorgon.core.heads import MedusaHeads
from gorgon.errors import ShapeError

IGNORE = -100
"""Label of a position whose token would lie beyond the end of its text; torch's own default `ignore_index`."""
RANKS = 8
"""Accuracies are reported for the best 1 to 8 guesses."""


def head_labels(tokens_T: Tensor, positions_N: Tensor, ends_N: Tensor, heads: int) -> Tensor:
    """The token every head has to predict at every position.

    Source: arXiv:2401.10774, section 2.1: at position t the backbone predicts t + 1 and head k (from 0) t + k + 2.
    Args:
        tokens_T: int, all texts' tokens laid end to end.
        positions_N: int64, index into `tokens_T` of the token at which the hidden state was read.
        ends_N: int64, index one past the last token of that position's own text.
        heads: K, at least 1.
    Returns: labels_KN int64; `IGNORE` where t + k + 2 is beyond the text, so that no label comes from a neighbour.
    Raises: ShapeError when positions and ends differ in shape.
    """
    if positions_N.shape != ends_N.shape or positions_N.dim() != 1:
        raise ShapeError(
            "every position needs the end of its text", value=(tuple(positions_N.shape), tuple(ends_N.shape))
        )
    if tokens_T.numel() == 0:
        return torch.full((heads, len(positions_N)), IGNORE, dtype=torch.int64)
    index_KN = positions_N + torch.arange(2, heads + 2, device=positions_N.device)[:, None]
    inside_KN = index_KN < ends_N
    labels_KN = tokens_T[index_KN.clamp(max=tokens_T.numel() - 1)].to(torch.int64)
    return labels_KN.masked_fill(~inside_KN, IGNORE)


def loss_weights(heads: int, decay: float) -> list[float]:
    """lambda_k = decay ** k, the weight of head k's loss (arXiv:2401.10774, section 2.2.1; the paper uses 0.8)."""
    return [decay**k for k in range(heads)]


def head_loss(logits_NV: Tensor, labels_N: Tensor, count: Tensor | None = None) -> Tensor:
    """Mean cross-entropy, in nats, of one head over its labelled positions; exactly 0 when it has none.

    The mean is taken in float32 whatever the logits' dtype.
    Args: count: int64 scalar, divide by this many positions instead: those of all parts of a batch.
    """
    total = functional.cross_entropy(logits_NV.float(), labels_N, ignore_index=IGNORE, reduction="sum")
    if count is None:
        count = (labels_N != IGNORE).sum()
    return total / count.clamp(min=1)


def backward_heads(
    heads: MedusaHeads,
    hidden_NH: Tensor,
    labels_KN: Tensor,
    decay: float,
    counts_K: Tensor | None = None,
    done: Callable[[int], None] = lambda k: None,
) -> Tensor:
    """Adds the gradient of sum_k decay**k * CE_k to the heads' parameters, one head after the other.

    Source: arXiv:2401.10774, section 2.2.1, equation 1.
    The heads share no parameter, so the gradient of the sum is the union of theirs, and only one head's logits [N, V]
    exist at a time instead of [K, N, V].
    Args:
        hidden_NH: float, no gradient flows into it.
        labels_KN: int64 as `head_labels` makes them.
        counts_K: int64, labelled positions of the whole batch when this is a part of it: the sum over the parts of
            gradients, and of losses, is then the batch's.
        done: called with k when head k's gradient is complete.
    Returns: losses_K float32, unweighted and detached.
    Raises: ShapeError when the labels do not fit heads and positions.
    """
    _check(heads, hidden_NH, labels_KN)
    losses = []
    for k, weight in enumerate(loss_weights(len(heads), decay)):
        loss = head_loss(heads.head(k, hidden_NH), labels_KN[k], None if counts_K is None else counts_K[k])
        (weight * loss).backward()  # type: ignore[no-untyped-call]  # torch leaves this one untyped
        done(k)
        losses.append(loss.detach())
    return torch.stack(losses)


@torch.no_grad()
def head_statistics(heads: MedusaHeads, hidden_NH: Tensor, labels_KN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums from which losses and accuracies over many batches follow exactly.

    Returns: loss_K float64, summed cross-entropy in nats; hits_KR int64, labels among the best 1..R guesses
        (R = `RANKS`); count_K int64, labelled positions.
    Raises: ShapeError when the labels do not fit heads and positions.
    """
    _check(heads, hidden_NH, labels_KN)
    device = hidden_NH.device
    loss_K = torch.zeros(len(heads), dtype=torch.float64, device=device)
    hits_KR = torch.zeros(len(heads), RANKS, dtype=torch.int64, device=device)
    count_K = (labels_KN != IGNORE).sum(1)
    for k in range(len(heads)):
        labels_N = labels_KN[k]
        logits_NV = heads.head(k, hidden_NH).float()
        loss_K[k] = functional.cross_entropy(logits_NV, labels_N, ignore_index=IGNORE, reduction="sum")
        ranks_N = label_ranks(logits_NV, labels_N)
        hits_KR[k] = (ranks_N[:, None] <= torch.arange(RANKS, device=device)).logical_and_(
            (labels_N != IGNORE)[:, None]
        ).sum(0)  # fmt: skip
    return loss_K, hits_KR, count_K


def label_ranks(logits_NV: Tensor, labels_N: Tensor, among_U: Tensor | None = None) -> Tensor:
    """How many tokens each position puts before its label: 0 when the label is the argmax.

    Of equal logits the lower token id comes first, as argmax has it. Rows labelled `IGNORE` get a rank of no meaning.
    Args: among_U: int64, count only these tokens; a label that is not among them gets the rank V, behind them all.
    """
    safe_N1 = labels_N.clamp(min=0)[:, None]
    own_N1 = logits_NV.gather(1, safe_N1)
    lower_NV = torch.arange(logits_NV.shape[1], device=logits_NV.device) < safe_N1
    before_NV = (logits_NV > own_N1) | ((logits_NV == own_N1) & lower_NV)
    if among_U is None:
        return before_NV.sum(1)
    return torch.where(torch.isin(labels_N, among_U), before_NV[:, among_U].sum(1), logits_NV.shape[1])


def _check(heads: MedusaHeads, hidden_NH: Tensor, labels_KN: Tensor) -> None:
    if tuple(labels_KN.shape) != (len(heads), hidden_NH.shape[0]):
        raise ShapeError(
            "labels do not fit heads and positions", field="labels_KN",
            value=tuple(labels_KN.shape), allowed=str((len(heads), hidden_NH.shape[0])),
        )  # fmt: skip
