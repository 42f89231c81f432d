"""Continuations copied from the context: what followed when the latest tokens last occurred.

Text-to-SQL copies table and column names, so the context often says what comes next (prompt lookup decoding).
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_SUFFIX = 4
"""Suffixes of this many tokens down to one are looked up; longer ones hardly ever decide (docs/lab-notes.md)."""


class NgramIndex:
    """Where every n-gram of a growing context last occurred. Constant time per appended token and per lookup."""

    def __init__(self, tokens: Sequence[int] = (), longest: int = LONGEST_SUFFIX) -> None:
        self.longest = longest
        self.tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends decided tokens to the context."""
        for token in tokens:
            end = len(self.tokens)
            for size in range(1, min(self.longest, end) + 1):
                self._after[tuple(self.tokens[end - size : end])] = end
            self.tokens.append(token)

    def tail(self) -> tuple[int, ...]:
        """The latest tokens, as many as a suffix may have."""
        return tuple(self.tokens[-self.longest :])

    def find(self, suffix: tuple[int, ...]) -> tuple[int, int]:
        """Where the longest ending of `suffix` last went on: (place in the context, tokens matched); (0, 0) if nowhere.

        `suffix` may end with drafted tokens that are not part of the context.
        """
        for size in range(min(self.longest, len(suffix)), 0, -1):
            place = self._after.get(suffix[-size:])
            if place is not None:
                return place, size
        return 0, 0

    def propose(self, length: int) -> list[int]:
        """Up to `length` tokens that followed the longest matching suffix; [] when even the last token is new."""
        place, size = self.find(self.tail())
        return self.tokens[place : place + length] if size else []
