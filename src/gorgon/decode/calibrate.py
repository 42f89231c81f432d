"""Calibration texts: what the model writes on held-out prompts, and how well its drafts would have done there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gorgon.core.heads import MedusaHeads
from gorgon.core.loss import head_labels, label_ranks
from gorgon.core.rank_stats import Position
from gorgon.decode.drafts import NgramDrafts
from gorgon.decode.engine import Engine
from gorgon.errors import Interrupted
from gorgon.interrupts import requested
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


def positions_of(engine: Engine, prompt_ids: list[int], answer_ids: list[int]) -> list[Position]:
    """One Position for each answer token that can be a step's root: all but the last.

    With root a_i the heads read the hidden state that decided a_i, so head k's true token is a_(i+k+1); the n-gram
    branch reads the context up to a_i.
    """
    last = len(answer_ids) - 1
    ranks = _ranks(engine, engine.heads, prompt_ids, answer_ids) if engine.heads and last > 0 else [[]] * last
    ngrams = NgramDrafts()
    ngrams.extend(prompt_ids)
    positions = []
    for i in range(last):
        ngrams.extend([answer_ids[i]])
        copy = ngrams.propose(len(answer_ids))
        copied = 0
        while copied < min(len(copy), last - i) and copy[copied] == answer_ids[i + 1 + copied]:
            copied += 1
        positions.append(Position(ranks[i], copied, bool(copy)))
    return positions


@torch.inference_mode()
def _ranks(engine: Engine, heads: MedusaHeads, prompt_ids: list[int], answer_ids: list[int]) -> list[list[int]]:
    """Per root position the ranks of the true tokens among those that may be drafted, as far as the text goes."""
    backbone, vocabulary_U = engine.backbone, engine.vocabulary_U
    tokens_T = torch.tensor(prompt_ids + answer_ids, device=backbone.device)
    first, end = len(prompt_ids) - 1, len(prompt_ids) + len(answer_ids)
    hidden_NH = backbone.hidden(tokens_T[None, :-2])[0, first:]  # the last two states have no token to be ranked
    positions_N = torch.arange(first, end - 2, device=backbone.device)
    labels_KN = head_labels(tokens_T, positions_N, torch.full_like(positions_N, end), len(heads))
    by_head = []
    for k in range(len(heads)):
        ranks_N = label_ranks(heads.head(k, hidden_NH), labels_KN[k], vocabulary_U)
        by_head.append(ranks_N.tolist())
    left = len(positions_N)
    return [list(ranks[: left - i]) for i, ranks in enumerate(zip(*by_head, strict=True))]
