"""Rank statistics against brute force."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon.core.rank_stats import Position, best_tree, count_prefixes, replay
from gorgon.core.tree import DraftTree
from gorgon.errors import ShapeError

positions = st.lists(
    st.builds(Position, st.lists(st.integers(0, 2), min_size=3, max_size=3), st.integers(0, 3), st.just(True)),
    min_size=1,
    max_size=12,
)


def _accepted(tree, position):
    return max(
        [len(p) for p in tree.paths if tuple(position.ranks[: len(p)]) == p] + [min(position.copied, tree.ngram)],
        default=0,
    )


def _all_trees(nodes, ngram):
    """Every prefix-closed tree over two ranks and depth two of at most this size."""
    pool = [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
    for count in range(min(nodes - 1 - ngram, len(pool)) + 1):
        for chosen in itertools.combinations(pool, count):
            if all(len(p) == 1 or p[:-1] in chosen for p in chosen):
                yield DraftTree.of(chosen, ngram=ngram)


@settings(max_examples=60, deadline=None)
@given(positions, st.integers(1, 5))
def test_the_most_frequent_prefixes_are_the_best_tree(rows, nodes):
    rows = [Position(p.ranks[:2], 0, False) for p in rows]
    chosen = best_tree(count_prefixes(rows, max_rank=2), nodes)
    best = max(sum(_accepted(tree, p) for p in rows) for tree in _all_trees(nodes, 0))
    assert sum(_accepted(chosen, p) for p in rows) == best
    assert chosen.nodes <= nodes


@settings(max_examples=60, deadline=None)
@given(positions, st.integers(0, 2), st.integers(4, 6))
def test_counts_beside_a_branch_are_the_tokens_gained(rows, ngram, nodes):
    counts = count_prefixes(rows, max_rank=3, ngram=ngram)
    tree = best_tree(counts, nodes, ngram=ngram)
    alone = sum(min(p.copied, ngram) for p in rows)
    assert sum(_accepted(tree, p) for p in rows) == alone + sum(counts[p] for p in tree.paths)


def test_paths_that_the_branch_covers_are_not_taken():
    rows = [Position([0, 0, 0], 3, True)] * 5 + [Position([1, 2, 2], 0, True)] * 2
    assert best_tree(count_prefixes(rows, max_rank=3, ngram=3), 5, ngram=3).paths == ((1,),)


@given(st.lists(positions, min_size=1, max_size=4), st.integers(0, 3))
def test_a_replay_emits_every_token_once(texts, ngram):
    result = replay(texts, DraftTree.of([(0,), (0, 1), (2,)], ngram=ngram))
    assert result.tokens == sum(map(len, texts))
    assert result.steps <= result.tokens


def test_a_replay_of_plain_decoding_takes_a_step_for_each_token():
    assert replay([[Position([0, 0, 0], 3, True)] * 7], DraftTree()).tokens_per_step == 1.0


def test_a_tree_smaller_than_its_branch_is_refused():
    with pytest.raises(ShapeError, match="smaller"):
        best_tree(count_prefixes([], max_rank=3), 3, ngram=3)
