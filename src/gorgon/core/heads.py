"""Medusa heads: K small networks that read one hidden state and each predict one later token.

Source: Medusa, arXiv:2401.10774, section 2.1. Shapes: N positions, K heads, H hidden size, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from gorgon.errors import ShapeError

Layer = tuple[Tensor, Tensor]
"""Weights and biases of one layer of several heads."""
Products = Callable[[Tensor, Tensor, Tensor], Tensor]


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
        result: Tensor = hidden_NH + silu(self.linear(hidden_NH))
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
                cast(Tensor, cast(nn.Sequential, head)[-1].weight).copy_(lm_head_VH)

    def head(self, k: int, hidden_NH: Tensor) -> Tensor:
        """Logits [N, V] of head k alone: training goes head by head so that [K, N, V] never exists."""
        result: Tensor = cast(nn.Sequential, self[k])(hidden_NH)
        return result

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """Logits [K, N, V] of all heads."""
        return torch.stack([head(hidden_NH) for head in self])


class PackedHeads:
    """The first K' heads with their weights stacked, so that one position costs a batched product per layer.

    Decoding reads one hidden state per step; head by head, the call overhead would exceed the arithmetic.
    Attributes: layers: weights [K', I, O] and biases [K', O] of the residual blocks, then of the projection, whose
        biases are zero; none where no heads are read.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)

    @classmethod
    def of(cls, heads: MedusaHeads, count: int, vocabulary_U: Tensor | None = None) -> PackedHeads:
        """Args:
        count: K', how many heads are read.
        vocabulary_U: int64, the tokens that may be drafted; None is all of them. The projection onto the others is
            left out: in one domain a few hundred tokens make up the answers, and the projection is the heads' cost.
        """
        if not 0 <= count <= len(heads):
            raise ShapeError("the tree is deeper than there are heads", field="heads", value=count,
                             allowed=f"0 to {len(heads)}")  # fmt: skip
        if not count:
            return cls(())
        chosen = [cast(nn.Sequential, heads[k]) for k in range(count)]
        layers = []
        for j in range(heads.num_layers):
            blocks = [cast(ResBlock, head[j]).linear for head in chosen]
            weight_KOI = torch.stack([block.weight.detach() for block in blocks])
            layers.append((weight_KOI.transpose(1, 2), torch.stack([block.bias.detach() for block in blocks])))
        weights = [cast(Tensor, head[-1].weight).detach() for head in chosen]
        if vocabulary_U is not None:
            weights = [weight_VH[vocabulary_U] for weight_VH in weights]
        projection_KHU = torch.stack(weights).transpose(1, 2)
        return cls((*layers, (projection_KHU, projection_KHU.new_zeros(count, projection_KHU.shape[2]))))

    def first(self, count: int) -> PackedHeads:
        """The first `count` of them, with the same weights."""
        return PackedHeads([(weight[:count], bias[:count]) for weight, bias in self.layers] if count else ())


def batched_products(x_KBI: Tensor, weight_KIO: Tensor, bias_KO: Tensor) -> Tensor:
    """[K, B, O], as torch computes them."""
    return torch.baddbmm(bias_KO.unsqueeze(1), x_KBI, weight_KIO)


def read_heads(hidden_BH: Tensor, layers: Sequence[Layer], multiply: Products = batched_products) -> Tensor:
    """Logits [K', B, V], or [K', B, U] over the draft vocabulary, of the heads whose `PackedHeads.layers` these are.

    Args: multiply: products of rows with the layers' weights as they are given.
    Invariant: equal to `MedusaHeads.forward` at those B positions up to rounding; drafts need no more, because every
    token is verified by the backbone.
    """
    *blocks, projection = layers
    x_KBH = hidden_BH.expand(len(projection[1]), *hidden_BH.shape)
    for block in blocks:
        x_KBH = x_KBH + silu(multiply(x_KBH, *block))
    return multiply(x_KBH, *projection)
