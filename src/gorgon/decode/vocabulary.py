"""The draft vocabulary: the tokens that answers consist of, on which alone the heads project."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from gorgon.data.examples import read_examples
from gorgon.decode.engine import Engine

COUNTED_ROWS = 20_000
"""Training answers whose tokens are counted."""
MOST_OF = 0.75
"""A draft vocabulary above this share of the whole one saves too little to be worth a table."""


def count_tokens(engine: Engine, rows: Path, answers: Sequence[list[int]]) -> Counter[int]:
    """How often each token occurs in reference answers of the training split, and in answers the model wrote."""
    counts = Counter(token for answer in answers for token in answer)
    tokenizer = engine.backbone.tokenizer
    if rows.is_file():
        texts = [example.answer for example in read_examples(rows)[:COUNTED_ROWS]]
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []:
            counts.update(ids)
    return counts


def draft_vocabulary(counts: Counter[int], coverage: float, size: int) -> list[int] | None:
    """The fewest tokens that make up `coverage` of all occurrences, in order of id; None when they are most of `size`.

    Source: frequency-ranked draft vocabularies, FR-Spec, arXiv:2502.14856. Lossless, because the backbone verifies
    over its whole vocabulary: a token outside is never drafted, and costs a step where it occurs.
    """
    wanted, taken, chosen = coverage * counts.total(), 0, []
    for token, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if taken >= wanted:
            break
        taken += count
        chosen.append(token)
    return None if coverage >= 1 or len(chosen) > MOST_OF * size else sorted(chosen)
