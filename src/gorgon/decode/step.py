"""One step: verify a draft tree per sequence in one forward, accept, commit, and let the heads read the new state.

Source: Medusa, arXiv:2401.10774, section 2.1.2 (tree attention). The same code does plain decoding: its tree is the
root alone. A step is two pure functions of tensors, the forward and its settling, between which sampling may choose the
tokens; a greedy step is compiled as one. What was decided comes back in one transfer, the only wait for the device.
Shapes: B sequences, N nodes, Q nodes of all sequences that are no fillers, P nodes of the longest path, K heads, R
choices per head, H hidden size, V vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gorgon.core.draft import Draft
from gorgon.core.heads import MedusaHeads, PackedHeads
from gorgon.decode import functions
from gorgon.decode.functions import Reads
from gorgon.decode.inputs import DraftBatch, Inputs
from gorgon.models.backbone import Backbone
from gorgon.models.cache import TreeCache
from gorgon.models.compiler import Binder, BoundFunction, StepFunction, step_function
from gorgon.models.graphs import Captured, Outputs, Stage
from gorgon.models.panels import in_panels

Choose = Callable[[Tensor], Tensor | None]
PROMPT_SIZES = 64
"""Captured prompts are filled up to multiples of this."""


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
        self._prompts = Inputs(backbone.device)
        self._by_cache: WeakKeyDictionary[TreeCache, Functions] = WeakKeyDictionary()

    def functions(self, cache: TreeCache) -> Functions:
        """The step functions on this cache, whose buffers have come to be."""
        found = self._by_cache.get(cache)
        if found is None:
            given = (*cache.buffers, self._reads)
            found = self._by_cache[cache] = Functions(
                *(self._bind(f)(*given) for f in (functions.forward, functions.greedy, functions.prompt))
            )
        return found

    def _bind(self, function: StepFunction) -> Binder:
        """On a GPU the layers may be compiled; what is around them is captured, and otherwise runs as it is."""
        if self.backbone.graphs is None:
            return self.backbone.step_function(function)
        return step_function(function, self.backbone, "eager")

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
        packed = functions.settle(
            self.backbone, cache, batch.flat_4BN, lengths_B, batch.longest, hidden_BNH, choices_BN, self._reads,
            batch.rows_Q,
        )  # fmt: skip
        return self._decided(packed.tolist(), batch.longest)

    @torch.inference_mode()
    def step(
        self, cache: TreeCache, batch: DraftBatch, lengths_B: Tensor, visible: int, choose: Choose | None = None
    ) -> tuple[Tensor, list[Decided]]:
        """A whole step; returns the nodes' hidden states [B, N, H] as well, which hold until the next step.

        Args: choose: makes `choices_BN` of the hidden states; None takes the argmax, and then the step is one piece.
        """
        captured = self._captured(cache, batch, lengths_B, visible, choose is not None)
        if captured is not None:
            hidden_BNH, rows = self._replay(captured, choose)
            return hidden_BNH, self._decided(rows, batch.longest)
        flat_4BN, rows_Q, longest = batch.flat_4BN, batch.rows_Q, batch.longest
        bound = self.functions(cache)
        if choose is None:
            hidden_BNH, packed = bound.greedy(flat_4BN, rows_Q, lengths_B, visible, longest)
            return hidden_BNH, self._decided(packed.tolist(), longest)
        (hidden_BNH,) = bound.forward(flat_4BN, rows_Q, lengths_B, visible)
        return hidden_BNH, self.settle(cache, batch, lengths_B, hidden_BNH, choose(hidden_BNH))

    @torch.inference_mode()
    def prompt(
        self, cache: TreeCache, tokens: Sequence[int], start: int, choose: Choose | None = None
    ) -> tuple[Tensor, Decided]:
        """Runs a part of a prompt, which begins at position `start`.

        Args: choose: as for `step`.
        Returns: its last hidden state [1, 1, H], and the token after it with what the heads say there.
        """
        backbone = self.backbone
        if not cache.keys:  # the buffers come to be; step functions are given them
            first_11 = torch.tensor([list(tokens[:1])], device=backbone.device)
            backbone.forward_prompt(cache, first_11, torch.tensor([start], device=backbone.device), start + 1)
        captured = self._captured_prompt(cache, tokens, start, choose is not None)
        if captured is not None:
            hidden_11H, rows = self._replay(captured, choose)
            return hidden_11H, self._decided(rows, self._end.longest)[0]
        tokens_1T = torch.tensor([list(tokens)], device=backbone.device)
        start_1 = torch.tensor([start], device=backbone.device)
        # A single token has a shape of its own to the compiler, and is not worth compiling for.
        given = tokens_1T, start_1, backbone.visible(start + len(tokens), cache.capacity), self._end.flat_4BN
        with backbone.last_row.wanted():
            if len(tokens) > 1:
                hidden_11H, packed = self.functions(cache).prompt(*given)
            else:
                hidden_11H, packed = functions.prompt(backbone, *given, *cache.buffers, self._reads)
        if choose is None:
            return hidden_11H, self._decided(packed.tolist(), self._end.longest)[0]
        return hidden_11H, self.settle(cache, self._end, start_1, hidden_11H, choose(hidden_11H))[0]

    def _captured(
        self, cache: TreeCache, batch: DraftBatch, lengths_B: Tensor, visible: int, sampled: bool
    ) -> Captured | None:
        """This shape's graph or graphs; None where steps are not captured."""
        graphs = self.backbone.graphs
        if graphs is None or not cache.keys:  # buffers that come to be during a capture would belong to its pool
            return None
        backbone, longest = self.backbone, batch.longest

        def forward(inputs: Sequence[Tensor], _: Sequence[Outputs]) -> Outputs:
            return (functions.verify(backbone, cache, inputs[0], inputs[1], visible),)

        def settle(inputs: Sequence[Tensor], before: Sequence[Outputs]) -> Outputs:
            (hidden_BNH,), choices_BN = before[0], inputs[2] if sampled else None
            decide = backbone.step_function(functions.decide)()
            path_BP, packed = decide(inputs[0], longest, hidden_BNH, choices_BN, self._reads)
            cache.keep(inputs[1], path_BP)
            return (packed,)

        key, tokens_BN = (self, sampled, len(lengths_B), batch.nodes, longest, visible), batch.flat_4BN[0]
        return graphs.of(cache, key, [batch.flat_4BN, lengths_B], *_stages(forward, settle, tokens_BN, sampled))

    def _captured_prompt(self, cache: TreeCache, tokens: Sequence[int], start: int, sampled: bool) -> Captured | None:
        """The same for a part of a prompt, filled up to a size that others have, too: what stands behind its end is
        written over before anything reads it."""
        backbone = self.backbone
        if backbone.graphs is None:
            return None
        size = min(-(-len(tokens) // PROMPT_SIZES) * PROMPT_SIZES, cache.capacity - start)
        visible = backbone.visible(start + size, cache.capacity)

        def forward(inputs: Sequence[Tensor], _: Sequence[Outputs]) -> Outputs:
            tokens_1T, places_2 = inputs[:2]
            hidden_1TH = backbone.forward_prompt(cache, tokens_1T, places_2[:1], visible)
            return (hidden_1TH.index_select(1, places_2[1:]),)

        def settle(inputs: Sequence[Tensor], before: Sequence[Outputs]) -> Outputs:
            (hidden_11H,), choices_11 = before[0], inputs[2] if sampled else None
            return (functions.decide(backbone, self._end.flat_4BN, 1, hidden_11H, choices_11, self._reads)[1],)

        given = [self._prompts.prompt(tokens, size), self._prompts.lengths([start, len(tokens) - 1])]
        key, tokens_11 = (self, sampled, size, visible), self._end.flat_4BN[0]
        return backbone.graphs.of(cache, key, given, *_stages(forward, settle, tokens_11, sampled))

    def _replay(self, captured: Captured, choose: Choose | None) -> tuple[Tensor, Sequence[list[float]]]:
        """Hidden states, and the table on the host."""
        assert self.backbone.graphs is not None
        if choose is None:
            hidden_BNH, packed = captured.run(0)
        else:
            (hidden_BNH,) = captured.run(0)
            choices_BN = choose(hidden_BNH)
            assert choices_BN is not None
            captured.inputs[-1].copy_(choices_BN)
            (packed,) = captured.run(1)
        return hidden_BNH, self.backbone.graphs.recorder.fetch(packed)

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


def _stages(forward: Stage, settle: Stage, tokens_BN: Tensor, sampled: bool) -> tuple[list[Stage], list[Tensor]]:
    """A step as the stages that are captured, and what sampled tokens are like, which are put in between."""

    def whole(inputs: Sequence[Tensor], before: Sequence[Outputs]) -> Outputs:
        hidden = forward(inputs, before)
        return (*hidden, *settle(inputs, [hidden]))

    return ([forward, settle], [tokens_BN]) if sampled else ([whole], [])
