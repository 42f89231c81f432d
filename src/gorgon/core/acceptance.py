"""How likely a draft is right, given what heads, context and phrasebook say of it: learnt on text that the model wrote.

A head's probability is no acceptance rate: heads are over- or under-confident, and whether the context offers the same
token, how usual it is behind the ones before it, and which token it is tell more than the head alone. So each candidate
is described by a few small numbers, its `Clues`, and a logistic regression on counts weighs them.
Source: best-first trees from a drafter's own probabilities are OPT-Tree (arXiv:2406.17276) and DDTree
(arXiv:2604.12989); calibrating them on the context's and the phrasebook's evidence is ours.
Shapes: C cells, F features of a cell, W weights.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gorgon.core.phrasebook import FREQUENCIES, LEVELS
from gorgon.errors import ModelError

BORDERS = tuple(math.log(p) for p in (0.005, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96, 0.99))
"""Log-probabilities between the bins."""
UNLISTED = 0
"""Bin of a token that is not among the head's choices; the others count from 1."""
BINS = len(BORDERS) + 2
PLACES = 8
"""Places among a head's choices that are told apart; later ones, and tokens that are not listed, are at the last."""
STANDINGS = BINS * PLACES
LONGEST_MATCH = 4
"""Latest tokens that are looked up in the context; longer matches hardly ever decide (docs/lab-notes.md)."""
OFFERS = 3
"""Different continuations of one match that are looked at, latest first."""
COPIED = (LONGEST_MATCH + 1) * OFFERS
"""Evidence from which on the context offers the token."""
EVIDENCE = (LONGEST_MATCH + 1) * COPIED
Clues = tuple[int, int, int, int, int, int, int]
"""What is known of a candidate: token, bin of the head's probability, its standing among the head's choices, level of
the phrasebook's probability, evidence of the context, frequency of the token in answers, and 1 when the context has the
token anywhere, else 0."""
Cell = tuple[int, Clues]
"""Head and clues."""
NEUTRAL = (0.0, 0.0)
"""Weights of a token that was never a candidate."""
PENALTY = 1.0
"""Half of it times the squared weights is added to the regression's loss: thin cells lean on what all heads share."""
ITERATIONS = 200


def bin_of(logprob: float) -> int:
    """The bin of a listed choice."""
    return bisect_right(BORDERS, logprob) + 1


def standing_of(best: int, place: int = PLACES - 1) -> int:
    """How a token stands among a head's choices.

    Args:
        best: bin of the likeliest one; `UNLISTED` where no head was read.
        place: the token's, from 0; the last when it is not listed.
    """
    return best * PLACES + min(place, PLACES - 1)


def evidence_of(longest: int, matched: int = 0, place: int = 0) -> int:
    """What the context says of a token.

    Args:
        longest: tokens of the longest match, whatever followed it.
        matched: tokens of the longest match that this token followed; 0 when it followed none.
        place: how many other tokens followed that match later.
    """
    return (matched * (LONGEST_MATCH + 1) + longest) * OFFERS + place


