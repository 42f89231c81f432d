"""Calibration texts: what the model writes on held-out prompts, and how well its drafts would have done there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gorgon.core.heads import MedusaHeads
from gorgon.core.rank_stats import Position, token_ranks
from gorgon.decode.drafts import NgramDrafts
from gorgon.decode.engine import Engine
from gorgon.errors import Interrupted
from gorgon.interrupts import requested
from gorgon.models.backbone import Backbone
from gorgon.progress import bar


def write_answers(engine: Engine, prompts: Sequence[list[int]], max_new_tokens: int, title: str) -> list[list[int]]:
    """The greedy answers to the prompts as token ids, end tokens included.

    Raises: Interrupted between two prompts.
    """
    answers = []
    with bar(title, len(prompts)) as progress:
        for prompt_ids in prompts:
            if requested():
                raise Interrupted("stopped before the end", hint="the same command starts this step again")
            answers.append(engine.generate(prompt_ids, max_new_tokens=max_new_tokens).token_ids)
            progress.advance()
    return answers


def positions_of(
    backbone: Backbone, heads: MedusaHeads | None, prompt_ids: list[int], answer_ids: list[int]
) -> list[Position]:
    """One Position for each answer token that can be a step's root: all but the last.

    With root a_i the heads read the hidden state that decided a_i, so head k's true token is a_(i+k+1); the n-gram
    branch reads the context up to a_i.
    """
    last = len(answer_ids) - 1
    ranks = _ranks(backbone, heads, prompt_ids, answer_ids) if heads is not None and last > 0 else [[]] * last
    ngrams = NgramDrafts()
    ngrams.extend(prompt_ids)
    positions = []
    for i in range(last):
        ngrams.extend([answer_ids[i]])
        copy = ngrams.propose(len(answer_ids))
        copied = 0
        while copied < min(len(copy), last - i) and copy[copied] == answer_ids[i + 1 + copied]:
            copied += 1
        positions.append(Position(ranks[i][: last - i], copied, bool(copy)))
    return positions


@torch.inference_mode()
def _ranks(backbone: Backbone, heads: MedusaHeads, prompt_ids: list[int], answer_ids: list[int]) -> list[list[int]]:
    """Per root position the rank of each head's true token; `rank_stats.BEYOND` behind the end of the text."""
    count = len(answer_ids) - 1
    ids_1T = torch.tensor([prompt_ids + answer_ids[:-1]], device=backbone.device)
    first = len(prompt_ids) - 1
    hidden_NH = backbone.hidden(ids_1T)[0, first : first + count]
    by_head = []
    for k in range(len(heads)):
        labels = [answer_ids[i + k + 1] if i + k + 1 <= count else -1 for i in range(count)]
        by_head.append(token_ranks(heads.head(k, hidden_NH), torch.tensor(labels, device=backbone.device)).tolist())
    return [list(ranks) for ranks in zip(*by_head, strict=True)]
