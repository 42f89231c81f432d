"""One step: verify a draft tree per sequence in one forward, accept, commit, and let the heads read the new state.

Source: Medusa, arXiv:2401.10774, section 2.1.2 (tree attention). The same code does plain decoding: its tree is the
root alone. A step is two pure functions of tensors, the forward and its settling, between which sampling may choose the
tokens; a greedy step is compiled as one. What was decided comes back in one transfer, the only wait for the device.
Shapes: B sequences, N nodes, P nodes of the longest path, K heads, R choices per head, H hidden size, V vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gorgon.core.accept import accept
from gorgon.core.draft import Draft
from gorgon.core.heads import Layer, MedusaHeads, PackedHeads, batched_products, read_heads
from gorgon.decode.inputs import DraftBatch, Inputs
from gorgon.models.backbone import Backbone
from gorgon.models.cache import TreeCache
from gorgon.models.compiler import BoundFunction
from gorgon.models.graphs import Captured, Outputs
from gorgon.models.panels import in_panels, panel_products

Choose = Callable[[Tensor], Tensor | None]
Buffers = Sequence[Tensor]
Reads = tuple[tuple[Layer, ...], int, Tensor | None]
"""The heads as a step function is given them: `PackedHeads.layers`, in panels or not, R, and the draft vocabulary."""


@dataclass(slots=True)
class HeadChoices:
    """What the heads say at one accepted state: for each head its likeliest tokens, best first.

    Attributes:
        numbers: float64 [2][K][R], as a step returns them: tokens, and log-probabilities over the draft vocabulary.
        heads, width: K and R.
    """

    numbers: array[float]
    heads: int
    width: int

    @staticmethod
    def of(tokens: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]]) -> HeadChoices:
        """Of tokens and log-probabilities [K][R]."""
        width = len(tokens[0]) if tokens else 0
        numbers = array("d", [x for table in (tokens, logprobs) for row in table for x in row])
        assert len(numbers) == 2 * len(tokens) * width
        return HeadChoices(numbers, len(tokens), width)

    def token(self, head: int, rank: int) -> int:
        """A head's choice."""
        return int(self.numbers[head * self.width + rank])

    def of_head(self, head: int) -> tuple[list[int], list[float]]:
        """A head's tokens and their log-probabilities."""
        at, other = head * self.width, (self.heads + head) * self.width
        return [int(x) for x in self.numbers[at : at + self.width]], self.numbers[other : other + self.width].tolist()


@dataclass(slots=True)
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
class Functions:
    """The functions of a step, bound to the buffers of a cache and to the heads."""

    forward: BoundFunction
    greedy: BoundFunction
    prompt: BoundFunction


def packed_heads(backbone: Backbone, heads: MedusaHeads, count: int, vocabulary_U: Tensor | None) -> PackedHeads:
    """The first `count` heads as this backbone's steps read them fastest.

    Raises: ShapeError when there are fewer.
    """
    packed = PackedHeads.of(heads, count, vocabulary_U)
    return in_panels(packed) if backbone.kernels else packed


