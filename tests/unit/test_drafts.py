"""The n-gram branch against a literal search."""

from hypothesis import given
from hypothesis import strategies as st

from gorgon.decode.drafts import LONGEST_SUFFIX, NgramDrafts


def _literal(context, length):
    for size in range(min(LONGEST_SUFFIX, len(context)), 0, -1):
        suffix = context[-size:]
        for start in range(len(context) - size - 1, -1, -1):
            if context[start : start + size] == suffix:
                return context[start + size : start + size + length]
    return []


@given(st.lists(st.lists(st.integers(0, 4), max_size=6), max_size=8), st.integers(1, 6))
def test_the_latest_match_of_the_longest_suffix_is_continued(pieces, length):
    drafts, context = NgramDrafts(), []
    for piece in pieces:
        drafts.extend(piece)
        context += piece
        assert drafts.propose(length) == _literal(context, length)


def test_nothing_is_proposed_for_a_new_token():
    drafts = NgramDrafts()
    drafts.extend([1, 2, 3])
    assert drafts.propose(4) == []
