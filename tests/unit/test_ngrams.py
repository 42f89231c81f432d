"""The n-gram index against a literal search."""

from hypothesis import given
from hypothesis import strategies as st

from gorgon.core.acceptance import LONGEST_MATCH, OFFERS
from gorgon.decode.ngrams import NgramIndex


def literal(context, suffix, size):
    """Places after the last `size` tokens of `suffix`, latest first."""
    ends = range(len(context) - 1, size - 1, -1)
    return [end for end in ends if len(suffix) >= size and context[end - size : end] == suffix[-size:]]


@given(st.lists(st.lists(st.integers(0, 4), max_size=6), max_size=8), st.integers(1, 6))
def test_the_latest_match_of_the_longest_suffix_is_continued(pieces, length):
    index, context = NgramIndex(), []
    for piece in pieces:
        index.extend(piece)
        context += piece
        found = [places for size in range(LONGEST_MATCH, 0, -1) if (places := literal(context, context, size))]
        assert index.propose(length) == (context[found[0][0] : found[0][0] + length] if found else [])
        assert list(index.tokens) == context and index.present == set(context)


@given(st.lists(st.integers(0, 4), max_size=30), st.lists(st.integers(0, 4), max_size=3))
def test_all_that_followed_a_suffix_is_offered(context, drafted):
    index = NgramIndex(context)
    suffix = [*context, *drafted][-LONGEST_MATCH:]
    longest, expected = 0, {}
    for size in range(LONGEST_MATCH, 0, -1):
        following = list(dict.fromkeys(context[place] for place in literal(context, suffix, size)))[:OFFERS]
        longest = longest or (size if following else 0)
        for place, token in enumerate(following):
            expected.setdefault(token, (size, place))
    assert index.offers(tuple(suffix)) == (longest, expected)
    assert list(index.tokens) == context, "drafted tokens extend the suffix and not the context"


def test_nothing_is_proposed_for_a_new_token():
    assert NgramIndex([1, 2, 3]).propose(4) == []
