"""Acceptance equals plain decoding, whatever the drafts are."""

from hypothesis import given
from hypothesis import strategies as st

from gorgon.core.accept import accept_greedy
from tests.unit.test_tree import trees


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
        accepted = accept_greedy(tokens, choices, tree.parents)
        context += [tokens[n] for n in accepted.nodes[1:]] + [accepted.next_token]
        assert context == plain[: len(context)]
        assert all(tree.parents[b] == a for a, b in zip(accepted.nodes, accepted.nodes[1:], strict=False))


def test_nothing_accepted_still_gives_the_backbones_own_token():
    result = accept_greedy([5, 1, 1], [7, 0, 0], [-1, 0, 1])
    assert (result.nodes, result.next_token) == ([0], 7)


def test_everything_accepted():
    result = accept_greedy([5, 1, 2], [1, 2, 9], [-1, 0, 1])
    assert (result.nodes, result.next_token) == ([0, 1, 2], 9)


def test_a_right_token_under_a_wrong_parent_is_not_accepted():
    result = accept_greedy([5, 8, 2], [1, 2, 9], [-1, 0, 1])
    assert (result.nodes, result.next_token) == ([0], 1)


def test_of_two_right_branches_the_longer_wins():
    result = accept_greedy([5, 1, 1, 2], [1, 2, 2, 9], [-1, 0, 0, 2])
    assert (result.nodes, result.next_token) == ([0, 2, 3], 9)
