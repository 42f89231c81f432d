"""Rank statistics: which tree of a given size accepts the most, counted on text that the model wrote.

At every calibration position each head gives the true later token a rank. A path of ranks is accepted exactly when the
position's rank tuple starts with it, so among all prefix-closed trees of N nodes the one that accepts the most tokens
consists of the N most frequent prefixes: every node adds its own count and a prefix is never rarer than what it
prefixes. No independence between heads is assumed (the Medusa paper's search, section 2.3.3, multiplies marginals).
Shapes: N positions, K heads, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gorgon.core.tree import DraftTree, Path
from gorgon.errors import ShapeError

BEYOND = 1 << 30
"""Rank of a token that is not there (the text ended) or is not among the counted ranks."""


def token_ranks(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Rank of each label: how many tokens have a higher logit; 0 is the first choice.

    Args: labels_N: int64; a negative label means that the text ended before it, and gets the rank BEYOND.
    Raises: ShapeError when the lengths differ.
    """
    if logits_NV.shape[0] != labels_N.shape[0]:
        raise ShapeError("one label per position is needed", value=(tuple(logits_NV.shape), tuple(labels_N.shape)))
    own_N1 = logits_NV.gather(1, labels_N.clamp(min=0)[:, None])
    ranks_N = (logits_NV > own_N1).sum(dim=1)
    return torch.where(labels_N < 0, BEYOND, ranks_N)


def count_prefixes(ranks: Iterable[Sequence[int]], *, max_rank: int) -> Counter[Path]:
    """How many positions' rank tuples start with each path.

    Args:
        ranks: per position, the rank of the true token under head 0, 1, ...
        max_rank: ranks at or above it never become nodes, so counting stops there.
    """
    counts: Counter[Path] = Counter()
    for position in ranks:
        path: Path = ()
        for rank in position:
            if rank >= max_rank:
                break
            path = (*path, int(rank))
            counts[path] += 1
    return counts


def best_tree(counts: Counter[Path], nodes: int, *, ngram: int = 0) -> DraftTree:
    """The tree of at most `nodes` nodes, root and n-gram branch included, that accepts the most tokens.

    Ties go to the shorter path, then to the smaller ranks, so that the result is prefix-closed and reproducible.
    Raises: ShapeError when the n-gram branch alone exceeds the size.
    """
    room = nodes - 1 - ngram
    if room < 0:
        raise ShapeError("the tree is smaller than its root and n-gram branch", value=nodes, allowed=f">= {ngram + 1}")
    ordered = sorted(counts, key=lambda path: (-counts[path], len(path), path))
    return DraftTree.of(ordered[:room], ngram=ngram)


class Simulation:
    """Replays decoding over recorded texts without running the backbone: tokens per step of any tree, exactly.

    Valid because greedy output does not depend on the tree: the text is known, so what each step would have accepted
    follows from the ranks at its position and from what the n-gram branch would have copied.
    """

    def __init__(self, texts: Sequence[Sequence[tuple[Sequence[int], int]]]) -> None:
        """Args: texts: per text and position (a step's root is the token after it): the rank tuple of the tokens that
        follow the root, and how many of them the n-gram branch, at any length, would copy correctly.
        """
        self._texts = texts

    def tokens_per_step(self, tree: DraftTree) -> float:
        """Tokens emitted per step over all texts; the first token, decided by the prefill, is not counted."""
        paths = set(tree.paths)
        steps = tokens = 0
        for text in self._texts:
            at = 0
            while at < len(text):
                ranks, copied = text[at]
                path: Path = ()
                for rank in ranks:
                    if (*path, rank) not in paths:
                        break
                    path = (*path, rank)
                advance = 1 + max(len(path), min(copied, tree.ngram))
                advance = min(advance, len(text) - at)  # drafts behind the end of the text do not count
                steps, tokens, at = steps + 1, tokens + advance, at + advance
        return tokens / steps if steps else 1.0