@dataclass
class AcceptanceCounts:
    """Right and all candidates by cell. Candidates beyond the last head are counted under head K."""

    heads: int
    right: Counter[Cell] = field(default_factory=Counter)
    seen: Counter[Cell] = field(default_factory=Counter)

    def add(self, cell: Cell, right: bool) -> None:
        """One candidate whose parent was right."""
        self.seen[cell] += 1
        self.right[cell] += right

    def fit(self) -> Acceptance:
        """The regression: a cell's log-odds are the sum of its bin's and its level's, each the head's own plus one that
        all heads share, of its standing's, its evidence's and its token's. Deterministic."""
        cells = sorted(self.seen)
        tokens = {token: i for i, token in enumerate(sorted({clues[0] for _, clues in cells}))}
        width = BINS + LEVELS
        shared = (self.heads + 1) * width
        standing = shared + width
        evidence = standing + STANDINGS
        token = evidence + EVIDENCE * FREQUENCIES * 2

        def features(cell: Cell) -> list[int]:
            head, (name, bin_, stands, level, found, frequency, present) = cell
            own = [bin_, BINS + level]
            return [*(head * width + f for f in own), *(shared + f for f in own), standing + stands,
                    evidence + (found * FREQUENCIES + frequency) * 2 + present,
                    token + 2 * tokens[name] + (found >= COPIED)]  # fmt: skip

        features_CF = torch.tensor([features(c) for c in cells], dtype=torch.int64).view(len(cells), 7)
        right_C = torch.tensor([self.right[c] for c in cells], dtype=torch.float64)
        seen_C = torch.tensor([self.seen[c] for c in cells], dtype=torch.float64)
        weights_W = torch.zeros(token + 2 * len(tokens), dtype=torch.float64, requires_grad=True)
        base = math.log((self.right.total() + 1) / (self.seen.total() - self.right.total() + 1))
        solver = torch.optim.LBFGS([weights_W], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            solver.zero_grad()
            odds_C = base + weights_W[features_CF].sum(1)
            value = (seen_C * torch.nn.functional.softplus(odds_C) - right_C * odds_C).sum()
            value = value + PENALTY / 2 * weights_W.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        with torch.enable_grad():
            solver.step(loss)  # type: ignore[no-untyped-call]
        weights_W = weights_W.detach()
        by_head = weights_W[:standing].view(self.heads + 2, width)
        by_head = by_head[:-1] + by_head[-1]
        by_token = weights_W[token:].view(-1, 2).tolist()
        return Acceptance(
            (by_head[:, :BINS] + base).tolist(),
            by_head[:, BINS:].tolist(),
            weights_W[standing:evidence].view(BINS, PLACES).tolist(),
            weights_W[evidence:token].view(EVIDENCE, FREQUENCIES, 2).tolist(),
            {name: (by_token[i][0], by_token[i][1]) for name, i in tokens.items()},
        )


@dataclass(frozen=True)
class Acceptance:
    """Log-odds that a candidate is right, as a sum of five terms.

    Attributes:
        bins, levels: [K + 1][...], by head; the last row is for depths beyond the heads.
        standings: [BINS][PLACES], by the bin of the head's likeliest choice and the token's own place.
        evidence: [EVIDENCE][FREQUENCIES][2], by what the context says, and of how frequent a token.
        tokens: by token, unless the context offers it, and if it does.
    """

    bins: list[list[float]]
    levels: list[list[float]]
    standings: list[list[float]]
    evidence: list[list[list[float]]]
    tokens: Mapping[int, tuple[float, float]]

    @property
    def heads(self) -> int:
        """K; the row behind the last head is for greater depths."""
        return len(self.bins) - 1

    def odds(self, head: int, clues: Clues) -> float:
        """Log-odds of a candidate."""
        token, bin_, standing, level, found, frequency, present = clues
        by_head = self.bins[head][bin_] + self.standings[standing // PLACES][standing % PLACES]
        own = self.tokens.get(token, NEUTRAL)[found >= COPIED]
        return by_head + self.levels[head][level] + self.evidence[found][frequency][present] + own

    def as_json(self) -> dict[str, Any]:
        """The form in tree.json."""
        return {
            **{name: [_rounded(row) for row in getattr(self, name)] for name in ("bins", "levels", "standings")},
            "evidence": [[_rounded(row) for row in table] for table in self.evidence],
            "tokens": {str(token): _rounded(pair) for token, pair in self.tokens.items()},
        }

    @staticmethod
    def of_json(document: Any) -> Acceptance:
        """What `as_json` gave.

        Raises: ModelError when it has another form.
        """
        try:
            names = "bins", "levels", "standings"
            bins, levels, standings = ([_numbers(row) for row in document[name]] for name in names)
            evidence = [[_numbers(row) for row in table] for table in document["evidence"]]
            pairs = {int(token): _numbers(pair) for token, pair in document["tokens"].items()}
            fine = len(bins) == len(levels) > 0 and len(evidence) == EVIDENCE
            fine = fine and {len(row) for row in bins} == {BINS} and {len(row) for row in levels} == {LEVELS}
            fine = fine and len(standings) == BINS and {len(row) for row in standings} == {PLACES}
            fine = fine and {len(table) for table in evidence} == {FREQUENCIES}
            fine = fine and {len(row) for table in evidence for row in table} | {len(p) for p in pairs.values()} == {2}
        except (AttributeError, TypeError, KeyError, ValueError):
            fine = False
        if not fine:
            raise ModelError("the acceptance table is malformed", field="acceptance", hint="run `gorgon tune` again")
        tokens = {token: (pair[0], pair[1]) for token, pair in pairs.items()}
        return Acceptance(bins, levels, standings, evidence, tokens)


def _rounded(row: Sequence[float]) -> list[float]:
    return [round(x, 4) for x in row]


def _numbers(row: Sequence[Any]) -> list[float]:
    numbers = [float(x) for x in row]
    if not all(abs(x) < 100 for x in numbers):
        raise ValueError("no log-odds")
    return numbers
