"""The phrasebook counts what follows, forgets what is rare, weighs long phrases with short ones, and refuses files that
are none."""

import json
from bisect import bisect_right

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gorgon.core.phrasebook import (
    BORDERS,
    CONTINUATIONS,
    FREQUENCIES,
    LEVELS,
    LONGEST,
    MORE,
    SEEN,
    UNSEEN,
    Following,
    Phrasebook,
)
from gorgon.errors import ModelError
from gorgon.models.directory import PHRASEBOOK_FILE, read_phrasebook

answers = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=12), max_size=12)


def literal_level(book, suffix, token):
    """The level by the recursion of Witten and Bell, from the longest phrase down."""

    def share(size):
        if size == 0:
            return (book.tokens.get(token, 0) + UNSEEN) / (sum(book.tokens.values()) + MORE)
        found = book.phrases.get(suffix[-size:]) if size <= len(suffix) else None
        if found is None:
            return share(size - 1)
        known = found.total / (found.total + found.distinct)
        return known * found.counts.get(token, 0) / found.total + (1 - known) * share(size - 1)

    return share(LONGEST), bisect_right(BORDERS, share(LONGEST))


def test_the_longest_known_ending_says_what_is_usual():
    book = Phrasebook.of([[1, 2, 3]] * 9 + [[4, 2, 5]] * 3)
    assert book.levels((7, 1, 2)).offered == (3,), "what followed the shorter ending elsewhere is not offered"
    assert book.levels((2,)).offered == (3, 5)
    assert book.levels((9, 9)).offered == () == book.levels(()).offered
    levels = book.levels((1, 2))
    assert LEVELS > levels[3] > levels[5] > levels[7], "seen here, seen behind a shorter ending, never seen"
    assert book.levels((2,))[3] < levels[3]
    assert Phrasebook().levels((1,)).offered == ()


def test_frequencies_are_shares_of_all_that_was_written():
    book = Phrasebook.of([[1] * 5000 + [2] * 20 + [3]])
    assert FREQUENCIES > book.frequency(1) > book.frequency(2) > book.frequency(3) > book.frequency(4) == 0
    assert Phrasebook().frequency(1) == 0


@given(answers, st.lists(st.integers(0, 6), max_size=6).map(tuple))
def test_counts_and_levels_are_those_of_a_literal_count(texts, suffix):
    book = Phrasebook.of(texts)
    assert book.tokens == {t: sum(text.count(t) for text in texts) for t in sorted({t for x in texts for t in x})}
    for size in range(1, LONGEST + 1):
        seen = {}
        for text in texts:
            for at in range(size, len(text)):
                seen.setdefault(tuple(text[at - size : at]), []).append(text[at])
        for phrase, found in seen.items():
            if len(found) < SEEN:
                assert phrase not in book.phrases
                continue
            following = book.phrases[phrase]
            assert (following.total, following.distinct) == (len(found), len(set(found)))
            assert all(found.count(t) == n for t, n in following.counts.items())
            assert sorted(following.counts.values()) == sorted(map(found.count, set(found)))[-CONTINUATIONS:]
    for token in range(7):
        share, level = literal_level(book, suffix, token)
        if all(abs(share - border) > 1e-12 for border in BORDERS):
            assert book.levels(suffix)[token] == level
    assert Phrasebook.of_json(json.loads(json.dumps(book.as_json())), 6) == book


def test_only_the_commonest_phrases_are_kept(monkeypatch):
    monkeypatch.setattr("gorgon.core.phrasebook.MOST_PHRASES", 2)
    book = Phrasebook.of([[1, 2]] * 5 + [[3, 4]] * 7 + [[5, 0]] * 6)
    assert book.phrases == {(3,): Following(7, 1, {4: 7}), (5,): Following(6, 1, {0: 6})}


def test_remembered_levels_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr("gorgon.core.phrasebook.KEPT", 3)
    book = Phrasebook.of([[1, 2, 3]] * 4)
    first = book.levels((1, 2))[3]
    for token in range(20):
        assert len(book._levels) <= 3
        book.levels((token,))
    assert book.levels((1, 2))[3] == first


@pytest.mark.parametrize(
    "phrases",
    ['{"1 x": [1, 1, {}]}', '{"1": 3}', '{"1": [3]}', '{"1": [3, 1, {"900": 3}]}', '{"1": [3, 1, {"4": 5}]}',
     '{"1": [3, 1, {}]}', '{"1": [3, 1, {"4": 0}]}', '{"1": [3, 1, {"4": 1, "5": 1}]}',
     '{"1 2 3 4 5": [3, 1, {"4": 1}]}', '{"": [3, 1, {"4": 1}]}',
     json.dumps({"1": [99, 99, {str(token): 1 for token in range(CONTINUATIONS + 1)}]}), "[]"],
)  # fmt: skip
def test_a_file_that_is_no_phrasebook_is_refused(tmp_path, phrases):
    (tmp_path / PHRASEBOOK_FILE).write_text(f'{{"tokens": {{"4": 3}}, "phrases": {phrases}}}')
    with pytest.raises(ModelError, match="phras"):
        read_phrasebook(tmp_path, 100)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"phrases": {}}', '{"tokens": {"100": 1}, "phrases": {}}', '{"tokens": 3, "phrases": {}}']
)
def test_a_file_of_another_form_is_refused(tmp_path, text):
    (tmp_path / PHRASEBOOK_FILE).write_text(text)
    with pytest.raises(ModelError, match="phras"):
        read_phrasebook(tmp_path, 100)


def test_a_directory_without_one_has_an_empty_one(tmp_path):
    assert read_phrasebook(tmp_path, 100) == Phrasebook()
