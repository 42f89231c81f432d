"""Acceptance: which drafts of a verified tree become output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Accepted:
    """The accepted part of a tree.

    Attributes:
        nodes: indices from the root to the deepest accepted node; the root is always accepted.
        next_token: the backbone's own token after that node, free of charge in every step.
    """

    nodes: list[int]
    next_token: int


def accept_greedy(tokens: Sequence[int], choices: Sequence[int], parents: Sequence[int]) -> Accepted:
    """The deepest node whose every token is the backbone's own greedy choice.

    Source: arXiv:2401.10774, section 2.3.1 with temperature 0: a draft is right exactly when it is the argmax at its
    parent.
    Args: per node, in an order where parents precede children: the drafted token, the backbone's argmax after the
        node, and the parent's index (-1 for the root).
    Invariant: root, accepted tokens and `next_token` are what plain greedy decoding would have written. Two branches
        may hold the same tokens; then the longer one wins, the earlier one in a tie.
    """
    accepted = [False] * len(tokens)
    accepted[0] = True
    depth = [0] * len(tokens)
    best = 0
    for node in range(1, len(tokens)):
        parent = parents[node]
        if accepted[parent] and tokens[node] == choices[parent]:
            accepted[node] = True
            depth[node] = depth[parent] + 1
            if depth[node] > depth[best]:
                best = node
    nodes = [best]
    while parents[nodes[-1]] >= 0:
        nodes.append(parents[nodes[-1]])
    nodes.reverse()
    return Accepted(nodes, choices[best])
