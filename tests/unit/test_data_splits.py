"""Splits: no shared value, every row in exactly one, the same for the same seed."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gorgon.data.splits import assign_splits, group_rows, keys_of, normalise
from gorgon.errors import DataError

ROWS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 15)), min_size=3, max_size=120)
FRACTIONS = st.fixed_dictionaries({"test": st.floats(0.01, 0.45), "validation": st.floats(0.01, 0.45)})


def as_keys(rows):
    return [keys_of((f"question {q}", f"schema {s}")) for q, s in rows]


def components(rows):
    """Groups by repeated flooding: slow and plain."""
    label = list(range(len(rows)))
    changed = True
    while changed:
        changed = False
        for i, a in enumerate(rows):
            for j, b in enumerate(rows):
                if (a[0] == b[0] or a[1] == b[1]) and label[i] != label[j]:
                    label[i] = label[j] = min(label[i], label[j])
                    changed = True
    return label


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=25))
def test_groups_are_the_connected_components(rows):
    groups, expected = group_rows(as_keys(rows)), components(rows)
    assert len(set(zip(groups, expected, strict=True))) == len(set(groups)) == len(set(expected))


@given(ROWS, FRACTIONS, st.integers(0, 2**32))
def test_no_value_in_two_splits_and_every_row_in_one(rows, fractions, seed):
    groups = group_rows(as_keys(rows))
    assume(len(set(groups)) >= 3)
    splits = assign_splits(groups, fractions, seed)
    assert len(splits) == len(rows)
    assert set(splits) == {"train", "validation", "test"}
    for column in (0, 1):
        seen = {}
        for row, split in zip(rows, splits, strict=True):
            assert seen.setdefault(row[column], split) == split
    assert splits == assign_splits(groups, fractions, seed)
    for name, share in fractions.items():
        used = {group for group, split in zip(groups, splits, strict=True) if split == name}
        assert splits.count(name) <= max(1, round(share * len(rows))) or len(used) == 1


@given(st.integers(30, 400), FRACTIONS, st.integers())
def test_shares_are_exact_when_nothing_is_shared(count, fractions, seed):
    splits = assign_splits(list(range(count)), fractions, seed)
    for name, share in fractions.items():
        assert splits.count(name) == max(1, round(share * count))


def test_a_giant_group_goes_to_train():
    groups = [0] * 500 + list(range(1, 501))
    for seed in range(20):
        splits = assign_splits(groups, {"validation": 0.1, "test": 0.1}, seed)
        assert set(splits[:500]) == {"train"}
        assert splits.count("test") == splits.count("validation") == 100


def test_large_groups_do_reach_the_held_out_splits():
    groups = [i // 5 for i in range(100)] + list(range(100, 200))
    large = [assign_splits(groups, {"test": 0.2}, seed)[:100].count("test") for seed in range(30)]
    assert 12 < sum(large) / len(large) < 28


def test_no_held_out_split_is_dominated_by_one_group():
    groups = [0] * 15 + list(range(1, 86))
    for seed in range(20):
        splits = assign_splits(groups, {"test": 0.2}, seed)
        assert splits.count("test") == 20
        assert set(splits[:15]) == {"train"}


def test_seeds_differ():
    groups = list(range(200))
    assert assign_splits(groups, {"test": 0.3}, 1) != assign_splits(groups, {"test": 0.3}, 2)


def test_too_few_groups():
    with pytest.raises(DataError, match="1 group") as caught:
        assign_splits([0] * 50, {"validation": 0.1, "test": 0.1}, 1)
    assert "disjoint" in caught.value.hint
    assert set(assign_splits([0, 1, 2], {"validation": 0.1, "test": 0.1}, 1)) == {"train", "validation", "test"}


def test_normalisation():
    assert normalise("  Who IS\n it? ") == "who is it?"
    assert keys_of(["a", "a", " "]) == [(0, "a"), (1, "a")]
    assert group_rows([keys_of(("Who?", "")), keys_of((" who? ", "")), keys_of(("", "who?"))]) == [0, 0, 1]
    assert group_rows([[], []]) == [0, 1]
