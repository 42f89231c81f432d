"""The dynamic tree: in every step the nodes most likely to be accepted, by heads, context and phrasebook together.

A node's children are the choices of the head for its depth, the token that the context offers behind the node's own
path, and the usual continuations of that path. So a copied name or a common phrase goes on under any node that begins
it, and a token that several propose is one node. Nodes are taken best first by the product of their acceptance rates
(`core.acceptance`), until the tree is full or the best that is left is not worth its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

from gorgon.core.acceptance import UNLISTED, Acceptance, bin_of, state_of
from gorgon.core.draft import Draft
from gorgon.core.phrasebook import ANOTHER, LONGEST, UNKNOWN, Phrasebook
from gorgon.decode.ngrams import LONGEST_SUFFIX, NgramIndex
from gorgon.decode.step import HeadChoices

DEEPEST = 12
"""Depth beyond which no chain is followed: deeper tokens are accepted too rarely to be worth looking up."""
Listed = list[tuple[int, int]]
"""A head's choices: token and bin."""


def listed(choices: HeadChoices | None, heads: int, width: int) -> list[Listed]:
    """The first `width` choices of the first `heads` heads."""
    if choices is None:
        return []
    return [
        [(token, bin_of(p)) for token, p in zip(found[:width], logprobs, strict=False)]
        for found, logprobs in zip(choices.tokens[:heads], choices.logprobs, strict=False)
    ]


def candidates(
    by_depth: Sequence[Listed], depth: int, suffix: tuple[int, ...], context: NgramIndex, phrasebook: Phrasebook
) -> list[tuple[int, int, int, int]]:
    """(token, bin, state, level) of everything that is proposed behind a node at this depth whose path ends so."""
    place, matched = context.find(suffix)
    offered = context.tokens[place] if matched else -1
    same, other = state_of(matched, True), state_of(matched, False)
    usual = phrasebook.usual(suffix)
    usual, absent = (usual, ANOTHER) if usual is not None else ({}, UNKNOWN)
    found = []
    seen = set()
    if depth < len(by_depth):
        for token, bin_ in by_depth[depth]:
            found.append((token, bin_, same if token == offered else other, usual.get(token, absent)))
            seen.add(token)
    if offered >= 0 and offered not in seen:
        found.append((offered, UNLISTED, same, usual.get(offered, absent)))
        seen.add(offered)
    for token, level in usual.items():
        if token not in seen:
            found.append((token, UNLISTED, other, level))
    return found


class DynamicDrafter:
    """Grows a tree of at most `nodes` nodes, none of which is accepted less often than `threshold`."""

    copies = True

    def __init__(
        self, acceptance: Acceptance, phrasebook: Phrasebook, *, nodes: int, threshold: float, width: int
    ) -> None:
        """Args:
        acceptance: what the drafts' acceptance depends on; it says how many heads are read.
        threshold: least product of rates along a node's path, in (0, 1).
        width: choices of each head that are looked at.
        """
        self.acceptance, self.phrasebook = acceptance, phrasebook
        self.nodes, self.threshold, self.width = nodes, threshold, width
        self.heads = acceptance.heads
        self._rates = acceptance.rates

    def draft(self, root: int, choices: HeadChoices | None, context: NgramIndex | None) -> Draft:
        """The best nodes behind `root`."""
        assert context is not None
        draft = Draft([root])
        if self.nodes == 1:
            return draft
        by_depth = listed(choices, self.heads, self.width)
        # Heap entries: minus the path's rate, the parent, the token, the tokens before it.
        heap: list[tuple[float, int, int, tuple[int, ...]]] = []
        self._grow(heap, by_depth, 0, 0, 1.0, context.tail(), context)
        while heap and draft.nodes < self.nodes:
            rate, parent, token, suffix = heappop(heap)
            node = draft.add(token, parent)
            depth = draft.depths[node]
            if depth < DEEPEST and draft.nodes < self.nodes:
                self._grow(heap, by_depth, node, depth, -rate, (*suffix[1 - context.longest :], token), context)
        return draft

    def _grow(
        self,
        heap: list[tuple[float, int, int, tuple[int, ...]]],
        by_depth: Sequence[Listed],
        node: int,
        depth: int,
        rate: float,
        suffix: tuple[int, ...],
        context: NgramIndex,
    ) -> None:
        """Puts a node's children that are worth their time on the heap."""
        rates, least = self._rates[min(depth, self.heads)], self.threshold
        for token, bin_, state, level in candidates(by_depth, depth, suffix, context, self.phrasebook):
            mine = rate * rates[bin_][state][level]
            if mine >= least:
                heappush(heap, (-mine, node, token, suffix))


assert LONGEST <= LONGEST_SUFFIX, "a node's path is remembered as far as the context looks back"
