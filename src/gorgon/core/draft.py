"""A draft: the tokens that one step verifies for one sequence, as a tree of nodes.

A `DraftTree` says which ranks of the heads become nodes and is the same in every step; a draft is what a step verifies,
whatever proposed it: a static tree, an n-gram branch, a tree grown node by node.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

MOST_NODES = 64
"""Nodes of a draft at most: a node's ancestors are the bits of one 64-bit integer."""
FILLER = -1
"""Token of a node that only fills up the shape: equal to no choice, so it is never accepted."""
TOKENS, PARENTS, DEPTHS, BITS = range(0, 4 * MOST_NODES, MOST_NODES)
"""Where the four rows of a draft's numbers begin."""
EMPTY = array("q", [FILLER] * MOST_NODES + [0] * 2 * MOST_NODES + [1] * MOST_NODES)
"""Fillers alone."""


class Draft:
    """Nodes in an order in which parents precede children; node 0 is the root, the token decided last.

    They are kept as a step and compiled code read them: as one piece of memory, filled up to `MOST_NODES`.
    Attributes:
        numbers: 64-bit integers [4][MOST_NODES]: tokens, parents, depths and bits. The root's parent is 0, its own
            place; bit j of a node's bits is set when node j is the node itself or on its way to the root.
        nodes: N, the root included.
    """

    __slots__ = ("nodes", "numbers")

    def __init__(self, root: int) -> None:
        self.numbers = EMPTY[:]
        self.numbers[TOKENS] = root
        self.nodes = 1

    def add(self, token: int, parent: int) -> int:
        """Appends a child of node `parent` and returns its index."""
        numbers, node = self.numbers, self.nodes
        assert parent < node < MOST_NODES
        depth, bits = numbers[DEPTHS + parent] + 1, numbers[BITS + parent] | 1 << node
        numbers[TOKENS + node], numbers[PARENTS + node] = token, parent
        numbers[DEPTHS + node], numbers[BITS + node] = depth, bits - (bits >> 63 << 64)  # the last bit is the sign
        self.nodes = node + 1
        return node

    def holding(self, tokens: Sequence[int]) -> Draft:
        """A draft of this shape that holds other tokens."""
        assert len(tokens) == self.nodes
        other = Draft.__new__(Draft)
        other.numbers, other.nodes = self.numbers[:], self.nodes
        other.numbers[: self.nodes] = array("q", tokens)
        return other

    @property
    def tokens(self) -> list[int]:
        """By node."""
        return self._row(TOKENS)

    @property
    def parents(self) -> list[int]:
        """By node."""
        return self._row(PARENTS)

    @property
    def depths(self) -> list[int]:
        """By node; the root's is 0."""
        return self._row(DEPTHS)

    def depth(self, node: int) -> int:
        """Of one node, without listing all of them."""
        return self.numbers[DEPTHS + node]

    @property
    def longest(self) -> int:
        """P, nodes of the longest path."""
        return 1 + max(self.numbers[DEPTHS : DEPTHS + self.nodes])

    def path(self, node: int) -> list[int]:
        """The nodes from the root to a node, itself included."""
        bits = self.numbers[BITS + node]
        return [place for place in range(node + 1) if bits >> place & 1]

    def _row(self, start: int) -> list[int]:
        return self.numbers[start : start + self.nodes].tolist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Draft) and self.numbers == other.numbers

    __hash__ = None  # type: ignore[assignment]  # it grows
