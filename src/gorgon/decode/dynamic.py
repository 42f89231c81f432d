"""The dynamic tree: in every step the nodes most likely to be accepted, by the heads and the context together.

A node's children are the choices of the head for its depth and the token that the context offers behind the node's own
path. So a copied name goes on under any node that begins it, and a token that heads and context both propose is one
node. Nodes are taken best first by the product of their acceptance rates (`core.acceptance`), until the tree is full or
the best that is left is not worth its time.
"""

from __future__ import annotations

from heapq import heappop, heappush

from gorgon.core.acceptance import UNLISTED, Rates, bin_of
from gorgon.core.draft import Draft
from gorgon.decode.ngrams import NgramIndex
from gorgon.decode.step import HeadChoices

DEEPEST = 12
"""Depth beyond which no chain is followed: deeper tokens are accepted too rarely to be worth looking up."""


class DynamicDrafter:
    """Grows a tree of at most `nodes` nodes, none of which is accepted less often than `threshold`."""

    copies = True

    def __init__(self, rates: Rates, *, nodes: int, threshold: float, width: int) -> None:
        """Args:
        rates: acceptance rate by head, bin and state; the last row is for depths beyond the heads.
        threshold: least product of rates along a node's path, in (0, 1).
        width: choices of each head that are looked at.
        """
        self.rates, self.nodes, self.threshold, self.width = rates, nodes, threshold, width
        self.heads = len(rates) - 1

    def draft(self, root: int, choices: HeadChoices | None, context: NgramIndex | None) -> Draft:
        """The best nodes behind `root`."""
        assert context is not None
        draft = Draft([root])
        if self.nodes == 1:
            return draft
        rates_by_depth: list[list[tuple[int, list[float]]]] = []
        if choices is not None:
            for rates, found, logprobs in zip(self.rates, choices.tokens, choices.logprobs, strict=False):
                pairs = zip(found[: self.width], logprobs, strict=False)
                rates_by_depth.append([(t, rates[bin_of(p)]) for t, p in pairs])
        # Heap entries: minus the path's rate, the parent, the token, the tokens before it.
        heap: list[tuple[float, int, int, tuple[int, ...]]] = []
        self._grow(heap, rates_by_depth, 0, 0, 1.0, context.tail(), context)
        while heap and draft.nodes < self.nodes:
            rate, parent, token, suffix = heappop(heap)
            node = draft.add(token, parent)
            depth = draft.depths[node]
            if depth < DEEPEST:
                self._grow(heap, rates_by_depth, node, depth, -rate, (*suffix[1 - context.longest :], token), context)
        return draft

    def _grow(
        self,
        heap: list[tuple[float, int, int, tuple[int, ...]]],
        rates_by_depth: list[list[tuple[int, list[float]]]],
        node: int,
        depth: int,
        rate: float,
        suffix: tuple[int, ...],
        context: NgramIndex,
    ) -> None:
        """Puts a node's children that are worth their time on the heap."""
        place, matched = context.find(suffix)
        offered = context.tokens[place] if matched else -1
        same, other = 2 * matched - 1, 2 * matched
        least = self.threshold
        if depth < len(rates_by_depth):
            for token, rates in rates_by_depth[depth]:
                if token == offered:
                    mine = rate * rates[same]
                    offered = -1
                else:
                    mine = rate * rates[other]
                if mine >= least:
                    heappush(heap, (-mine, node, token, suffix))
        if offered >= 0:
            head = min(depth, self.heads)
            mine = rate * self.rates[head][UNLISTED][same]
            if mine >= least:
                heappush(heap, (-mine, node, offered, suffix))
