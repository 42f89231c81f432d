"""How likely a draft is right, given what the heads and the context say of it: counted on text that the model wrote.

A head's probability is no acceptance rate: heads are over- or under-confident, and whether the context offers the same
token tells more than either alone. So candidates are sorted into cells by head, by the head's probability and by what
the context offers there, and each cell's rate is counted.
Source: best-first trees from a drafter's own probabilities are OPT-Tree (arXiv:2406.17276) and DDTree
(arXiv:2604.12989); calibrating them by counting, with the context's evidence as a second signal, is ours.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

from gorgon.errors import ModelError

BORDERS = tuple(math.log(p) for p in (0.005, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96, 0.99))
"""Log-probabilities between the bins."""
UNLISTED = 0
"""Bin of a token that is not among the head's choices; the others count from 1."""
BINS = len(BORDERS) + 2
Rates = list[list[list[float]]]
"""Acceptance rate by head, bin and state."""
PRIOR = 4.0
"""Weight, in observations, of the coarser cell's rate within a finer one."""


def bin_of(logprob: float) -> int:
    """The bin of a listed choice."""
    return bisect_right(BORDERS, logprob) + 1


def state_of(matched: int, same: bool) -> int:
    """What the context offers at a node: 0 nothing; else how many tokens matched, and whether it offers this token."""
    return 0 if not matched else 2 * matched - 1 + (not same)


@dataclass
class AcceptanceCounts:
    """Right and all candidates by (head, bin, state). Candidates beyond the last head are counted under head K."""

    heads: int
    longest: int
    right: list[list[list[int]]] = field(init=False)
    seen: list[list[list[int]]] = field(init=False)

    def __post_init__(self) -> None:
        states = 2 * self.longest + 1
        self.right = [[[0] * states for _ in range(BINS)] for _ in range(self.heads + 1)]
        self.seen = [[[0] * states for _ in range(BINS)] for _ in range(self.heads + 1)]

    def add(self, head: int, place: int, state: int, right: bool) -> None:
        """One candidate whose parent was right."""
        self.seen[head][place][state] += 1
        self.right[head][place][state] += right

    def rates(self) -> Rates:
        """Acceptance rate by (head, bin, state); a thin cell leans on its kind in the (head, bin)."""
        table = []
        for right_BS, seen_BS in zip(self.right, self.seen, strict=True):
            rows = []
            for right_S, seen_S in zip(right_BS, seen_BS, strict=True):
                row = []
                for group in ([0], range(1, len(seen_S), 2), range(2, len(seen_S), 2)):  # nothing, same, other token
                    right, seen = sum(right_S[s] for s in group), sum(seen_S[s] for s in group)
                    base = (right + 0.5) / (seen + 5.0)
                    row += [(s, (right_S[s] + PRIOR * base) / (seen_S[s] + PRIOR)) for s in group]
                rows.append([rate for _, rate in sorted(row)])
            table.append(rows)
        return table


def check_rates(table: Any) -> Rates:
    """A table of rates as a file holds it.

    Raises: ModelError when it has not the form of `AcceptanceCounts.rates`.
    """
    try:
        states = {len(row) for rows in table for row in rows}
        fine = len(states) == 1 and all(len(rows) == BINS for rows in table)
        fine = fine and all(0 <= float(rate) <= 1 for rows in table for row in rows for rate in row)
    except TypeError:
        fine = False
    if not fine:
        raise ModelError(
            "the table of acceptance rates is malformed", field="acceptance", hint="run `gorgon tune` again"
        )
    return [[[float(rate) for rate in row] for row in rows] for rows in table]
