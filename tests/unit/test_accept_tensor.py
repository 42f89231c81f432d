"""Greedy acceptance as tensor operations equals the loop, row by row, and never waits for the device."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon.core.accept import accept_greedy, accept_greedy_tensor
from gorgon.core.tree import DraftTree
from tests.unit.test_tree import trees


def check_row(tree, tokens, choices, node, depth, path):
    expected = accept_greedy(tokens, choices, tree.parents)
    assert int(node) == expected.nodes[-1] and int(depth) == len(expected.nodes) - 1
    padding = [expected.nodes[-1]] * (len(path) - len(expected.nodes))
    assert path.tolist() == expected.nodes + padding


def rows_of(data, count, nodes):
    flat = data.draw(st.lists(st.integers(0, 1), min_size=2 * count * nodes, max_size=2 * count * nodes))
    return torch.tensor(flat).view(2, count, nodes)


@settings(max_examples=120)
@given(trees(max_rank=3), st.integers(1, 4), st.integers(0, 2), st.data())
def test_one_tree_for_all_rows(tree, rows, deeper, data):
    tokens_BN, choices_BN = rows_of(data, rows, tree.nodes)
    depth = max(tree.depths) + deeper
    node_B, depth_B, path_BD = accept_greedy_tensor(
        tokens_BN, choices_BN, torch.tensor(tree.parents), tree.ancestors_NN, depth
    )
    assert path_BD.shape == (rows, depth + 1)
    assert {x.dtype for x in (node_B, depth_B, path_BD)} == {torch.int64}
    for b in range(rows):
        check_row(tree, tokens_BN[b].tolist(), choices_BN[b].tolist(), node_B[b], depth_B[b], path_BD[b])


@settings(max_examples=80)
@given(st.lists(trees(max_rank=3), min_size=1, max_size=4), st.data())
def test_a_tree_for_each_row_padded_to_the_largest(rows, data):
    nodes, depth = max(t.nodes for t in rows), max(max(t.depths) for t in rows)
    tokens_BN, choices_BN = rows_of(data, len(rows), nodes)
    parents_BN = torch.zeros(len(rows), nodes, dtype=torch.int64)
    ancestors_BNN = torch.zeros(len(rows), nodes, nodes, dtype=torch.bool)
    for b, tree in enumerate(rows):
        parents_BN[b, : tree.nodes] = torch.tensor(tree.parents)
        ancestors_BNN[b, : tree.nodes, : tree.nodes] = tree.ancestors_NN
    node_B, depth_B, path_BD = accept_greedy_tensor(tokens_BN, choices_BN, parents_BN, ancestors_BNN, depth)
    for b, tree in enumerate(rows):
        tokens, choices = tokens_BN[b, : tree.nodes].tolist(), choices_BN[b, : tree.nodes].tolist()
        check_row(tree, tokens, choices, node_B[b], depth_B[b], path_BD[b])


def test_of_two_right_branches_the_longer_wins_and_the_earlier_in_a_tie():
    tree = DraftTree.of([(0,), (1,), (1, 0), (2,), (2, 0)])
    tokens_BN = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 1, 1, 2, 1, 1]])
    ones_BN = torch.ones_like(tokens_BN)
    node_B, depth_B, path_BD = accept_greedy_tensor(
        tokens_BN, ones_BN, torch.tensor(tree.parents), tree.ancestors_NN, 2
    )
    assert node_B.tolist() == [3, 5] and depth_B.tolist() == [2, 2]
    assert path_BD.tolist() == [[0, 2, 3], [0, 4, 5]]


def test_it_never_waits_for_the_device():
    """Tensors without storage: reading one value, or a shape that depends on values, would raise."""
    tree = DraftTree.of([(0,), (1,), (0, 0)], ngram=3)
    tokens_BN = torch.empty(3, tree.nodes, dtype=torch.int64, device="meta")
    parents_N = torch.tensor(tree.parents).to("meta")
    results = accept_greedy_tensor(tokens_BN, tokens_BN, parents_N, tree.ancestors_NN.to("meta"), 3)
    assert [tuple(r.shape) for r in results] == [(3,), (3,), (3, 4)]
