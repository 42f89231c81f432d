"""Acceptance equals plain decoding, whatever the drafts are."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from gorgon.core.accept import accept
from gorgon.core.draft import Draft
from gorgon.decode.inputs import Inputs
from tests.unit.test_tree import trees


def accepted(tokens, choices, parents):
    """(nodes from the root to the deepest accepted one, the choice after it) of one tree."""
    draft = Draft(tokens[0])
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        draft.add(token, parent)
    batch = Inputs(torch.device("cpu")).drafts([draft])
    tokens_BN, parents_BN, depths_BN, bits_BN = batch.flat_4BN.unbind(0)
    choices_BN = torch.tensor([choices])
    best_B, path_BP = accept(tokens_BN, choices_BN, parents_BN, depths_BN, bits_BN, batch.longest)
    node = int(best_B)
    return path_BP[0, : draft.depths[node] + 1].tolist(), choices[node]


def _backbone(context):
    """A scripted backbone: the next token is a fixed function of the whole context."""
    return (sum((i + 1) * t for i, t in enumerate(context)) + len(context)) % 3


@given(trees(max_rank=3), st.data())
def test_any_drafts_give_the_text_of_plain_decoding(tree, data):
    context = [1]
    plain = [1]
    while len(plain) < 40:
        plain.append(_backbone(plain))
    while len(context) < 30:
        tokens = [context[-1]] + [data.draw(st.integers(0, 2)) for _ in range(tree.nodes - 1)]
        choices = []
        for node in range(tree.nodes):
            path, at = [], node
            while at > 0:
                path.insert(0, tokens[at])
                at = tree.parents[at]
            choices.append(_backbone(context + path))
        nodes, next_token = accepted(tokens, choices, tree.parents)
        context += [tokens[n] for n in nodes[1:]] + [next_token]
        assert context == plain[: len(context)]
        assert all(tree.parents[b] == a for a, b in pairwise(nodes))


def test_nothing_accepted_still_gives_the_backbones_own_token():
    assert accepted([5, 1, 1], [7, 0, 0], [-1, 0, 1]) == ([0], 7)


def test_everything_accepted():
    assert accepted([5, 1, 2], [1, 2, 9], [-1, 0, 1]) == ([0, 1, 2], 9)


def test_a_right_token_under_a_wrong_parent_is_not_accepted():
    assert accepted([5, 8, 2], [1, 2, 9], [-1, 0, 1]) == ([0], 1)


def test_of_two_right_branches_the_longer_wins():
    assert accepted([5, 1, 1, 2], [1, 2, 2, 9], [-1, 0, 0, 2]) == ([0, 2, 3], 9)
