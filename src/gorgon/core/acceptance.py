"""How likely a draft is right, given what heads, context and phrasebook say of it: learnt on text that the model wrote.

A head's probability is no acceptance rate: heads are over- or under-confident, and whether the context or the model's
habits offer the same token tells more than the head alone. So each candidate is described by three small numbers, and
a logistic regression on counts weighs them: bin (the head's probability), state (what the context offers there) and
level (how usual the token is behind the ones before it).
Source: best-first trees from a drafter's own probabilities are OPT-Tree (arXiv:2406.17276) and DDTree
(arXiv:2604.12989); calibrating them on the context's and the phrasebook's evidence is ours.
Shapes: C cells, F features of a cell, W weights.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from gorgon.core.phrasebook import LEVELS
from gorgon.errors import ModelError

BORDERS = tuple(math.log(p) for p in (0.005, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96, 0.99))
"""Log-probabilities between the bins."""
UNLISTED = 0
"""Bin of a token that is not among the head's choices; the others count from 1."""
BINS = len(BORDERS) + 2
Rates = list[list[list[list[float]]]]
"""Acceptance rate by head, bin, state and level; the last head's are for depths beyond the heads."""
Cell = tuple[int, int, int, int]
"""Head, bin, state, level."""
PENALTY = 1.0
"""Half of it times the squared weights is added to the regression's loss: thin cells lean on what all heads share."""
ITERATIONS = 100


def bin_of(logprob: float) -> int:
    """The bin of a listed choice."""
    return bisect_right(BORDERS, logprob) + 1


def state_of(matched: int, same: bool) -> int:
    """What the context offers at a node: 0 nothing; else how many tokens matched, and whether it offers this token."""
    return 0 if not matched else 2 * matched - 1 + (not same)


@dataclass
class AcceptanceCounts:
    """Right and all candidates by cell. Candidates beyond the last head are counted under head K.

    Attributes: longest: matched tokens at most, which bounds the states.
    """

    heads: int
    longest: int
    right: Counter[Cell] = field(default_factory=Counter)
    seen: Counter[Cell] = field(default_factory=Counter)

    def add(self, cell: Cell, right: bool) -> None:
        """One candidate whose parent was right."""
        self.seen[cell] += 1
        self.right[cell] += right

    def fit(self) -> Acceptance:
        """The regression: a cell's log-odds are the sum of its bin's, its state's and its level's, each the head's own
        plus one that all heads share. Deterministic."""
        states, cells = 2 * self.longest + 1, sorted(self.seen)
        sizes = (BINS, states, LEVELS)
        offsets = [sum(sizes[:i]) for i in range(3)]
        width = sum(sizes)
        shared = (self.heads + 1) * width
        own_CF = [[c[0] * width + o + v for o, v in zip(offsets, c[1:], strict=True)] for c in cells]
        features_CF = torch.tensor([[*own, *(shared + f % width for f in own)] for own in own_CF], dtype=torch.int64)
        right_C = torch.tensor([self.right[c] for c in cells], dtype=torch.float64)
        seen_C = torch.tensor([self.seen[c] for c in cells], dtype=torch.float64)
        weights_W = torch.zeros(shared + width, dtype=torch.float64, requires_grad=True)
        base = math.log((self.right.total() + 1) / (self.seen.total() - self.right.total() + 1))
        solver = torch.optim.LBFGS([weights_W], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            solver.zero_grad()
            odds_C = base + weights_W[features_CF.view(len(cells), 6)].sum(1)
            value = (seen_C * torch.nn.functional.softplus(odds_C) - right_C * odds_C).sum()
            value = value + PENALTY / 2 * weights_W.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        with torch.enable_grad():
            solver.step(loss)  # type: ignore[no-untyped-call]
        table = weights_W.detach().view(self.heads + 2, width)
        table = table[:-1] + table[-1]
        bins, rest = table[:, :BINS] + base, table[:, BINS:]
        return Acceptance(bins.tolist(), rest[:, :states].tolist(), rest[:, states:].tolist())


@dataclass(frozen=True)
class Acceptance:
    """Log-odds that a candidate is right, as three terms per head: by bin, by state, by level."""

    bins: list[list[float]]
    states: list[list[float]]
    levels: list[list[float]]

    @property
    def heads(self) -> int:
        """K; the row behind the last head is for greater depths."""
        return len(self.bins) - 1

    @cached_property
    def rates(self) -> Rates:
        """Every cell's acceptance rate; made once for all the drafters that share this table."""
        return [
            [[[1 / (1 + math.exp(-(b + s + v))) for v in level] for s in state] for b in bins]
            for bins, state, level in zip(self.bins, self.states, self.levels, strict=True)
        ]

    def as_json(self) -> dict[str, Any]:
        """The form in tree.json."""
        return {
            name: [[round(x, 4) for x in row] for row in getattr(self, name)] for name in ("bins", "states", "levels")
        }

    @staticmethod
    def of_json(document: Any) -> Acceptance:
        """What `as_json` gave.

        Raises: ModelError when it has another form.
        """
        try:
            tables = [[[float(x) for x in row] for row in document[name]] for name in ("bins", "states", "levels")]
            widths = [{len(row) for row in table} for table in tables]
            fine = widths[0] == {BINS} and len(widths[1]) == 1 and widths[2] == {LEVELS}
            fine = fine and len({len(table) for table in tables}) == 1
            fine = fine and all(abs(x) < 100 for table in tables for row in table for x in row)
        except (TypeError, KeyError, ValueError):
            fine = False
        if not fine:
            raise ModelError("the acceptance table is malformed", field="acceptance", hint="run `gorgon tune` again")
        return Acceptance(*tables)
