"""Dynamic trees against a literal construction, and the acceptance statistics behind them."""

import gc
import itertools
import json
import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon.core.acceptance import (
    BINS,
    COPIED,
    EVIDENCE,
    LONGEST_MATCH,
    NEUTRAL,
    OFFERS,
    PLACES,
    STANDINGS,
    UNLISTED,
    Acceptance,
    AcceptanceCounts,
    bin_of,
    evidence_of,
    standing_of,
)
from gorgon.core.phrasebook import FREQUENCIES, LEVELS, Phrasebook
from gorgon.core.tree import DraftTree
from gorgon.decode import growth
from gorgon.decode.calibrate import accepted_depth
from gorgon.decode.drafts import StaticDrafter
from gorgon.decode.dynamic import DynamicDrafter
from gorgon.decode.growth import DEEPEST
from gorgon.decode.ngrams import NgramIndex
from gorgon.decode.step import HeadChoices
from gorgon.errors import MissingDependencyError, ModelError, ShapeError
from gorgon.models import toolchain
from gorgon.models.toolchain import cpp_compiler

HEADS = 2
TOKENS = 5


def even(odds=0.0):
    """Every candidate is as likely."""
    by_head = ([[odds / 2] * n for _ in range(HEADS + 1)] for n in (BINS, LEVELS))
    return Acceptance(*by_head, [[0.0] * PLACES] * BINS, [[[0.0, 0.0]] * FREQUENCIES] * EVIDENCE, {})


@st.composite
def settings_of_a_step(draw):
    odds = st.floats(-2, 2)
    random = Random(draw(st.integers(0, 2**32)))
    owns = draw(st.dictionaries(st.integers(0, TOKENS - 1), st.tuples(odds, odds), max_size=TOKENS))
    sizes = (HEADS + 1, BINS), (HEADS + 1, LEVELS), (BINS, PLACES), (EVIDENCE, FREQUENCIES, 2)
    acceptance = Acceptance(*(table(random, each) for each in sizes), owns)
    tokens = [draw(st.permutations(range(TOKENS)))[:3] for _ in range(HEADS)]
    logprobs = [sorted((draw(st.floats(-6, 0)) for _ in range(3)), reverse=True) for _ in range(HEADS)]
    text = st.lists(st.integers(0, TOKENS - 1), min_size=1, max_size=20)
    return acceptance, (tokens, logprobs), draw(text), Phrasebook.of(draw(st.lists(text, max_size=4)))


def table(random, sizes):
    """Nested lists of log-odds."""
    return [table(random, sizes[1:]) for _ in range(sizes[0])] if sizes else random.uniform(-1.5, 1.5)


def literal_rates(acceptance, choices, context, phrasebook, depth):
    """The rate of every path of up to `depth` tokens that could be drafted."""
    index = NgramIndex(context)
    found = {}
    for size in range(1, depth + 1):
        for path in itertools.product(range(TOKENS), repeat=size):
            product = 1.0
            for i, token in enumerate(path):
                suffix = tuple([*context, *path[:i]][-LONGEST_MATCH:])
                longest, copies = index.offers(suffix)
                best, rank = bin_of(choices[1][i][0]) if i < HEADS else UNLISTED, PLACES - 1
                if i < HEADS and token in choices[0][i]:
                    rank = choices[0][i].index(token)
                    at = bin_of(choices[1][i][rank])
                elif token in copies or token in phrasebook.levels(suffix).offered:
                    at = UNLISTED
                else:
                    product = 0.0
                    break
                matched, place = copies.get(token, (0, 0))
                head = min(i, HEADS)
                odds = acceptance.bins[head][at] + acceptance.standings[best][rank]
                odds += acceptance.levels[head][phrasebook.levels(suffix)[token]]
                evidence = acceptance.evidence[evidence_of(longest, matched, place)]
                odds += evidence[phrasebook.frequency(token)][token in context]
                odds += acceptance.tokens.get(token, NEUTRAL)[matched > 0]
                product /= 1 + math.exp(-odds)
            if product > 0:
                found[path] = product
    return found


