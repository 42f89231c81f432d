"""Dynamic trees against a literal construction, and the acceptance statistics behind them."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon.core.acceptance import BINS, UNLISTED, Acceptance, AcceptanceCounts, bin_of, state_of
from gorgon.core.phrasebook import ANOTHER, LEVELS, UNKNOWN, Phrasebook
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
    odds = st.floats(-2, 2)
    tables = ([[draw(odds) for _ in range(n)] for _ in range(HEADS + 1)] for n in (BINS, STATES, LEVELS))
    tokens = [draw(st.permutations(range(5)))[:3] for _ in range(HEADS)]
    logprobs = [sorted((draw(st.floats(-6, 0)) for _ in range(3)), reverse=True) for _ in range(HEADS)]
    context = draw(st.lists(st.integers(0, 4), min_size=1, max_size=20))
    phrase = st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple)
    usual = st.dictionaries(st.integers(0, 4), st.integers(2, LEVELS - 1), max_size=3)
    phrasebook = Phrasebook(draw(st.dictionaries(phrase, usual, max_size=12)))
    return Acceptance(*tables), HeadChoices(tokens, logprobs), context, phrasebook


def literal_rates(acceptance, choices, context, phrasebook, depth):
    """The rate of every path of up to `depth` tokens that could be drafted."""
    index = NgramIndex(context)
    found = {}
    for size in range(1, depth + 1):
        for path in itertools.product(range(5), repeat=size):
            product = 1.0
            for i, token in enumerate(path):
                suffix = tuple([*context, *path[:i]][-LONGEST_SUFFIX:])
                place, matched = index.find(suffix)
                same = bool(matched) and index.tokens[place] == token
                usual = phrasebook.usual(suffix)
                level = UNKNOWN if usual is None else usual.get(token, ANOTHER)
                if i < HEADS and token in choices.tokens[i]:
                    at = bin_of(choices.logprobs[i][choices.tokens[i].index(token)])
                elif same or level > ANOTHER:
                    at = UNLISTED
                else:
                    product = 0.0
                    break
                head = min(i, HEADS)
                odds = acceptance.bins[head][at] + acceptance.states[head][state_of(matched, same)]
                product /= 1 + math.exp(-odds - acceptance.levels[head][level])
            if product > 0:
                found[path] = product
    return found


@settings(max_examples=40)
@given(settings_of_a_step(), st.integers(1, 12))
def test_the_likeliest_nodes_are_drafted(setting, nodes):
    acceptance, choices, context, phrasebook = setting
    drafter = DynamicDrafter(acceptance, phrasebook, nodes=nodes, threshold=0.05, width=3)
    draft = drafter.draft(context[-1], choices, NgramIndex(context))
    possible = {p: r for p, r in literal_rates(acceptance, choices, context, phrasebook, 4).items() if r >= 0.05}
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
    even = Acceptance(*([[0.0] * n for _ in range(HEADS + 1)] for n in (BINS, STATES, LEVELS)))
    context = NgramIndex([1, 2, 3, 1, 2])
    draft = DynamicDrafter(even, Phrasebook(), nodes=4, threshold=0.01, width=3).draft(2, None, context)
    assert draft.tokens == [2, 3, 1, 2]
    draft = DynamicDrafter(even, Phrasebook({(2,): {9: 5}}), nodes=4, threshold=0.3, width=3).draft(2, None, context)
    assert sorted(draft.tokens) == [2, 3, 9] and draft.parents == [0, 0, 0]
    draft = DynamicDrafter(even, Phrasebook(), nodes=1, threshold=0.01, width=3).draft(2, None, context)
    assert draft.tokens == [2]


def test_a_static_tree_drops_what_it_cannot_fill():
    drafter = StaticDrafter(DraftTree.of([(0,), (1,), (0, 0)], ngram=3))
    choices = HeadChoices([[7, 8], [9, 6]], [[-0.1, -3.0], [-0.2, -4.0]])
    context = NgramIndex([1, 2, 3, 1, 2])
    full = drafter.draft(2, choices, context)
    assert (full.tokens, full.parents) == ([2, 7, 9, 8, 3, 1, 2], [0, 0, 1, 0, 0, 4, 5])
    assert drafter.draft(5, choices, NgramIndex([1, 2, 5])).tokens == [5, 7, 9, 8]
    alone = drafter.draft(2, None, context)
    assert (alone.tokens, alone.parents) == ([2, 3, 1, 2], [0, 0, 1, 2]), "without heads the copies alone"


def test_counts_become_rates_and_thin_cells_lean_on_what_the_heads_share():
    counts = AcceptanceCounts(1, LONGEST_SUFFIX)
    for head, often in ((0, 100), (1, 4)):
        for i in range(often):
            counts.add((head, 5, state_of(1, True), UNKNOWN), i % 5 > 0)
            counts.add((head, 5, state_of(1, False), UNKNOWN), i % 50 == 49)
            counts.add((head, 5, state_of(1, False), LEVELS - 1), i % 2 == 0)
    acceptance = counts.fit()
    rates = acceptance.rates
    assert rates[0][5][state_of(1, True)][UNKNOWN] == pytest.approx(0.8, abs=0.04)
    assert rates[0][5][state_of(1, False)][UNKNOWN] < 0.06
    assert rates[0][5][state_of(1, False)][LEVELS - 1] == pytest.approx(0.5, abs=0.05)
    assert rates[0][5][state_of(1, True)][LEVELS - 1] > 0.8, "evidence adds up where it was never seen together"
    assert rates[1][5][state_of(1, False)][UNKNOWN] < 0.25, "four observations lean on the other head's hundred"
    assert all(0 < r < 1 for head in rates for bins in head for states in bins for r in states)
    assert counts.fit() == acceptance


@pytest.mark.parametrize("key", ["bins", "states", "levels", None])
def test_an_acceptance_table_survives_json_and_a_broken_one_is_refused(key):
    table = Acceptance(*([[0.5] * n for _ in range(HEADS + 1)] for n in (BINS, STATES, LEVELS)))
    document = table.as_json()
    assert Acceptance.of_json(document) == table
    if key is None:
        broken = [None, 3, {}, []]
    else:
        rows = document[key]
        changed = ([], rows[:-1], [row[:-1] for row in rows[:1]] + rows[1:], [["x"] * len(rows[0])] * len(rows),
                   [[1e9] * len(rows[0])] * len(rows))  # fmt: skip
        broken = [{**document, key: value} for value in changed]
    for one in broken:
        with pytest.raises(ModelError, match="acceptance"):
            Acceptance.of_json(one)


def test_bins_are_ordered_and_states_distinct():
    assert [bin_of(x) for x in (-100, -0.0001)] == [1, BINS - 1]
    states = [state_of(m, same) for m in range(1, LONGEST_SUFFIX + 1) for same in (True, False)]
    assert sorted([0, *states]) == list(range(STATES))


def test_accepted_depth_follows_the_text():
    draft = StaticDrafter(DraftTree.of([(0,), (1,), (0, 0), (1, 0)])).draft(
        5, HeadChoices([[7, 8], [9]], [[0, 0], [0]]), None
    )
    assert [accepted_depth(draft, text) for text in ([7, 9], [8, 9, 1], [8, 7], [9], [7])] == [2, 2, 1, 0, 1]
