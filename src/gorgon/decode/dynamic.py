"""The dynamic tree: in every step the nodes most likely to be accepted, by heads, context and phrasebook together.

A node's children are the choices of the head for its depth, the tokens that the context offers behind the node's own
path, and the usual continuations of that path. So a copied name or a common phrase goes on under any node that begins
it, and a token that several propose is one node. Nodes are taken best first by the product of their acceptance rates
(`core.acceptance`), until the tree is full or the best that is left is not worth its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from math import exp
from typing import NamedTuple

from gorgon.core.acceptance import LONGEST_MATCH, UNLISTED, Acceptance, Clues, bin_of, evidence_of, standing_of
from gorgon.core.draft import MOST_NODES, Draft
from gorgon.core.phrasebook import LONGEST, Phrasebook
from gorgon.decode.growth import DEEPEST, Growth, growth_works
from gorgon.decode.ngrams import NgramIndex
from gorgon.decode.step import HeadChoices
from gorgon.errors import ShapeError


class Listed(NamedTuple):
    """A head's choices.

    Attributes:
        known: token -> bin and standing.
        otherwise: those of any other token.
    """

    known: dict[int, tuple[int, int]]
    otherwise: tuple[int, int]


NOTHING = Listed({}, (UNLISTED, standing_of(UNLISTED)))
NO_CHOICES = HeadChoices.of([], [])


def listed(choices: HeadChoices | None, heads: int, width: int) -> list[Listed]:
    """The first `width` choices of the first `heads` heads."""
    given = choices or NO_CHOICES
    rows = [given.of_head(head) for head in range(min(heads, given.heads))]
    return [_listed(tokens[:width], list(map(bin_of, logprobs))) for tokens, logprobs in rows]


def _listed(tokens: Sequence[int], bins: Sequence[int]) -> Listed:
    known = {token: (bins[i], standing_of(bins[0], i)) for i, token in enumerate(tokens)}
    return Listed(known, (UNLISTED, standing_of(bins[0])))


def candidates(
    by_depth: Sequence[Listed], depth: int, suffix: tuple[int, ...], context: NgramIndex, phrasebook: Phrasebook
) -> list[Clues]:
    """Everything that is proposed behind a node at this depth whose path ends so, each token once."""
    head = by_depth[depth] if depth < len(by_depth) else NOTHING
    longest, copies = context.offers(suffix)
    levels, present, frequency = phrasebook.levels(suffix), context.present, phrasebook.frequency
    none = evidence_of(longest)
    return [
        (
            token,
            *head.known.get(token, head.otherwise),
            levels[token],
            evidence_of(longest, *copies[token]) if token in copies else none,
            frequency(token),
            int(token in present),
        )
        for token in dict.fromkeys((*head.known, *copies, *levels.offered))
    ]


class DynamicDrafter:
    """Grows a tree of at most `nodes` nodes, none of which is accepted less often than `threshold`.

    Where there is a C++ compiler the growing is done by compiled code, to the same result.
    """

    copies = True

    def __init__(
        self, acceptance: Acceptance, phrasebook: Phrasebook, *, nodes: int, threshold: float, width: int
    ) -> None:
        """Args:
        acceptance: what the drafts' acceptance depends on; it says how many heads are read.
        nodes: from 1 to `MOST_NODES`.
        threshold: least product of rates along a node's path, in (0, 1).
        width: choices of each head that are looked at.
        Raises: ShapeError for another number of nodes.
        """
        if not 1 <= nodes <= MOST_NODES:
            raise ShapeError("a tree cannot have so many nodes", field="nodes", value=nodes,
                             allowed=f"1 to {MOST_NODES}", hint="run `gorgon tune` again")  # fmt: skip
        self.acceptance, self.phrasebook = acceptance, phrasebook
        self.nodes, self.threshold, self.width = nodes, threshold, width
        self.heads = acceptance.heads
        self._growth = Growth(acceptance, phrasebook, nodes, threshold, width) if growth_works() else None

    def draft(self, root: int, choices: HeadChoices | None, context: NgramIndex | None) -> Draft:
        """The best nodes behind `root`."""
        assert context is not None
        if self._growth is None:
            return self.grow(root, choices, context)
        return self._growth.draft(root, choices or NO_CHOICES, context)

    def grow(self, root: int, choices: HeadChoices | None, context: NgramIndex) -> Draft:
        """The same in Python."""
        draft = Draft(root)
        if self.nodes == 1:
            return draft
        by_depth = listed(choices, self.heads, self.width)
        # Heap entries: minus the path's rate, the parent, the token, the tokens before it.
        heap: list[tuple[float, int, int, tuple[int, ...]]] = []
        self._grow(heap, by_depth, 0, 0, 1.0, context.tail(), context)
        while heap and draft.nodes < self.nodes:
            rate, parent, token, suffix = heappop(heap)
            node = draft.add(token, parent)
            depth = draft.depth(node)
            if depth < DEEPEST and draft.nodes < self.nodes:
                self._grow(heap, by_depth, node, depth, -rate, (*suffix[1 - LONGEST_MATCH :], token), context)
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
        odds, head, least = self.acceptance.odds, min(depth, self.heads), self.threshold
        for clues in candidates(by_depth, depth, suffix, context, self.phrasebook):
            mine = rate / (1 + exp(-odds(head, clues)))
            if mine >= least:
                heappush(heap, (-mine, node, clues[0], suffix))


assert LONGEST <= LONGEST_MATCH, "a node's path is remembered as far as the context looks back"