@settings(max_examples=40)
@given(settings_of_a_step(), st.integers(1, 12))
def test_the_likeliest_nodes_are_drafted(setting, nodes):
    acceptance, choices, context, phrasebook = setting
    drafter = DynamicDrafter(acceptance, phrasebook, nodes=nodes, threshold=0.05, width=3)
    draft = drafter.grow(context[-1], HeadChoices.of(*choices), NgramIndex(context))
    possible = {p: r for p, r in literal_rates(acceptance, choices, context, phrasebook, 4).items() if r >= 0.05}
    paths = {}
    for node in range(1, draft.nodes):
        paths[node] = (*paths.get(draft.parents[node], ()), draft.tokens[node])
        assert draft.parents[node] < node and draft.depths[node] == len(paths[node]) <= DEEPEST
        assert draft.path(node) == [*draft.path(draft.parents[node]), node]
    assert len(set(paths.values())) == len(paths), "a token stands once under its parent"
    shallow = {p for p in paths.values() if len(p) <= 4}
    assert shallow <= set(possible)
    if draft.nodes < nodes:
        assert shallow == set(possible)
    elif shallow and len(shallow) == len(paths):
        left_out = [r for p, r in possible.items() if p not in shallow]
        assert min(possible[p] for p in shallow) >= max(left_out, default=0) - 1e-12


@pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler")
@settings(max_examples=200)
@given(settings_of_a_step(), st.integers(1, 64), st.floats(1e-3, 0.9), st.integers(0, 3), st.integers(1, 3))
def test_compiled_code_grows_the_same_tree(setting, nodes, threshold, heads, width):
    acceptance, choices, context, phrasebook = setting
    drafter = DynamicDrafter(acceptance, phrasebook, nodes=nodes, threshold=threshold, width=width)
    given = HeadChoices.of(*(rows[:heads] for rows in choices)) if heads else None
    index = NgramIndex(context)
    assert drafter._growth is not None
    assert drafter.draft(context[-1], given, index) == drafter.grow(context[-1], given, index)


@pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler")
def test_what_compiled_code_reads_is_made_once_and_goes_with_its_drafters():
    acceptance, phrasebook, before = even(), Phrasebook.of([[1, 2, 3]] * 3), len(growth._MADE)
    drafters = [DynamicDrafter(acceptance, phrasebook, nodes=n, threshold=0.1, width=3) for n in (4, 8)]
    assert len(growth._MADE) == before + 2
    del drafters
    gc.collect()
    assert len(growth._MADE) <= before


@pytest.mark.parametrize("nodes", [-1, 0, 65, 1000])
def test_a_number_of_nodes_that_no_draft_can_have_is_refused(nodes):
    with pytest.raises(ShapeError, match="nodes"):
        DynamicDrafter(even(), Phrasebook(), nodes=nodes, threshold=0.1, width=3)


def test_without_a_compiler_trees_grow_in_python(monkeypatch):
    monkeypatch.setattr("gorgon.decode.dynamic.growth_works", lambda: False)
    drafter = DynamicDrafter(even(), Phrasebook(), nodes=4, threshold=0.01, width=3)
    assert drafter.draft(2, None, NgramIndex([1, 2, 3, 1, 2])).tokens == [2, 3, 1, 2]


def test_a_compiler_that_fails_is_reported_and_done_without(monkeypatch, caplog):
    def fails():
        raise MissingDependencyError("the C++ compiler failed: no memory")

    monkeypatch.setattr(growth, "_library", fails)
    monkeypatch.setattr(toolchain, "cpp_compiler", lambda: "g++")
    assert growth.growth_works.__wrapped__() is False
    assert "no memory" in caplog.text


def test_without_heads_or_room_there_is_the_context_or_nothing():
    context = NgramIndex([1, 2, 3, 1, 2])
    draft = DynamicDrafter(even(), Phrasebook(), nodes=4, threshold=0.01, width=3).draft(2, None, context)
    assert draft.tokens == [2, 3, 1, 2]
    phrasebook = Phrasebook.of([[2, 9]] * 3)
    draft = DynamicDrafter(even(), phrasebook, nodes=4, threshold=0.3, width=3).draft(2, None, context)
    assert sorted(draft.tokens) == [2, 3, 9] and draft.parents == [0, 0, 0]
    draft = DynamicDrafter(even(), Phrasebook(), nodes=1, threshold=0.01, width=3).draft(2, None, context)
    assert draft.tokens == [2]


def test_a_static_tree_drops_what_it_cannot_fill():
    drafter = StaticDrafter(DraftTree.of([(0,), (1,), (0, 0)], ngram=3))
    choices = HeadChoices.of([[7, 8], [9, 6]], [[-0.1, -3.0], [-0.2, -4.0]])
    context = NgramIndex([1, 2, 3, 1, 2])
    full = drafter.draft(2, choices, context)
    assert (full.tokens, full.parents) == ([2, 7, 9, 8, 3, 1, 2], [0, 0, 1, 0, 0, 4, 5])
    assert drafter.draft(5, choices, NgramIndex([1, 2, 5])).tokens == [5, 7, 9, 8]
    untouched = NgramIndex([1, 2, 3, 1, 2])
    assert StaticDrafter(DraftTree.of([(0,)])).draft(2, choices, untouched).tokens == [2, 7]
    assert untouched._indexed == 0, "a tree without a branch does not pay for the index"
    alone = drafter.draft(2, None, context)
    assert (alone.tokens, alone.parents) == ([2, 3, 1, 2], [0, 0, 1, 2]), "without heads the copies alone"


