"""One step: verify a draft tree per sequence in one forward, accept, commit, and let the heads read the new state.

Source: Medusa, arXiv:2401.10774, section 2.1.2 (tree attention). The same code does plain decoding: its tree is the
root alone. A step is two pure functions of tensors, `forward` and `settle`, between which sampling may choose the
tokens. Both can be compiled. What a step decided comes back in one transfer, the step's only wait for the device.
Shapes: B sequences, N nodes, P nodes of the longest path, K heads, R choices per head, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gorgon.core.accept import accept, ancestors
from gorgon.core.draft import Draft
from gorgon.core.heads import PackedHeads
from gorgon.models.backbone import Backbone
from gorgon.models.cache import TreeCache
from gorgon.models.graphs import Captured, Outputs

Choose = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class HeadChoices:
    """What the heads say at one accepted state: for each head its likeliest tokens, best first.

    Attributes: tokens, logprobs: [K][R]; the log-probabilities are over the draft vocabulary.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]


@dataclass(frozen=True)
class Decided:
    """What a step decided for one sequence.

    Attributes:
        tokens: newly decided tokens, at least one; the last is the next step's root.
        node: index of the deepest accepted node, 0 when no draft was right.
        heads: what the heads say next; None without heads.
        finite: whether the logits that decided were numbers; if not, the tokens mean nothing.
    """

    tokens: list[int]
    node: int
    heads: HeadChoices | None
    finite: bool = True


@dataclass(frozen=True)
class DraftBatch:
    """The drafts of B sequences as tensors on the device, filled up to the largest."""

    flat_4BN: Tensor
    longest: int

    @property
    def nodes(self) -> int:
        """N."""
        return int(self.flat_4BN.shape[2])

    @staticmethod
    def of(drafts: Sequence[Draft], device: torch.device, nodes: int | None = None) -> DraftBatch:
        """Args: nodes: fill up to this many, and call none deeper, where shapes must not change from step to step."""
        size = max(d.nodes for d in drafts) if nodes is None else nodes
        if len(drafts) == 1:
            flat_4BN = torch.tensor(drafts[0].flat(size)).view(4, 1, size)
        else:
            flat_4BN = (
                torch.tensor([d.flat(size) for d in drafts]).view(len(drafts), 4, size).transpose(0, 1).contiguous()
            )
        longest = size if nodes is not None else max(max(d.depths) for d in drafts) + 1
        return DraftBatch(flat_4BN.to(device, non_blocking=True), longest)


class Stepper:
    """The functions of a step on one backbone, run as `Backbone.run_steps` says.

    Args:
        heads: the heads that the drafts read, None when there are none to read.
        width: R, how many choices of each head are returned.
        vocabulary_U: int64, the draft vocabulary's tokens; None when the heads draft any.
    """

    def __init__(self, backbone: Backbone, heads: PackedHeads | None, width: int, vocabulary_U: Tensor | None) -> None:
        self.backbone, self._heads, self._width, self._vocabulary_U = backbone, heads, width, vocabulary_U
        self._forward, self._settle = backbone.step_function(_forward), backbone.step_function(_settle)
        self._prompt = backbone.step_function(_prompt)

    @property
    def _count(self) -> int:
        return 0 if self._heads is None else self._heads.count

    @torch.inference_mode()
    def forward(self, cache: TreeCache, batch: DraftBatch, lengths_B: Tensor, visible: int) -> Tensor:
        """Hidden states [B, N, H] of all nodes."""
        return self._forward(self.backbone, cache, batch.flat_4BN, lengths_B, visible)

    @torch.inference_mode()
    def settle(
        self,
        cache: TreeCache,
        batch: DraftBatch,
        lengths_B: Tensor,
        hidden_BNH: Tensor,
        choices_BN: Tensor | None = None,
    ) -> list[Decided]:
        """Accepts, commits the accepted rows, and reads the heads.

        Args: choices_BN: the backbone's sampled token after each node; None takes the argmax.
        """
        packed = self._settle(
            self.backbone, self._heads, self._width, self._vocabulary_U,
            cache, batch.flat_4BN, lengths_B, hidden_BNH, choices_BN, batch.longest,
        )  # fmt: skip
        return [self._decided(row, batch.longest) for row in packed.tolist()]

    @torch.inference_mode()
    def step(
        self, cache: TreeCache, batch: DraftBatch, lengths_B: Tensor, visible: int, choose: Choose | None = None
    ) -> tuple[Tensor, list[Decided]]:
        """A whole step; returns the nodes' hidden states [B, N, H] as well, which hold until the next step.

        Args: choose: makes `choices_BN` of the hidden states; None takes the argmax, and then the step is one piece.
        """
        captured = self._captured(cache, batch, lengths_B, visible, choose is not None)
        if captured is None:
            hidden_BNH = self.forward(cache, batch, lengths_B, visible)
            choices_BN = None if choose is None else choose(hidden_BNH)
            return hidden_BNH, self.settle(cache, batch, lengths_B, hidden_BNH, choices_BN)
        assert self.backbone.graphs is not None
        captured.put(batch.flat_4BN, lengths_B)
        if choose is None:
            hidden_BNH, packed = captured.run(0)
        else:
            (hidden_BNH,) = captured.run(0)
            choices_BN = choose(hidden_BNH)
            assert choices_BN is not None
            captured.put(choices_BN, at=2)
            (packed,) = captured.run(1)
        rows = self.backbone.graphs.recorder.fetch(packed)
        return hidden_BNH, [self._decided(row, batch.longest) for row in rows]

    def _captured(
        self, cache: TreeCache, batch: DraftBatch, lengths_B: Tensor, visible: int, sampled: bool
    ) -> Captured | None:
        """This shape's graph or graphs; None where steps are not captured."""
        graphs = self.backbone.graphs
        if graphs is None or not cache.keys:  # buffers that come to be during a capture would belong to its pool
            return None
        backbone, longest = self.backbone, batch.longest

        def forward(inputs: Sequence[Tensor], _: Sequence[Outputs]) -> Outputs:
            return (_forward(backbone, cache, inputs[0], inputs[1], visible),)

        def settle(inputs: Sequence[Tensor], before: Sequence[Outputs]) -> Outputs:
            (hidden_BNH,), choices_BN = before[0], inputs[2] if sampled else None
            return (
                _settle(
                    backbone, self._heads, self._width, self._vocabulary_U,
                    cache, inputs[0], inputs[1], hidden_BNH, choices_BN, longest,
                ),
            )  # fmt: skip

        def whole(inputs: Sequence[Tensor], before: Sequence[Outputs]) -> Outputs:
            hidden = forward(inputs, before)
            return (*hidden, *settle(inputs, [hidden]))

        inputs = [batch.flat_4BN, lengths_B]
        inputs += [torch.zeros_like(batch.flat_4BN[0])] if sampled else []
        key = (self, sampled, len(lengths_B), batch.nodes, longest, visible)
        return graphs.of(cache, key, inputs, (forward, settle) if sampled else (whole,))

    @torch.inference_mode()
    def prompt(self, cache: TreeCache, tokens: Sequence[int], start: int) -> Tensor:
        """Runs a part of a prompt, which begins at position `start`; returns its last hidden state [1, 1, H]."""
        tokens_1T = torch.tensor([list(tokens)], device=self.backbone.device)
        start_1 = torch.tensor([start], device=self.backbone.device)
        if not cache.keys:  # a compiled function must find the buffers there, or it is compiled twice
            _prompt(self.backbone, cache, tokens_1T[:, :1], start_1, start + 1)
        hidden_1TH = self._prompt(self.backbone, cache, tokens_1T, start_1, start + len(tokens))
        return hidden_1TH[0, -1:].clone()[None]  # a view's strides tell of the prompt's length: compiled again for each

    def _decided(self, row: list[float], longest: int) -> Decided:
        node, depth = int(row[0]), int(row[1])
        path = row[3 : 3 + longest]
        finite = 0.0 not in row[3 + longest : 4 + longest + depth]
        tokens = [*map(int, path[1 : depth + 1]), int(row[2])]
        if self._heads is None:
            return Decided(tokens, node, None, finite)
        at, size, width = 3 + 2 * longest, self._count * self._width, self._width
        found, logprobs = list(map(int, row[at : at + size])), row[at + size : at + 2 * size]
        starts = range(0, size, width)
        return Decided(
            tokens, node,
            HeadChoices([found[i : i + width] for i in starts], [logprobs[i : i + width] for i in starts]), finite,
        )  # fmt: skip


