"""Calibration texts: what the model writes on held-out prompts, and what heads and context said at every place.

Greedy output does not depend on the drafts, so a recorded text says what any drafter would have had accepted, without
running the model again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gorgon.core.acceptance import LONGEST_MATCH, AcceptanceCounts
from gorgon.core.draft import Draft
from gorgon.core.heads import MedusaHeads
from gorgon.core.loss import head_labels, label_ranks
from gorgon.core.phrasebook import Phrasebook
from gorgon.core.rank_stats import Position
from gorgon.decode.drafts import Drafter
from gorgon.decode.dynamic import candidates, listed
from gorgon.decode.engine import Engine
from gorgon.decode.ngrams import NgramIndex
from gorgon.decode.step import HeadChoices
from gorgon.errors import Interrupted
from gorgon.interrupts import requested
from gorgon.progress import bar

BEYOND = 3
"""Depths beyond the last head whose candidates are counted."""


@dataclass(frozen=True)
class Recording:
    """A prompt, the model's answer, and per answer token that can be a step's root: its ranks and the heads' choices.

    With root a_i the heads read the hidden state that decided a_i, so head k's true token is a_(i+k+1).
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    positions: list[Position]
    choices: list[HeadChoices | None]


@dataclass(frozen=True)
class Replayed:
    """A simulated decoding.

    Attributes:
        tokens: tokens emitted, the first of each answer not counted.
        nodes: how many steps verified a draft of how many nodes.
        draft_s: seconds spent in the drafter.
    """

    tokens: int
    nodes: dict[int, int]
    draft_s: float

    @property
    def steps(self) -> int:
        """All steps."""
        return sum(self.nodes.values())

    @property
    def tokens_per_step(self) -> float:
        """Tokens emitted per step, the backbone's own included."""
        return self.tokens / self.steps if self.steps else 1.0

    @property
    def mean_nodes(self) -> float:
        """Mean size of a draft."""
        return sum(n * count for n, count in self.nodes.items()) / self.steps if self.steps else 1.0


def write_answers(
    engine: Engine, prompts: Sequence[list[int]], max_new_tokens: int, together: int, title: str
) -> list[list[int]]:
    """The greedy answers to the prompts as token ids, end tokens included; `together` are decoded in one step.

    Raises: Interrupted between two batches.
    """
    answers: list[list[int]] = []
    with bar(title, len(prompts)) as progress:
        for start in range(0, len(prompts), 4 * together):
            if requested():
                raise Interrupted("stopped before the end", hint="the same command starts this step again")
            part = prompts[start : start + 4 * together]
            made = engine.generate(part, max_new_tokens=max_new_tokens, together=together)
            answers += [g.token_ids for g in made]
            progress.advance(len(part))
    return answers


def record(engine: Engine, prompt_ids: list[int], answer_ids: list[int], width: int) -> Recording:
    """Ranks, copied tokens and the heads' first `width` choices at every answer token but the last."""
    last = len(answer_ids) - 1
    ranks: list[list[int]] = [[]] * last
    choices: list[HeadChoices | None] = [None] * last
    if engine.heads is not None and last > 0:
        ranks, choices = _read_heads(engine, engine.heads, prompt_ids, answer_ids, width)
    context = NgramIndex(prompt_ids)
    positions = []
    for i in range(last):
        context.extend([answer_ids[i]])
        copy = context.propose(len(answer_ids))
        copied = 0
        while copied < min(len(copy), last - i) and copy[copied] == answer_ids[i + 1 + copied]:
            copied += 1
        positions.append(Position(ranks[i], copied, bool(copy)))
    return Recording(prompt_ids, answer_ids, positions, choices)


