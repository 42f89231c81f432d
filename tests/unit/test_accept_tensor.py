"""Acceptance of many trees at once equals a slow, literal reading of the rule, and never waits for the device."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon.core.accept import accept
from gorgon.core.draft import FILLER, MOST_NODES, Draft
from gorgon.core.tree import DraftTree
from gorgon.decode.inputs import Inputs
from tests.unit.test_tree import trees

NOT_CHOSEN = -2


def literally(draft, choices):
    """The deepest node whose every token on the way is the choice at its parent, the first of equals; all are tried."""
    best, best_path = 0, [0]
    for node in range(draft.nodes):
        path = [node]
        while path[0] != 0:
            path.insert(0, draft.parents[path[0]])
        right = all(draft.tokens[b] == choices[a] for a, b in pairwise(path))
        if right and len(path) > len(best_path):
            best, best_path = node, path
    return best, best_path


def drafts_of(tree, tokens):
    draft = Draft(tokens[0])
    for token, parent in zip(tokens[1:], tree.parents[1:], strict=True):
        draft.add(token, parent)
    return draft


def accepted(drafts, choices, *, nodes=None, deeper=0):
    batch = Inputs(torch.device("cpu")).drafts(drafts, nodes)
    tokens_BN, parents_BN, depths_BN, bits_BN = batch.flat_4BN.unbind(0)
    choices_BN = torch.tensor([c + [0] * (batch.nodes - len(c)) for c in choices])
    return accept(tokens_BN, choices_BN, parents_BN, depths_BN, bits_BN, batch.longest + deeper)


@settings(max_examples=150)
@given(st.lists(trees(max_rank=3), min_size=1, max_size=4), st.integers(0, 6), st.integers(0, 2), st.data())
def test_rows_of_different_trees_equal_the_literal_rule(rows, fillers, deeper, data):
    """Two tokens, so that ties and long paths are frequent; fillers behind every tree but the largest."""
    drafts, choices = [], []
    for tree in rows:
        drafts.append(drafts_of(tree, data.draw(st.lists(st.integers(0, 1), min_size=tree.nodes, max_size=tree.nodes))))
        row = st.lists(st.sampled_from([0, 1, NOT_CHOSEN]), min_size=tree.nodes, max_size=tree.nodes)
        choices.append(data.draw(row))
    nodes = max(d.nodes for d in drafts) + fillers
    best_B, path_BP = accepted(drafts, choices, nodes=nodes, deeper=deeper)
    assert path_BP.shape == (len(rows), nodes + deeper), "of a fixed shape no draft is deeper than it has nodes"
    assert best_B.dtype == path_BP.dtype == torch.int64
    for b, draft in enumerate(drafts):
        best, path = literally(draft, choices[b])
        assert int(best_B[b]) == best
        assert path_BP[b].tolist() == path + [0] * (path_BP.shape[1] - len(path))


def test_of_two_right_branches_the_longer_wins_and_the_earlier_in_a_tie():
    tree = DraftTree.of([(0,), (1,), (1, 0), (2,), (2, 0)])
    drafts = [drafts_of(tree, [0, 1, 1, 1, 1, 1]), drafts_of(tree, [0, 1, 1, 2, 1, 1])]
    best_B, path_BP = accepted(drafts, [[1] * 6] * 2)
    assert best_B.tolist() == [3, 5]
    assert path_BP.tolist() == [[0, 2, 3], [0, 4, 5]]


def test_fillers_are_never_accepted_even_where_nothing_else_is():
    draft = Draft(4)
    draft.add(3, 0)
    for choice in (FILLER, NOT_CHOSEN, 0):
        best_B, path_BP = accepted([draft], [[choice] * 8], nodes=8)
        assert best_B.tolist() == [0] and path_BP.tolist() == [[0] * 8]


def test_the_largest_draft_uses_the_sign_bit_of_its_ancestors():
    """Node 63 is the sign bit of a 64-bit integer."""
    chain = Draft(1)
    for node in range(MOST_NODES - 1):
        chain.add(1, node)
    best_B, path_BP = accepted([chain], [[1] * MOST_NODES])
    assert best_B.tolist() == [MOST_NODES - 1] and path_BP.tolist() == [list(range(MOST_NODES))]
    best_B, path_BP = accepted([chain], [[1] * 40 + [0] * 24])
    assert best_B.tolist() == [40] and path_BP[0, :42].tolist() == [*range(41), 0]


def test_it_never_waits_for_the_device():
    """Tensors without storage: reading one value, or a shape that depends on values, would raise."""
    flat_BN = torch.empty(3, 7, dtype=torch.int64, device="meta")
    best_B, path_BP = accept(flat_BN, flat_BN, flat_BN, flat_BN, flat_BN, 4)
    assert best_B.shape == (3,) and path_BP.shape == (3, 4)
