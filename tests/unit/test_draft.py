"""A draft's numbers, as steps and compiled code read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gorgon.core.draft import BITS, DEPTHS, EMPTY, FILLER, MOST_NODES, PARENTS, TOKENS, Draft


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 1, exclude_max=True)), max_size=MOST_NODES - 1))
def test_nodes_are_written_behind_one_another_and_fillers_stay_behind_them(added):
    draft, paths = Draft(7), [[0]]
    for token, place in added:
        parent = int(place * draft.nodes)
        node = draft.add(token, parent)
        paths.append([*paths[parent], node])
    assert draft.nodes == len(paths) and draft.tokens == [7, *(token for token, _ in added)]
    assert [draft.path(node) for node in range(draft.nodes)] == paths
    assert draft.depths == [len(path) - 1 for path in paths] and draft.longest == max(map(len, paths))
    assert draft.parents == [0, *(path[-2] for path in paths[1:])]
    for start, filler in ((TOKENS, FILLER), (PARENTS, 0), (DEPTHS, 0), (BITS, 1)):
        assert set(draft.numbers[start + draft.nodes : start + MOST_NODES]) <= {filler}


def test_a_shape_holds_other_tokens_and_stays_as_it_is():
    shape = Draft(0)
    shape.add(0, 0)
    draft = shape.holding([4, 5])
    draft.add(6, 1)
    assert (draft.tokens, draft.parents, shape.tokens, shape.nodes) == ([4, 5, 6], [0, 0, 1], [0, 0], 2)
    assert draft != shape and Draft(3) == Draft(3) and EMPTY[TOKENS] == FILLER


@pytest.mark.parametrize("parent", [1, 5])
def test_a_parent_that_is_not_there_is_our_own_mistake(parent):
    with pytest.raises(AssertionError):
        Draft(0).add(1, parent)
