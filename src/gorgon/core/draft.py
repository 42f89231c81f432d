"""A draft: the tokens that one step verifies for one sequence, as a tree of nodes.

A `DraftTree` says which ranks of the heads become nodes and is the same in every step; a draft is what a step verifies,
whatever proposed it: a static tree, an n-gram branch, a tree grown node by node.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MOST_NODES = 64
"""Nodes of a draft at most: a node's ancestors are the bits of one 64-bit integer."""
FILLER = -1
"""Token of a node that only fills up the shape: equal to no choice, so it is never accepted."""


@dataclass
class Draft:
    """Nodes in an order in which parents precede children; node 0 is the root, the token decided last.

    Attributes:
        tokens, parents, depths: per node; the root's parent is 0, its own place.
        bits: per node, bit j is set when node j is the node itself or on its way to the root.
    """

    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [0])
    depths: list[int] = field(default_factory=lambda: [0])
    bits: list[int] = field(default_factory=lambda: [1])

    @property
    def nodes(self) -> int:
        """N, the root included."""
        return len(self.tokens)

    def add(self, token: int, parent: int) -> int:
        """Appends a child of node `parent` and returns its index."""
        node = len(self.tokens)
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.bits.append(self.bits[parent] | 1 << node)
        return node

    def flat(self, nodes: int) -> list[int]:
        """Tokens, parents, depths and bits one after another, each filled up to `nodes`, as signed 64-bit integers."""
        more = nodes - len(self.tokens)
        bits = self.bits if len(self.bits) < MOST_NODES else [b - (1 << 64) if b >> 63 else b for b in self.bits]
        if not more:
            return [*self.tokens, *self.parents, *self.depths, *bits]
        zeros = [0] * more
        return [*self.tokens, *[FILLER] * more, *self.parents, *zeros, *self.depths, *zeros, *bits, *[1] * more]
