"""The draft tree: which guesses are verified together in one step.

Source: Medusa, arXiv:2401.10774, section 2.1.2 (tree attention). A node is a draft token; a path is the list of ranks
that leads to it: (0, 2) is the third choice of head 1 under the first choice of head 0. Beside the heads' part a tree
may carry one n-gram branch: a chain of tokens copied from the context, hanging from the root.
Shapes: N nodes, the root included.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gorgon.errors import ShapeError

Path = tuple[int, ...]


@dataclass(frozen=True)
class DraftTree:
    """A prefix-closed set of rank paths and the length of the n-gram branch.

    Node order: root, the heads' paths in lexicographic order (so that a chain of first choices lies in consecutive
    rows and needs no move when it is accepted), then the n-gram chain. A parent always precedes its children.
    """

    paths: tuple[Path, ...] = ()
    ngram: int = 0

    @staticmethod
    def of(paths: Iterable[Sequence[int]], *, ngram: int = 0) -> DraftTree:
        """A tree from paths in any order.

        Raises: ShapeError for an empty path, a negative rank, a path given twice, a path whose parent is missing, or a
            negative n-gram length.
        """
        listed = [tuple(int(rank) for rank in path) for path in paths]
        chosen = set(listed)
        if len(chosen) != len(listed):
            raise ShapeError("a path stands twice in the tree", field="paths", hint="remove the repetition")
        for path in listed:
            if not path:
                raise ShapeError("the root is always there and is not listed", field="paths", value=path)
            if min(path) < 0:
                raise ShapeError("ranks start at 0", field="paths", value=path)
            if path[:-1] and path[:-1] not in chosen:
                raise ShapeError(
                    "the tree is not prefix-closed: the parent of a path is missing", field="paths",
                    value=path, hint=f"add {path[:-1]}",
                )  # fmt: skip
        if ngram < 0:
            raise ShapeError("the n-gram branch cannot have a negative length", field="ngram", value=ngram)
        return DraftTree(tuple(sorted(chosen)), ngram)

    @staticmethod
    def chain(length: int) -> DraftTree:
        """The chain of first choices of the first `length` heads: what vLLM and TGI verified."""
        return DraftTree.of((0,) * (depth + 1) for depth in range(length))

    def without_ngram(self) -> DraftTree:
        """The heads' part alone, for steps in which the context offers no continuation."""
        return DraftTree(self.paths)

    @property
    def nodes(self) -> int:
        """N: nodes including the root; 1 is plain decoding."""
        return 1 + len(self.paths) + self.ngram

    @property
    def heads(self) -> int:
        """How many heads the tree reads: its depth without the n-gram branch."""
        return max((len(path) for path in self.paths), default=0)

    @property
    def width(self) -> int:
        """How many choices of a head the tree reads at most."""
        return max((path[-1] for path in self.paths), default=-1) + 1

    @cached_property
    def parents(self) -> list[int]:
        """Index of each node's parent; -1 for the root."""
        index = {path: i + 1 for i, path in enumerate(self.paths)}
        index[()] = 0
        first = 1 + len(self.paths)
        return [-1, *(index[p[:-1]] for p in self.paths), *(i - 1 if i > first else 0 for i in self._chain)]

    @property
    def _chain(self) -> range:
        return range(1 + len(self.paths), self.nodes)

    @cached_property
    def depths(self) -> list[int]:
        """Distance from the root: how many places after the root's position a node stands."""
        return [0, *(len(p) for p in self.paths), *range(1, self.ngram + 1)]

    @cached_property
    def ancestors_NN(self) -> Tensor:
        """Boolean [N, N]: row i is true at node i itself and at everything on its way to the root."""
        seen_NN = torch.zeros(self.nodes, self.nodes, dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen_NN[node] = seen_NN[parent]
            seen_NN[node, node] = True
        return seen_NN

    @cached_property
    def choices(self) -> Tensor:
        """Int64 [len(paths)]: where in the heads' flattened [heads, width] table of choices each path's token is."""
        return torch.tensor([(len(p) - 1) * self.width + p[-1] for p in self.paths], dtype=torch.long)
