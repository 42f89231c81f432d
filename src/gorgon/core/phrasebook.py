"""The phrasebook: which tokens the model usually writes behind the latest ones, counted on answers it wrote before.

Medusa heads guess each later token without seeing the ones between; the phrasebook tells which guesses go together, and
offers the usual continuation itself. Answers of one task repeat their phrases, so a small table says much.
Source: drafting from a datastore of answers is REST, arXiv:2311.08252; using it to calibrate the heads' own drafts by
what precedes them in the tree is ours.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gorgon.errors import ModelError

LONGEST = 4
"""Tokens of the longest phrase that is looked up."""
CONTINUATIONS = 4
"""Continuations kept of a phrase, commonest first."""
SEEN = 3
"""A phrase must have occurred this often."""
MOST_PHRASES = 100_000
"""The commonest are kept: 10 MB of memory at most, and a file of a few."""
BORDERS = (0.02, 0.08, 0.2, 0.4, 0.6, 0.8, 0.93)
"""Shares between the levels."""
UNKNOWN, ANOTHER = 0, 1
"""Levels of a token: nothing is known of what precedes it; other tokens are usual there. Higher ones are by share."""
LEVELS = len(BORDERS) + 3
Phrase = tuple[int, ...]


@dataclass(frozen=True)
class Phrasebook:
    """By phrase, its usual continuations and the level of each."""

    phrases: Mapping[Phrase, Mapping[int, int]] = field(default_factory=dict)

    @staticmethod
    def of(answers: Iterable[Sequence[int]]) -> Phrasebook:
        """Counts every phrase of up to `LONGEST` tokens; answers include their end tokens."""
        following: dict[Phrase, Counter[int]] = {}
        for answer in answers:
            tokens = tuple(answer)
            for at in range(1, len(tokens)):
                for size in range(1, min(LONGEST, at) + 1):
                    following.setdefault(tokens[at - size : at], Counter())[tokens[at]] += 1
        often = [(counts.total(), phrase) for phrase, counts in following.items() if counts.total() >= SEEN]
        often.sort(key=lambda pair: (-pair[0], pair[1]))
        phrases = {}
        for total, phrase in often[:MOST_PHRASES]:
            common = following[phrase].most_common(CONTINUATIONS)
            phrases[phrase] = {t: 2 + bisect_right(BORDERS, n / (total + 1)) for t, n in common if n > 1}
        return Phrasebook(phrases)

    def usual(self, suffix: Phrase) -> Mapping[int, int] | None:
        """Token -> level of what usually follows the longest known ending of `suffix`; None when no ending is known."""
        for size in range(min(LONGEST, len(suffix)), 0, -1):
            found = self.phrases.get(suffix[-size:])
            if found is not None:
                return found
        return None

    def as_json(self) -> dict[str, Any]:
        """The form of phrasebook.json: "12 7 55" -> {"8": 4}."""
        return {" ".join(map(str, p)): {str(t): level for t, level in c.items()} for p, c in self.phrases.items()}

    @staticmethod
    def of_json(document: Any, vocab_size: int) -> Phrasebook:
        """What `as_json` gave.

        Raises: ModelError when it is malformed, or names a token beyond the vocabulary.
        """
        try:
            phrases = {
                tuple(map(int, phrase.split())): {int(t): int(level) for t, level in found.items()}
                for phrase, found in document.items()
            }
        except (AttributeError, TypeError, ValueError) as error:
            raise ModelError(f"the phrasebook is malformed: {error}", field="phrases",
                             hint="run `gorgon tune` again") from error  # fmt: skip
        tokens = {t for found in phrases.values() for t in found}
        levels = {level for found in phrases.values() for level in found.values()}
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
            raise ModelError("a token of the phrasebook is not in the vocabulary", field="phrases", value=max(tokens),
                             allowed=f"0 to {vocab_size - 1}")  # fmt: skip
        if levels and not ANOTHER < min(levels) <= max(levels) < LEVELS:
            raise ModelError("a level of the phrasebook does not exist", field="phrases", value=max(levels),
                             allowed=f"{ANOTHER + 1} to {LEVELS - 1}")  # fmt: skip
        return Phrasebook(phrases)