class Stepper:
    """The functions of a step on one backbone, run as `Backbone.run_steps` says.

    What is compiled takes tensors and numbers only, those of the heads among them, so all engines share it.
    Args:
        heads: the heads that the drafts read, None when there are none to read.
        width: R, how many choices of each head are returned.
        vocabulary_U: int64, the draft vocabulary's tokens; None when the heads draft any.
    """

    def __init__(self, backbone: Backbone, heads: PackedHeads | None, width: int, vocabulary_U: Tensor | None) -> None:
        self.backbone = backbone
        self._reads: Reads | None = None if heads is None else (heads.layers, width, vocabulary_U)
        self._heads = 0 if heads is None else len(heads.layers[-1][1])
        self._end = Inputs(backbone.device).drafts([Draft(0)])  # of a prompt: a tree without drafts
        self._by_cache: WeakKeyDictionary[TreeCache, Functions] = WeakKeyDictionary()

    def functions(self, cache: TreeCache) -> Functions:
        """The step functions on this cache, whose buffers have come to be."""
        found = self._by_cache.get(cache)
        if found is None:
            given = (*cache.buffers, self._reads)
            bind = self.backbone.step_function
            found = self._by_cache[cache] = Functions(
                bind(_forward)(*given), bind(_greedy)(*given), bind(_prompt)(*given)
            )
        return found

    @torch.inference_mode()
    def settle(
        self,
        cache: TreeCache,
        batch: DraftBatch,
        lengths_B: Tensor,
        hidden_BNH: Tensor,
        choices_BN: Tensor | None = None,
    ) -> list[Decided]:
        """Accepts, commits the accepted rows, and reads the heads, after a forward that was run on its own.

        Args: choices_BN: the backbone's sampled token after each node; None takes the argmax.
        """
        packed = _settle(
            self.backbone, cache, batch.flat_4BN, lengths_B, batch.longest, hidden_BNH, choices_BN, self._reads
        )
        return self._decided(packed.tolist(), batch.longest)

    @torch.inference_mode()
    def step(
        self, cache: TreeCache, batch: DraftBatch, lengths_B: Tensor, visible: int, choose: Choose | None = None
    ) -> tuple[Tensor, list[Decided]]:
        """A whole step; returns the nodes' hidden states [B, N, H] as well, which hold until the next step.

        Args: choose: makes `choices_BN` of the hidden states; None takes the argmax, and then the step is one piece.
        """
        captured = self._captured(cache, batch, lengths_B, visible, choose is not None)
        if captured is None:
            flat_4BN, longest = batch.flat_4BN, batch.longest
            functions = self.functions(cache)
            if choose is None:
                hidden_BNH, packed = functions.greedy(flat_4BN, lengths_B, visible, longest)
                return hidden_BNH, self._decided(packed.tolist(), longest)
            (hidden_BNH,) = functions.forward(flat_4BN, lengths_B, visible)
            return hidden_BNH, self.settle(cache, batch, lengths_B, hidden_BNH, choose(hidden_BNH))
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
        return hidden_BNH, self._decided(self.backbone.graphs.recorder.fetch(packed), batch.longest)

    def _captured(
        self, cache: TreeCache, batch: DraftBatch, lengths_B: Tensor, visible: int, sampled: bool
    ) -> Captured | None:
        """This shape's graph or graphs; None where steps are not captured."""
        graphs = self.backbone.graphs
        if graphs is None or not cache.keys:  # buffers that come to be during a capture would belong to its pool
            return None
        backbone, longest = self.backbone, batch.longest

        def forward(inputs: Sequence[Tensor], _: Sequence[Outputs]) -> Outputs:
            return (_verify(backbone, cache, inputs[0], inputs[1], visible),)

        def settle(inputs: Sequence[Tensor], before: Sequence[Outputs]) -> Outputs:
            (hidden_BNH,), choices_BN = before[0], inputs[2] if sampled else None
            return (_settle(backbone, cache, inputs[0], inputs[1], longest, hidden_BNH, choices_BN, self._reads),)

        def whole(inputs: Sequence[Tensor], before: Sequence[Outputs]) -> Outputs:
            hidden = forward(inputs, before)
            return (*hidden, *settle(inputs, [hidden]))

        inputs = [batch.flat_4BN, lengths_B]
        inputs += [torch.zeros_like(batch.flat_4BN[0])] if sampled else []
        key = (self, sampled, len(lengths_B), batch.nodes, longest, visible)
        return graphs.of(cache, key, inputs, (forward, settle) if sampled else (whole,))

    @torch.inference_mode()
    def prompt(
        self, cache: TreeCache, tokens: Sequence[int], start: int, choose: Choose | None = None
    ) -> tuple[Tensor, Decided]:
        """Runs a part of a prompt, which begins at position `start`.

        Args: choose: as for `step`.
        Returns: its last hidden state [1, 1, H], and the token after it with what the heads say there.
        """
        tokens_1T = torch.tensor([list(tokens)], device=self.backbone.device)
        start_1 = torch.tensor([start], device=self.backbone.device)
        visible = self.backbone.visible(start + len(tokens), cache.capacity)
        if not cache.keys:  # the buffers come to be; step functions are given them
            self.backbone.forward_prompt(cache, tokens_1T[:, :1], start_1, start + 1)
        # A single token has a shape of its own to the compiler, and is not worth compiling for.
        given = tokens_1T, start_1, visible, self._end.flat_4BN
        with self.backbone.last_row.wanted():
            if len(tokens) > 1:
                hidden_11H, packed = self.functions(cache).prompt(*given)
            else:
                hidden_11H, packed = _prompt(self.backbone, *given, *cache.buffers, self._reads)
        if choose is None:
            return hidden_11H, self._decided(packed.tolist(), self._end.longest)[0]
        return hidden_11H, self.settle(cache, self._end, start_1, hidden_11H, choose(hidden_11H))[0]

    def _decided(self, rows: Sequence[list[float]], longest: int) -> list[Decided]:
        return [self._of_row(row, longest) for row in rows]

    def _of_row(self, row: list[float], longest: int) -> Decided:
        node, depth = int(row[0]), int(row[1])
        finite = 0.0 not in row[3 + longest : 4 + longest + depth]
        tokens = [*map(int, row[4 : 4 + depth]), int(row[2])]
        if self._reads is None:
            return Decided(tokens, node, None, finite)
        return Decided(
            tokens, node, HeadChoices(array("d", row[3 + 2 * longest :]), self._heads, self._reads[1]), finite
        )


