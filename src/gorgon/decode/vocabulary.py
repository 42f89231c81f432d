"""The draft vocabulary: the tokens that answers consist of, on which alone the heads project."""

from __future__ import annotations

from collections import Counter

MOST_OF = 0.75
"""A draft vocabulary above this share of the whole one saves too little to be worth a table."""


def draft_vocabulary(counts: Counter[int], coverage: float, size: int) -> list[int] | None:
    """The fewest tokens that make up `coverage` of all occurrences, in order of id; None when they are most of `size`.

    Source: frequency-ranked draft vocabularies, FR-Spec, arXiv:2502.14856. Lossless, because the backbone verifies
    over its whole vocabulary: a token outside is not drafted by a head, and may cost a step where it occurs.
    """
    wanted, taken, chosen = coverage * counts.total(), 0, []
    for token, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if taken >= wanted:
            break
        taken += count
        chosen.append(token)
    return None if coverage >= 1 or len(chosen) > MOST_OF * size else sorted(chosen)
