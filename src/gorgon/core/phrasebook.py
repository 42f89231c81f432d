"""The phrasebook: how likely a token is behind the latest ones, counted on answers that the model wrote before.

Medusa heads guess each later token without seeing the ones between; the phrasebook tells which guesses go together, and
offers the usual continuation itself. Answers of one task repeat their phrases, so a small table says much.
Sources: drafting from a datastore of answers is REST, arXiv:2311.08252. Probabilities are interpolated over the lengths
of a phrase as by Witten and Bell (1991; Chen and Goodman 1998, section 2.5). Using them to calibrate the heads' own
drafts by what precedes them in the tree is ours.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gorgon.errors import ModelError

LONGEST = 4
"""Tokens of the longest phrase that is looked up."""
CONTINUATIONS = 8
"""Continuations kept of a phrase, commonest first."""
SEEN = 2
"""A phrase must have occurred this often."""
MOST_PHRASES = 200_000
"""The commonest are kept."""
BORDERS = (1e-5, 1e-4, 5e-4, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96)
"""Probabilities between the levels."""
LEVELS = len(BORDERS) + 1
"""Levels count from 0."""
COMMON = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03)
"""Shares of all tokens between the frequencies."""
FREQUENCIES = len(COMMON) + 1
"""Frequencies count from 0: tokens that the answers hardly ever had."""
UNSEEN, MORE = 0.5, 1000
"""Every token counts as seen this often more, among this many more."""
KEPT = 100_000
"""Phrases whose levels are remembered at a time."""
Phrase = tuple[int, ...]


@dataclass(frozen=True)
class Following:
    """What followed a phrase: how often anything did, how many different tokens did, and the commonest ones' counts."""

    total: int
    distinct: int
    counts: Mapping[int, int]


class Levels(dict[int, int]):
    """Token -> level behind one phrase; a token's is computed when it is first asked for.

    Attributes: offered: what usually follows the longest known ending of the phrase, commonest first.
    """

    def __init__(self, endings: Sequence[Following], book: Phrasebook) -> None:
        """Args: endings: what followed the known endings of the phrase, shortest first."""
        super().__init__()
        self._endings, self._book = endings, book
        self.offered = tuple(endings[-1].counts) if endings else ()

    def __missing__(self, token: int) -> int:
        share = self._book.share(token)
        for found in self._endings:
            share = (found.counts.get(token, 0) + found.distinct * share) / (found.total + found.distinct)
        level = self[token] = bisect_right(BORDERS, share)
        return level


@dataclass(frozen=True)
class Phrasebook:
    """By phrase what followed it, and how often every token occurred."""

    phrases: Mapping[Phrase, Following] = field(default_factory=dict)
    tokens: Mapping[int, int] = field(default_factory=dict)

    _levels: dict[Phrase, Levels] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def _total(self) -> int:
        return sum(self.tokens.values()) + MORE

    @cached_property
    def _frequencies(self) -> dict[int, int]:
        return {token: bisect_right(COMMON, self.share(token)) for token in self.tokens}

    @staticmethod
    def of(answers: Iterable[Sequence[int]]) -> Phrasebook:
        """Counts every phrase of up to `LONGEST` tokens; answers include their end tokens."""
        following: dict[Phrase, Counter[int]] = {}
        seen = Counter[int]()
        for answer in answers:
            tokens = tuple(answer)
            seen.update(tokens)
            for at in range(1, len(tokens)):
                for size in range(1, min(LONGEST, at) + 1):
                    following.setdefault(tokens[at - size : at], Counter())[tokens[at]] += 1
        often = [(counts.total(), phrase) for phrase, counts in following.items() if counts.total() >= SEEN]
        often.sort(key=lambda pair: (-pair[0], pair[1]))
        phrases = {
            phrase: Following(total, len(following[phrase]), dict(following[phrase].most_common(CONTINUATIONS)))
            for total, phrase in often[:MOST_PHRASES]
        }
        return Phrasebook(phrases, dict(sorted(seen.items())))

    def share(self, token: int) -> float:
        """The token's share of all that was written, in (0, 1)."""
        return (self.tokens.get(token, 0) + UNSEEN) / self._total

    def frequency(self, token: int) -> int:
        """The class of the token's share."""
        return self._frequencies.get(token, 0)

    def levels(self, suffix: Phrase) -> Levels:
        """What is likely behind a text that ends so, by the endings of up to `LONGEST` tokens that are known."""
        ending = suffix[-LONGEST:]
        found = self._levels.get(ending)
        if found is None:
            if len(self._levels) >= KEPT:
                self._levels.clear()
            endings = (self.phrases.get(ending[-size:]) for size in range(1, len(ending) + 1))
            found = self._levels[ending] = Levels([e for e in endings if e is not None], self)
        return found

    def as_json(self) -> dict[str, Any]:
        """The form of phrasebook.json: a phrase "12 7 55" -> [total, distinct, {"8": count}]."""
        return {
            "tokens": {str(t): n for t, n in self.tokens.items()},
            "phrases": {
                " ".join(map(str, p)): [f.total, f.distinct, {str(t): n for t, n in f.counts.items()}]
                for p, f in self.phrases.items()
            },
        }

    @staticmethod
    def of_json(document: Any, vocab_size: int) -> Phrasebook:
        """What `as_json` gave.

        Raises: ModelError when it is malformed, or names a token beyond the vocabulary.
        """
        try:
            phrases = {
                tuple(map(int, phrase.split())): Following(int(total), int(kinds), _counts(counts))
                for phrase, (total, kinds, counts) in document["phrases"].items()
            }
            counted = _counts(document["tokens"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"the phrasebook is malformed: {error}", field="phrases",
                             hint="run `gorgon tune` again") from error  # fmt: skip
        tokens = {*counted, *(t for found in phrases.values() for t in found.counts)}
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
            raise ModelError("a token of the phrasebook is not in the vocabulary", field="phrases", value=max(tokens),
                             allowed=f"0 to {vocab_size - 1}")  # fmt: skip
        for phrase, found in phrases.items():
            kept = 1 <= len(found.counts) <= min(found.distinct, CONTINUATIONS) and 1 <= len(phrase) <= LONGEST
            if not (kept and sum(found.counts.values()) <= found.total):
                raise ModelError("the phrasebook is malformed: no phrase is counted so", field="phrases", value=phrase,
                                 hint="run `gorgon tune` again")  # fmt: skip
        return Phrasebook(phrases, counted)


def _counts(document: Mapping[str, Any]) -> dict[int, int]:
    counts = {int(token): int(count) for token, count in document.items()}
    if counts and min(counts.values()) < 1:
        raise ValueError("a count is below 1")
    return counts
