"""Continuations copied from the context: what followed when the latest tokens occurred before.

Text-to-SQL copies table and column names, so the context often says what comes next (prompt lookup decoding).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from gorgon.core.acceptance import LONGEST_MATCH, OFFERS


class NgramIndex:
    """Where the n-grams of a growing context occurred. Constant time per appended token and per lookup.

    Attributes: tokens: the context, as 32-bit integers that compiled code can read.
    """

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens = array("i")
        self._present = set[int]()
        # By n-gram the places after it whose tokens differ, latest first, and of each token the latest.
        self._after: dict[tuple[int, ...], list[int]] = {}
        self._indexed = 0
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends decided tokens to the context. They are indexed when something is first looked up."""
        self.tokens.extend(tokens)

    def _index(self) -> None:
        context, after = self.tokens, self._after
        for end in range(self._indexed, len(context)):
            token = context[end]
            for size in range(1, min(LONGEST_MATCH, end) + 1):
                ngram = tuple(context[end - size : end])
                places = after.get(ngram)
                if places is None:
                    after[ngram] = [end]
                else:
                    others = [place for place in places if context[place] != token]
                    after[ngram] = [end, *others[: OFFERS - 1]]
            self._present.add(token)
        self._indexed = len(context)

    @property
    def present(self) -> set[int]:
        """The context's tokens as a set."""
        self._index()
        return self._present

    def tail(self) -> tuple[int, ...]:
        """The latest tokens, as many as a match may have."""
        return tuple(self.tokens[-LONGEST_MATCH:])

    def offers(self, suffix: tuple[int, ...]) -> tuple[int, dict[int, tuple[int, int]]]:
        """What followed the endings of `suffix`, which may end with drafted tokens that are not part of the context.

        Returns: tokens of the longest ending that occurred, 0 if none did; and by token the longest ending that it
            followed, and its place, from 0, among the latest `OFFERS` different tokens that did.
        """
        self._index()
        longest, found = 0, dict[int, tuple[int, int]]()
        for size in range(min(LONGEST_MATCH, len(suffix)), 0, -1):
            places = self._after.get(suffix[-size:])
            if places is not None:
                longest = longest or size
                for rank, place in enumerate(places):
                    found.setdefault(self.tokens[place], (size, rank))
        return longest, found

    def propose(self, length: int) -> list[int]:
        """Up to `length` tokens that last followed the longest ending that occurred; [] when the last token is new."""
        self._index()
        tail = self.tail()
        for size in range(len(tail), 0, -1):
            places = self._after.get(tail[-size:])
            if places is not None:
                return self.tokens[places[0] : places[0] + length].tolist()
        return []
