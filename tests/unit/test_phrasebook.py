"""The phrasebook counts what follows, forgets what is rare, and refuses files that are none."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gorgon.core.phrasebook import ANOTHER, CONTINUATIONS, LEVELS, LONGEST, SEEN, Phrasebook
from gorgon.errors import ModelError
from gorgon.models.directory import PHRASEBOOK_FILE, read_phrasebook

answers = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=12), max_size=12)


def test_the_longest_known_ending_says_what_is_usual():
    book = Phrasebook.of([[1, 2, 3]] * 9 + [[4, 2, 5]] * 3)
    assert book.usual((7, 1, 2)) == {3: LEVELS - 2}, "nine of nine, counted as nine of ten"
    assert set(book.usual((2,))) == {3, 5} and book.usual((2,))[3] > book.usual((2,))[5]
    assert book.usual((9, 9)) is None and book.usual(()) is None
    assert Phrasebook().usual((1,)) is None


@given(answers)
def test_counts_are_those_of_a_literal_count(texts):
    book = Phrasebook.of(texts)
    for size in range(1, LONGEST + 1):
        seen = {}
        for text in texts:
            for at in range(size, len(text)):
                seen.setdefault(tuple(text[at - size : at]), []).append(text[at])
        for phrase, found in seen.items():
            if len(found) < SEEN:
                assert phrase not in book.phrases
                continue
            listed = book.phrases[phrase]
            assert len(listed) <= CONTINUATIONS
            assert all(ANOTHER < level < LEVELS and found.count(t) > 1 for t, level in listed.items())
            if listed:
                assert max(found.count(t) for t in set(found)) == max(found.count(t) for t in listed)
    assert Phrasebook.of_json(json.loads(json.dumps(book.as_json())), 6) == book


def test_only_the_commonest_phrases_are_kept(monkeypatch):
    monkeypatch.setattr("gorgon.core.phrasebook.MOST_PHRASES", 2)
    book = Phrasebook.of([[1, 2]] * 5 + [[3, 4]] * 7 + [[5, 0]] * 6)
    assert set(book.phrases) == {(3,), (5,)}


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"1 x": {}}', '{"1": [3]}', '{"1": {"900": 3}}', '{"1": {"3": 1}}', '{"1": {"3": 99}}']
)
def test_a_file_that_is_no_phrasebook_is_refused(tmp_path, text):
    (tmp_path / PHRASEBOOK_FILE).write_text(text)
    with pytest.raises(ModelError, match="phras"):
        read_phrasebook(tmp_path, 100)


def test_a_directory_without_one_has_an_empty_one(tmp_path):
    assert read_phrasebook(tmp_path, 100) == Phrasebook()
