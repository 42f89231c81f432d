"""Rank statistics: which tree of a given size accepts the most, counted on text that the model wrote.

At every calibration position each head gives the true later token a rank. A path of ranks is accepted exactly when the
position's rank tuple starts with it, so among all prefix-closed trees of N nodes the one that accepts the most tokens
consists of the N most frequent prefixes: every node adds its own count and a prefix is never rarer than what it
prefixes. No independence between heads is assumed (the Medusa paper's search, section 2.3.3, multiplies marginals).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gorgon.core.tree import DraftTree, Path
from gorgon.errors import ShapeError


@dataclass(frozen=True)
class Position:
    """What could be accepted in a step that starts at one place of a recorded text.

    Attributes:
        ranks: rank of the true token under head 0, 1, ...; as many as tokens follow, K at most.
        copied: how many tokens the n-gram branch would copy correctly, were it as long as the text.
        offered: whether the context offers a continuation at all.
    """

    ranks: Sequence[int]
    copied: int = 0
    offered: bool = False


def count_prefixes(positions: Iterable[Position], *, max_rank: int, ngram: int = 0) -> Counter[Path]:
    """How many tokens each path adds: positions whose ranks start with it and that the n-gram branch does not cover.

    Args:
        max_rank: ranks at or above it never become nodes, so counting stops there.
        ngram: length of the n-gram branch beside which the paths will stand; 0 counts plain prefixes.
    """
    counts: Counter[Path] = Counter()
    for position in positions:
        covered = min(position.copied, ngram)
        path: Path = ()
        for rank in position.ranks:
            if rank >= max_rank:
                break
            path = (*path, int(rank))
            counts[path] += len(path) > covered
    return counts


def best_tree(counts: Counter[Path], nodes: int, *, ngram: int = 0) -> DraftTree:
    """The tree of at most `nodes` nodes, root and n-gram branch included, that accepts the most tokens.

    Without an n-gram branch these are the most frequent prefixes, which is optimal. Beside one, a path may add more
    than its parent does (the branch covers the parent's token), so paths are taken together with their missing
    ancestors, by tokens gained per node: a greedy choice that is the optimal one where counts never grow with depth.
    Raises: ShapeError when the n-gram branch alone exceeds the size.
    """
    room = nodes - 1 - ngram
    if room < 0:
        raise ShapeError("the tree is smaller than its root and n-gram branch", value=nodes, allowed=f">= {ngram + 1}")
    # Only the most promising prefixes can enter; this bound keeps the search quick and is far above any tree's size.
    pool = sorted((p for p in counts if counts[p]), key=lambda path: (-counts[path], len(path), path))[: 16 * nodes]
    chosen: set[Path] = set()
    while len(chosen) < room:
        best: tuple[Path, ...] = ()
        best_key: tuple[float, int, Path] = (0.0, 0, ())
        for path in pool:
            missing = tuple(path[:i] for i in range(1, len(path) + 1) if path[:i] not in chosen)
            if not missing or len(missing) > room - len(chosen):
                continue
            key = (-sum(counts[p] for p in missing) / len(missing), len(path), path)
            if not best or key < best_key:
                best, best_key = missing, key
        if not best:
            break
        chosen.update(best)
    return DraftTree.of(chosen, ngram=ngram)


@dataclass(frozen=True)
class Replay:
    """Steps and tokens of a simulated decoding; steps in which the n-gram branch had something to offer are apart."""

    tokens: int
    steps_with_ngram: int
    steps_without: int

    @property
    def steps(self) -> int:
        """All steps."""
        return self.steps_with_ngram + self.steps_without

    @property
    def tokens_per_step(self) -> float:
        """Tokens emitted per step, the backbone's own included."""
        return self.tokens / self.steps if self.steps else 1.0


def replay(texts: Iterable[Sequence[Position]], tree: DraftTree) -> Replay:
    """Decodes recorded texts again without running the backbone.

    Valid because greedy output does not depend on the tree: the text is known, so what each step accepts follows from
    the ranks at its position and from what the n-gram branch would have copied.
    Args: texts: per text, one Position for each token that can be a step's root.
    """
    paths = set(tree.paths)
    tokens = with_ngram = without = 0
    for text in texts:
        at = 0
        while at < len(text):
            position = text[at]
            path: Path = ()
            for rank in position.ranks:
                if (*path, rank) not in paths:
                    break
                path = (*path, rank)
            offered = position.offered and tree.ngram > 0
            advance = 1 + max(len(path), min(position.copied, tree.ngram))
            advance = min(advance, len(text) - at)  # drafts behind the end of the text do not count
            tokens, at = tokens + advance, at + advance
            with_ngram, without = with_ngram + offered, without + (not offered)
    return Replay(tokens, with_ngram, without)
