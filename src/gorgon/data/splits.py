"""Seeded splits that share no value of the disjoint columns: rows that share one stay together."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence

from gorgon.errors import DataError

LARGEST_SHARE = 0.25  # of a held-out split; a group larger than this would make it a test of one schema


def normalise(value: str) -> str:
    """Case and white space do not make a value different: `Who?  ` is `who?`."""
    return " ".join(value.casefold().split())


def keys_of(values: Sequence[str]) -> list[tuple[int, str]]:
    """(column number, normalised value) of every value that is not blank; blanks connect nothing."""
    return [(i, text) for i, value in enumerate(values) if (text := normalise(value))]


def group_rows(rows: Sequence[Sequence[Hashable]]) -> list[int]:
    """For each row the number of its group: rows that share a key, directly or through others, share the group.

    Union-find with path halving; groups are numbered in the order of their first rows.
    """
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    owner: dict[Hashable, int] = {}
    for i, keys in enumerate(rows):
        for key in keys:
            parent[root(i)] = root(owner.setdefault(key, i))
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(i), len(numbers)) for i in range(len(rows))]


def assign_splits(groups: Sequence[int], fractions: Mapping[str, float], seed: int, rest: str = "train") -> list[str]:
    """The split of each row: whole groups go to the held-out splits until they have their shares, the others to `rest`.

    Groups are taken in random order, and first only such as make up at most a quarter of a held-out split, so that
    none is dominated by one schema; a giant group ends up in `rest`.
    Args: fractions: held-out split -> share of all rows, in (0, 1).
    Raises: DataError when there are fewer groups than splits.
    Invariant: no split is empty; a held-out split is larger than its share only where one group alone is.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        members[group].append(row)
    if len(members) < len(fractions) + 1:
        raise DataError(
            f"{len(groups)} rows cannot be split into {len(fractions) + 1} parts: they share values of the disjoint "
            f"columns and form only {len(members)} group(s)",
            field="disjoint", hint="give more rows, or let splits share more, such as disjoint: [question]",
        )  # fmt: skip
    order = sorted(members)
    random.Random(f"splits {seed}").shuffle(order)
    free = dict.fromkeys(order)
    result = [rest] * len(groups)
    waiting = len(fractions)  # splits still to be served, each of which needs a group, and one is left for `rest`
    for name in sorted(fractions):
        waiting -= 1
        target = max(1, round(fractions[name] * len(groups)))
        taken = _take(members, list(free), target, keep=waiting + 1)
        for group in taken:
            del free[group]
            for row in members[group]:
                result[row] = name
    return result


def _take(members: Mapping[int, Sequence[int]], order: Sequence[int], target: int, keep: int) -> list[int]:
    """Groups of `target` rows together, or nearly, leaving at least `keep` groups."""
    taken: dict[int, None] = {}
    missing = target
    for largest in (max(1.0, LARGEST_SHARE * target), float(target)):
        for group in order:
            size = len(members[group])
            if len(order) - len(taken) <= keep:
                break
            if group not in taken and size <= min(missing, largest):
                taken[group] = None
                missing -= size
    if not taken:
        taken[min(order, key=lambda group: len(members[group]))] = None
    return list(taken)