def _forward(backbone: Backbone, cache: TreeCache, flat_4BN: Tensor, lengths_B: Tensor, visible: int) -> Tensor:
    tokens_BN, _, depths_BN, bits_BN = flat_4BN.unbind(0)
    return backbone.forward_tree(cache, tokens_BN, depths_BN, bits_BN, lengths_B, visible)


def _prompt(backbone: Backbone, cache: TreeCache, tokens_1T: Tensor, start_1: Tensor, visible: int) -> Tensor:
    return backbone.forward_prompt(cache, tokens_1T, start_1, visible)


def _settle(
    backbone: Backbone,
    heads: PackedHeads | None,
    width: int,
    vocabulary_U: Tensor | None,
    cache: TreeCache,
    flat_4BN: Tensor,
    lengths_B: Tensor,
    hidden_BNH: Tensor,
    choices_BN: Tensor | None,
    longest: int,
) -> Tensor:
    """Everything a step decides, as one float64 table [B, 3 + 2P + 2KR], so that it comes back in one transfer.

    Float64 holds every token id and every float32 log-probability exactly.
    """
    tokens_BN, parents_BN, depths_BN, bits_BN = flat_4BN.unbind(0)
    top_BN = backbone.logits(hidden_BNH).max(dim=-1)  # cheaper than argmax; both take the first of equals
    chosen_BN = top_BN.indices if choices_BN is None else choices_BN
    best_B, path_BP = accept(tokens_BN, chosen_BN, parents_BN, depths_BN, ancestors(bits_BN), longest)
    if longest > 1:
        cache.keep(lengths_B, path_BP)
    rows_B = torch.arange(len(best_B), device=best_B.device)
    parts = [
        torch.stack((best_B, depths_BN[rows_B, best_B], chosen_BN[rows_B, best_B]), dim=1),
        tokens_BN.gather(1, path_BP),
        torch.isfinite(top_BN.values.gather(1, path_BP)),
    ]
    if heads is not None:
        logits_KBU = heads(hidden_BNH[rows_B, best_B])
        top_KBR = logits_KBU.topk(width, dim=-1)
        found_KBR = top_KBR.indices if vocabulary_U is None else vocabulary_U[top_KBR.indices]
        logprobs_KBR = top_KBR.values.float() - logits_KBU.float().logsumexp(-1, keepdim=True)
        parts += [found_KBR.transpose(0, 1).flatten(1), logprobs_KBR.transpose(0, 1).flatten(1)]
    return torch.cat([part.double() for part in parts], dim=1)
