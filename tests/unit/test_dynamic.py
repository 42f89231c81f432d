"""Dynamic trees against a literal construction, and the acceptance statistics behind them."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon.core.acceptance import BINS, UNLISTED, AcceptanceCounts, bin_of, check_rates, state_of
from gorgon.core.tree import DraftTree
from gorgon.decode.calibrate import accepted_depth
from gorgon.decode.drafts import StaticDrafter
from gorgon.decode.dynamic import DEEPEST, DynamicDrafter
from gorgon.decode.ngrams import LONGEST_SUFFIX, NgramIndex
from gorgon.decode.step import HeadChoices
from gorgon.errors import ModelError

STATES = 2 * LONGEST_SUFFIX + 1
HEADS = 2


@st.composite
def settings_of_a_step(draw):
    rate = st.floats(0.01, 0.99)
    rates = [[[draw(rate) for _ in range(STATES)] for _ in range(BINS)] for _ in range(HEADS + 1)]
    tokens = [draw(st.permutations(range(5)))[:3] for _ in range(HEADS)]
    logprobs = [sorted((draw(st.floats(-6, 0)) for _ in range(3)), reverse=True) for _ in range(HEADS)]
    context = draw(st.lists(st.integers(0, 4), min_size=1, max_size=20))
    return rates, HeadChoices(tokens, logprobs), context


def literal_rates(rates, choices, context, depth):
    """The rate of every path of up to `depth` tokens that could be drafted."""
    index = NgramIndex(context)
    found = {}
    for size in range(1, depth + 1):
        for path in itertools.product(range(5), repeat=size):
            product = 1.0
            for i, token in enumerate(path):
                place, matched = index.find(tuple([*context, *path[:i]][-LONGEST_SUFFIX:]))
                same = bool(matched) and index.tokens[place] == token
                if i < HEADS and token in choices.tokens[i]:
                    at = bin_of(choices.logprobs[i][choices.tokens[i].index(token)])
                elif same:
                    at = UNLISTED
                else:
                    product = 0.0
                    break
                product *= rates[min(i, HEADS)][at][state_of(matched, same)]
            if product > 0:
                found[path] = product
    return found


@settings(max_examples=40)
@given(settings_of_a_step(), st.integers(1, 12))
def test_the_likeliest_nodes_are_drafted(setting, nodes):
    rates, choices, context = setting
    drafter = DynamicDrafter(rates, nodes=nodes, threshold=0.05, width=3)
    draft = drafter.draft(context[-1], choices, NgramIndex(context))
    possible = {p: r for p, r in literal_rates(rates, choices, context, 4).items() if r >= 0.05}
    paths = {}
    for node in range(1, draft.nodes):
        paths[node] = (*paths.get(draft.parents[node], ()), draft.tokens[node])
        assert draft.parents[node] < node and draft.depths[node] == len(paths[node]) <= DEEPEST
        assert draft.bits[node] == 1 << node | draft.bits[draft.parents[node]]
    assert len(set(paths.values())) == len(paths), "a token stands once under its parent"
    shallow = {p for p in paths.values() if len(p) <= 4}
    assert shallow <= set(possible)
    if draft.nodes < nodes:
        assert shallow == set(possible)
    elif shallow and len(shallow) == len(paths):
        left_out = [r for p, r in possible.items() if p not in shallow]
        assert min(possible[p] for p in shallow) >= max(left_out, default=0) - 1e-12


def test_without_heads_or_room_there_is_the_context_or_nothing():
    rates = [[[0.5] * STATES for _ in range(BINS)] for _ in range(HEADS + 1)]
    context = NgramIndex([1, 2, 3, 1, 2])
    draft = DynamicDrafter(rates, nodes=4, threshold=0.01, width=3).draft(2, None, context)
    assert draft.tokens == [2, 3, 1, 2]
    assert DynamicDrafter(rates, nodes=1, threshold=0.01, width=3).draft(2, None, context).tokens == [2]


def test_a_static_tree_drops_what_it_cannot_fill():
    drafter = StaticDrafter(DraftTree.of([(0,), (1,), (0, 0)], ngram=3))
    choices = HeadChoices([[7, 8], [9, 6]], [[-0.1, -3.0], [-0.2, -4.0]])
    context = NgramIndex([1, 2, 3, 1, 2])
    full = drafter.draft(2, choices, context)
    assert (full.tokens, full.parents) == ([2, 7, 9, 8, 3, 1, 2], [0, 0, 1, 0, 0, 4, 5])
    assert drafter.draft(5, choices, NgramIndex([1, 2, 5])).tokens == [5, 7, 9, 8]
    alone = drafter.draft(2, None, context)
    assert (alone.tokens, alone.parents) == ([2, 3, 1, 2], [0, 0, 1, 2]), "without heads the copies alone"


def test_counts_become_rates_and_thin_cells_lean_on_their_kind():
    counts = AcceptanceCounts(1, LONGEST_SUFFIX)
    for right in [True] * 80 + [False] * 20:
        counts.add(0, 5, state_of(1, True), right)
    for right in [True] * 1 + [False] * 99:
        counts.add(0, 5, state_of(1, False), right)
    rates = counts.rates()
    assert rates[0][5][state_of(1, True)] == pytest.approx(0.8, abs=0.02)
    assert rates[0][5][state_of(3, True)] == pytest.approx(0.77, abs=0.02)
    assert rates[0][5][state_of(3, False)] < 0.03
    assert all(0 < rate < 1 for rows in rates for row in rows for rate in row)
    assert check_rates(rates) == rates
    for broken in (None, 3, [[[0.5]]], [[[0.5] * STATES] * BINS, [[2.0] * STATES] * BINS]):
        with pytest.raises(ModelError, match="acceptance"):
            check_rates(broken)


def test_bins_are_ordered_and_states_distinct():
    assert [bin_of(x) for x in (-100, -0.0001)] == [1, BINS - 1]
    states = [state_of(m, same) for m in range(1, LONGEST_SUFFIX + 1) for same in (True, False)]
    assert sorted([0, *states]) == list(range(STATES))


def test_accepted_depth_follows_the_text():
    draft = StaticDrafter(DraftTree.of([(0,), (1,), (0, 0), (1, 0)])).draft(
        5, HeadChoices([[7, 8], [9]], [[0, 0], [0]]), None
    )
    assert [accepted_depth(draft, text) for text in ([7, 9], [8, 9, 1], [8, 7], [9], [7])] == [2, 2, 1, 0, 1]