def test_counts_become_rates_and_thin_cells_lean_on_what_the_heads_share():
    counts = AcceptanceCounts(1)
    copied, other, place = evidence_of(1, 1), evidence_of(1), standing_of(9, 1)
    for head, often in ((0, 200), (1, 4)):
        for i in range(often):
            counts.add((head, (7, 5, place, 0, copied, 0, 1)), i % 5 > 0)
            counts.add((head, (7, 5, place, 0, other, 0, 1)), i % 50 == 49)
            counts.add((head, (7, 5, place, LEVELS - 1, other, 0, 1)), i % 2 == 0)
            counts.add((head, (8, 5, place, 0, copied, 0, 1)), i % 50 == 49)
    acceptance = counts.fit()

    def rate(head, *clues):
        return 1 / (1 + math.exp(-acceptance.odds(head, clues)))

    assert rate(0, 7, 5, place, 0, copied, 0, 1) == pytest.approx(0.8, abs=0.04)
    assert rate(0, 7, 5, place, 0, other, 0, 1) < 0.06
    assert rate(0, 7, 5, place, LEVELS - 1, other, 0, 1) == pytest.approx(0.5, abs=0.05)
    assert rate(0, 7, 5, place, LEVELS - 1, copied, 0, 1) > 0.8, "evidence adds up where it was never seen together"
    assert rate(0, 8, 5, place, 0, copied, 0, 1) < 0.1, "a token that is rarely right when it is copied"
    assert rate(1, 7, 5, place, 0, other, 0, 1) < 0.25, "four observations lean on the other head's hundred"
    assert counts.fit() == acceptance


def test_nothing_counted_is_an_even_table():
    acceptance = AcceptanceCounts(HEADS).fit()
    assert acceptance.heads == HEADS and acceptance.tokens == {}
    assert acceptance.odds(HEADS, (3, 1, STANDINGS - 1, 2, EVIDENCE - 1, 4, 1)) == 0.0


@pytest.mark.parametrize("key", ["bins", "levels", "standings", "evidence", "tokens", None])
def test_an_acceptance_table_survives_json_and_a_broken_one_is_refused(key):
    acceptance = Acceptance(**{**vars(even(0.5)), "tokens": {3: (0.25, -1.0), 70: (0.0, 2.0)}})
    document = json.loads(json.dumps(acceptance.as_json()))
    assert Acceptance.of_json(document) == acceptance
    if key is None:
        broken = [None, 3, {}, []]
    elif key == "tokens":
        broken = [{**document, key: value} for value in ([], {"x": [0, 0]}, {"3": [0]}, {"3": 1}, {"3": [1e9, 0]})]
    else:
        rows = document[key]
        changed = ([], rows[:-1], [row[:-1] for row in rows[:1]] + rows[1:], [["x"] * len(rows[0])] * len(rows),
                   [[1e9] * len(rows[0])] * len(rows))  # fmt: skip
        broken = [{**document, key: value} for value in changed]
    for one in broken:
        with pytest.raises(ModelError, match="acceptance"):
            Acceptance.of_json(one)


def test_bins_are_ordered_and_evidence_is_distinct():
    assert [bin_of(x) for x in (-100, -0.0001)] == [1, BINS - 1]
    none = [evidence_of(longest) for longest in range(LONGEST_MATCH + 1)]
    copied = [
        evidence_of(longest, matched, place)
        for longest in range(1, LONGEST_MATCH + 1)
        for matched in range(1, longest + 1)
        for place in range(OFFERS)
    ]
    assert len({*none, *copied}) == len(none) + len(copied)
    assert max(none) < COPIED <= min(copied) and max(copied) < EVIDENCE


def test_accepted_depth_follows_the_text():
    draft = StaticDrafter(DraftTree.of([(0,), (1,), (0, 0), (1, 0)])).draft(
        5, HeadChoices.of([[7, 8], [9, 6]], [[0, 0], [0, 0]]), None
    )
    assert [accepted_depth(draft, text) for text in ([7, 9], [8, 9, 1], [8, 7], [9], [7])] == [2, 2, 1, 0, 1]
