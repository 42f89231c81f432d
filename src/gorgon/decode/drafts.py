"""Where drafts come from: the heads' first choices, and continuations copied from the context.

Shapes: K heads, R choices per head, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gorgon.core.heads import MedusaHeads, PackedHeads
from gorgon.core.tree import DraftTree

LONGEST_SUFFIX = 4
"""Suffixes of this many tokens down to one are looked up; longer ones hardly ever decide (docs/lab-notes.md)."""


class HeadDrafts:
    """The first choices of the heads that a tree reads, from all tokens or from a draft vocabulary."""

    def __init__(self, heads: MedusaHeads, tree: DraftTree, vocabulary_U: Tensor | None = None) -> None:
        self._packed, self._width = PackedHeads(heads, tree.heads, vocabulary_U), tree.width
        self._vocabulary_U = vocabulary_U

    def __call__(self, hidden_1H: Tensor) -> Tensor:
        """Int64 [K * R]: for each head its R most likely tokens, best first, heads one after another."""
        choices_KR: Tensor = self._packed(hidden_1H).topk(self._width, dim=-1).indices
        choices = choices_KR.view(-1)
        return choices if self._vocabulary_U is None else self._vocabulary_U[choices]


class NgramDrafts:
    """What followed the longest suffix of the context when it last occurred.

    Text-to-SQL copies table and column names, so the context often says what comes next (prompt lookup decoding).
    Cost: constant time per appended token and per lookup.
    """

    def __init__(self, longest: int = LONGEST_SUFFIX) -> None:
        self._longest = longest
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends decided tokens to the context."""
        for token in tokens:
            end = len(self._tokens)
            for size in range(1, min(self._longest, end) + 1):
                self._after[tuple(self._tokens[end - size : end])] = end
            self._tokens.append(token)

    def propose(self, length: int) -> list[int]:
        """Up to `length` tokens that followed the longest matching suffix; [] when even the last token is new."""
        end = len(self._tokens)
        for size in range(min(self._longest, end), 0, -1):
            start = self._after.get(tuple(self._tokens[end - size : end]))
            if start is not None:
                return self._tokens[start : start + length]
        return []
