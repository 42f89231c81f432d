"""The n-gram index against a literal search."""

from hypothesis import given
from hypothesis import strategies as st

from gorgon.decode.ngrams import LONGEST_SUFFIX, NgramIndex


def literal(context, suffix, length):
    for size in range(min(LONGEST_SUFFIX, len(suffix)), 0, -1):
        for start in range(len(context) - size - 1, -1, -1):
            if context[start : start + size] == suffix[-size:]:
                return context[start + size : start + size + length], size
    return [], 0


@given(st.lists(st.lists(st.integers(0, 4), max_size=6), max_size=8), st.integers(1, 6))
def test_the_latest_match_of_the_longest_suffix_is_continued(pieces, length):
    index, context = NgramIndex(), []
    for piece in pieces:
        index.extend(piece)
        context += piece
        assert index.propose(length) == literal(context, context, length)[0]


@given(st.lists(st.integers(0, 4), max_size=30), st.lists(st.integers(0, 4), min_size=1, max_size=3))
def test_drafted_tokens_extend_the_suffix_and_not_the_context(context, drafted):
    index = NgramIndex(context)
    place, matched = index.find((*index.tail(), *drafted)[-LONGEST_SUFFIX:])
    following, size = literal(context, [*context, *drafted], 1)
    assert matched == size
    assert index.tokens[place : place + 1] == following if matched else True
    assert index.tokens == context


def test_nothing_is_proposed_for_a_new_token():
    assert NgramIndex([1, 2, 3]).propose(4) == []