@torch.inference_mode()
def _read_heads(
    engine: Engine, heads: MedusaHeads, prompt_ids: list[int], answer_ids: list[int], width: int
) -> tuple[list[list[int]], list[HeadChoices | None]]:
    """Per root position the ranks of the true tokens among those that may be drafted, and the first choices."""
    backbone, vocabulary_U = engine.backbone, engine.vocabulary_U
    tokens_T = torch.tensor(prompt_ids + answer_ids, device=backbone.device)
    first, end = len(prompt_ids) - 1, len(prompt_ids) + len(answer_ids)
    hidden_NH = backbone.hidden(tokens_T[None, :-2])[0, first:]  # the last two states have no token to be ranked
    positions_N = torch.arange(first, end - 2, device=backbone.device)
    labels_KN = head_labels(tokens_T, positions_N, torch.full_like(positions_N, end), len(heads))
    ranks, tokens, logprobs = [], [], []
    for k in range(len(heads)):
        logits_NV = heads.head(k, hidden_NH)
        ranks.append(label_ranks(logits_NV, labels_KN[k], vocabulary_U).tolist())
        drafted_NU = logits_NV if vocabulary_U is None else logits_NV[:, vocabulary_U]
        top_NR = drafted_NU.float().log_softmax(-1).topk(min(width, drafted_NU.shape[1]), dim=-1)
        found_NR = top_NR.indices if vocabulary_U is None else vocabulary_U[top_NR.indices]
        tokens.append(found_NR.tolist())
        logprobs.append(top_NR.values.tolist())
    left = len(positions_N)
    by_position = [list(row[: left - i]) for i, row in enumerate(zip(*ranks, strict=True))]
    choices: list[HeadChoices | None] = [
        HeadChoices.of([t[i] for t in tokens], [p[i] for p in logprobs]) for i in range(left)
    ]
    return by_position, choices


def count_acceptance(
    recordings: Sequence[Recording], heads: int, width: int, phrasebook: Phrasebook
) -> AcceptanceCounts:
    """Counts every candidate that a dynamic tree of the first `heads` heads could have had at a right node."""
    counts = AcceptanceCounts(heads)
    for recording in recordings:
        context = NgramIndex(recording.prompt_ids)
        answer = recording.answer_ids
        for i, choices in enumerate(recording.choices):
            context.extend([answer[i]])
            suffix, by_depth = context.tail(), listed(choices, heads, width)
            for depth in range(min(heads + BEYOND, len(answer) - 1 - i)):
                true = answer[i + 1 + depth]
                for clues in candidates(by_depth, depth, suffix, context, phrasebook):
                    counts.add((min(depth, heads), clues), clues[0] == true)
                suffix = (*suffix[1 - LONGEST_MATCH :], true)
    return counts


def accepted_depth(draft: Draft, following: Sequence[int]) -> int:
    """Depth of the deepest node that agrees with the text that follows the root."""
    tokens, parents, depths = draft.tokens, draft.parents, draft.depths
    right = [True] * draft.nodes
    best = 0
    for node in range(1, draft.nodes):
        depth = depths[node]
        right[node] = right[parents[node]] and depth <= len(following) and tokens[node] == following[depth - 1]
        if right[node] and depth > best:
            best = depth
    return best


def replay_drafter(recordings: Sequence[Recording], drafter: Drafter) -> Replayed:
    """Decodes recorded texts again with a drafter, without running the model."""
    tokens, nodes, spent = 0, dict[int, int](), 0.0
    for recording in recordings:
        answer, at = recording.answer_ids, 0
        context = NgramIndex([*recording.prompt_ids, answer[0]])
        while at < len(answer) - 1:
            start = time.perf_counter()
            draft = drafter.draft(answer[at], recording.choices[at], context)
            spent += time.perf_counter() - start
            nodes[draft.nodes] = nodes.get(draft.nodes, 0) + 1
            advance = min(1 + accepted_depth(draft, answer[at + 1 :]), len(answer) - 1 - at)
            context.extend(answer[at + 1 : at + 1 + advance])
            tokens, at = tokens + advance, at + advance
    return Replayed(tokens, nodes, spent)
