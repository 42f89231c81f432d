"""Trees: validation, order, parents, masks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gorgon.core.tree import DraftTree
from gorgon.errors import ShapeError


@st.composite
def trees(draw, max_nodes=20, max_rank=4, max_depth=5):
    """Random prefix-closed trees, grown node by node."""
    paths = set()
    for _ in range(draw(st.integers(0, max_nodes))):
        parent = draw(st.sampled_from([(), *sorted(p for p in paths if len(p) < max_depth)]))
        paths.add((*parent, draw(st.integers(0, max_rank - 1))))
    return DraftTree.of(paths, ngram=draw(st.integers(0, 5)))


@given(trees())
def test_parents_precede_children_and_depths_agree(tree):
    assert tree.parents[0] == -1 and tree.depths[0] == 0
    for node in range(1, tree.nodes):
        assert 0 <= tree.parents[node] < node
        assert tree.depths[node] == tree.depths[tree.parents[node]] + 1


@given(trees())
def test_mask_equals_walking_up_from_every_node(tree):
    expected = torch.zeros(tree.nodes, tree.nodes, dtype=torch.bool)
    for node in range(tree.nodes):
        at = node
        while at >= 0:
            expected[node, at] = True
            at = tree.parents[at]
    assert torch.equal(tree.ancestors_NN, expected)


@given(trees())
def test_node_tokens_come_from_the_right_head_and_rank(tree):
    table = [[(head, rank) for rank in range(tree.width)] for head in range(tree.heads)]
    flat = [cell for row in table for cell in row]
    for path, choice in zip(tree.paths, tree.choices.tolist(), strict=True):
        assert flat[choice] == (len(path) - 1, path[-1])


@given(trees())
def test_a_tree_survives_a_round_trip_through_its_paths(tree):
    assert DraftTree.of([list(p) for p in reversed(tree.paths)], ngram=tree.ngram) == tree


def test_the_one_node_tree_is_plain_decoding():
    tree = DraftTree()
    assert (tree.nodes, tree.heads, tree.width, tree.parents, tree.depths) == (1, 0, 0, [-1], [0])


def test_a_chain_of_first_choices_lies_in_consecutive_rows():
    tree = DraftTree.of([(0,), (1,), (0, 0), (0, 1), (0, 0, 0)])
    assert [tree.paths[i] for i in range(3)] == [(0,), (0, 0), (0, 0, 0)]


@pytest.mark.parametrize(
    ("paths", "ngram", "word"),
    [
        ([(0, 0)], 0, "prefix-closed"),
        ([(0,), (0,)], 0, "twice"),
        ([()], 0, "root"),
        ([(-1,)], 0, "ranks start at 0"),
        ([(0,)], -1, "negative length"),
    ],
)
def test_bad_trees_are_refused(paths, ngram, word):
    with pytest.raises(ShapeError, match=word):
        DraftTree.of(paths, ngram=ngram)