def _verify(backbone: Backbone, cache: TreeCache, flat_4BN: Tensor, lengths_B: Tensor, visible: int) -> Tensor:
    tokens_BN, _, depths_BN, bits_BN = flat_4BN.unbind(0)
    return backbone.forward_tree(cache, tokens_BN, depths_BN, bits_BN, lengths_B, visible)


def _forward(
    backbone: Backbone,
    flat_4BN: Tensor,
    lengths_B: Tensor,
    visible: int,
    keys: Buffers,
    values: Buffers,
    _reads: Reads | None,
) -> tuple[Tensor]:
    """Hidden states [B, N, H] of all nodes; their rows are in the cache's buffers."""
    return (_verify(backbone, TreeCache.over(keys, values), flat_4BN, lengths_B, visible),)


def _settle(
    backbone: Backbone,
    cache: TreeCache,
    flat_4BN: Tensor,
    lengths_B: Tensor,
    longest: int,
    hidden_BNH: Tensor,
    choices_BN: Tensor | None,
    reads: Reads | None,
) -> Tensor:
    """Everything a step decides, as one float64 table [B, 3 + 2P + 2KR], so that it comes back in one transfer.

    Float64 holds every token id and every float32 log-probability exactly.
    """
    tokens_BN, parents_BN, depths_BN, bits_BN = flat_4BN.unbind(0)
    logits_BNV = backbone.logits(hidden_BNH)
    top_BN = backbone.likeliest(logits_BNV)
    chosen_BN = top_BN if choices_BN is None else choices_BN
    best_B, path_BP = accept(tokens_BN, chosen_BN, parents_BN, depths_BN, bits_BN, longest)
    if longest > 1:
        cache.keep(lengths_B, path_BP)
    rows_B = torch.arange(len(best_B), device=best_B.device)
    largest_BN = logits_BNV.gather(-1, top_BN.unsqueeze(-1)).squeeze(-1)
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


def _greedy(
    backbone: Backbone,
    flat_4BN: Tensor,
    lengths_B: Tensor,
    visible: int,
    longest: int,
    keys: Buffers,
    values: Buffers,
    reads: Reads | None,
) -> tuple[Tensor, Tensor]:
    """A whole step whose tokens are the argmax: hidden states of all nodes, and the table of `_settle`."""
    cache = TreeCache.over(keys, values)
    hidden_BNH = _verify(backbone, cache, flat_4BN, lengths_B, visible)
    return hidden_BNH, _settle(backbone, cache, flat_4BN, lengths_B, longest, hidden_BNH, None, reads)


def _prompt(
    backbone: Backbone,
    tokens_1T: Tensor,
    start_1: Tensor,
    visible: int,
    root_411: Tensor,
    keys: Buffers,
    values: Buffers,
    reads: Reads | None,
) -> tuple[Tensor, Tensor]:
    """A part of a prompt: its last hidden state [1, 1, H], and the table of `_settle` for a tree that is its end."""
    cache = TreeCache.over(keys, values)
    hidden_1TH = backbone.forward_prompt(cache, tokens_1T, start_1, visible)
    last_11H = hidden_1TH[:, -1:].clone()
    return last_11H, _settle(backbone, cache, root_411, start_1, 1, last_11H, None, reads)
