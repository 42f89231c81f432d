"""Which tokens the places of a cache hold rows of, so that a prompt that begins alike need not be read again.

Text-to-SQL asks many questions about one schema. A finished request's rows stay where they are until another request
needs the place, so looking for a common beginning among them costs no memory.
"""

from __future__ import annotations

from collections.abc import Sequence


class Prefixes:
    """The tokens behind the leading rows of every place of a cache; a lookup compares with each place once."""

    def __init__(self, places: int) -> None:
        self._held: list[list[int]] = [[] for _ in range(places)]

    def hold(self, place: int, tokens: Sequence[int]) -> None:
        """From now on the place's first rows are those of `tokens`."""
        self._held[place] = list(tokens)

    def move(self, origin: int, target: int) -> None:
        """The rows of `origin` were copied to `target`; both hold them."""
        self._held[target] = self._held[origin]

    def find(self, tokens: Sequence[int]) -> tuple[int, int]:
        """The place that shares the longest beginning with `tokens`, the first of equals, and its length."""
        wanted = list(tokens)
        best, length = 0, 0
        for place, held in enumerate(self._held):
            shared = common_length(wanted, held)
            if shared > length:
                best, length = place, shared
        return best, length


def common_length(a: list[int], b: list[int]) -> int:
    """How many leading tokens two lists share."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices compare much faster than a loop over tokens
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
