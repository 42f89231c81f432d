"""Medusa heads: K small networks that read one hidden state and each predict one later token.

Source: Medusa, arXiv:2401.10774, section 2.1. Shapes: N positions, K heads, H hidden size, V vocabulary, L layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gorgon.errors import ShapeError


class ResBlock(nn.Module):
    """x + SiLU(W x + b), the identity at the start because W and b begin at zero.

    Source: arXiv:2401.10774, section 2.1, first equation; the reference code leaves b at random values, so its heads
    do not start as copies of the backbone's own output layer. Ours do.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """[N, H] to [N, H]."""
        result: Tensor = hidden_NH + F.silu(self.linear(hidden_NH))
        return result


class MedusaHeads(nn.ModuleList):
    """K heads, each L residual blocks and its own vocabulary projection.

    Head k (counted from 0) reads the hidden state at position t and predicts the token at t + k + 2; the backbone's
    `lm_head` predicts t + 1. State-dict keys are the published format: `{k}.{j}.linear.weight|bias`, `{k}.{L}.weight`.
    Every layer is a module of its own (the reference code repeats one module, so deeper heads share weights).
    """

    def __init__(self, heads: int, layers: int, hidden_size: int, vocab_size: int) -> None:
        if min(heads, layers, hidden_size, vocab_size) < 1:
            raise ShapeError(
                "heads, layers and sizes must be at least 1", value=(heads, layers, hidden_size, vocab_size)
            )
        super().__init__(
            nn.Sequential(
                *(ResBlock(hidden_size) for _ in range(layers)), nn.Linear(hidden_size, vocab_size, bias=False)
            )
            for _ in range(heads)
        )
        self.num_layers, self.hidden_size, self.vocab_size = layers, hidden_size, vocab_size

    def start_from(self, lm_head_VH: Tensor) -> None:
        """Copies the backbone's output layer into every head's vocabulary projection.

        Raises: ShapeError unless `lm_head_VH` is [V, H].
        """
        if tuple(lm_head_VH.shape) != (self.vocab_size, self.hidden_size):
            raise ShapeError(
                "the output layer does not fit the heads", field="lm_head",
                value=tuple(lm_head_VH.shape), allowed=str((self.vocab_size, self.hidden_size)),
            )  # fmt: skip
        with torch.no_grad():
            for head in self:
                head[-1].weight.copy_(lm_head_VH)

    def head(self, k: int, hidden_NH: Tensor) -> Tensor:
        """Logits [N, V] of head k alone: training goes head by head so that [K, N, V] never exists."""
        result: Tensor = self[k](hidden_NH)
        return result

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """Logits [K, N, V] of all heads."""
        return torch.stack([head(hidden_NH) for head in self])
