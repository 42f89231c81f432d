"""How likely the backbone itself found the tokens of an answer, before any option of sampling.

It is computed beside the step, from the hidden states of the accepted nodes, so a request that asks for it costs the
others nothing and compiled steps stay as they are.
Shapes: N nodes, P accepted nodes, H hidden size, V vocabulary, A alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gorgon.core.draft import Draft
from gorgon.decode.step import Decided
from gorgon.models.backbone import Backbone


@dataclass(frozen=True)
class Logprob:
    """One output token.

    Attributes:
        logprob: natural logarithm of the token's probability.
        likeliest: the likeliest tokens at that place and their log-probabilities, best first.
    """

    logprob: float
    likeliest: list[tuple[int, float]]


@torch.inference_mode()
def output_logprobs(
    backbone: Backbone, hidden_NH: Tensor, draft: Draft, decided: Decided, alternatives: int
) -> list[Logprob]:
    """One entry per token that a step decided.

    Args: hidden_NH: the step's hidden states. alternatives: A, how many likeliest tokens to report; 0 is none.
    """
    logprobs_PV = backbone.logits(hidden_NH[draft.path(decided.node)]).float().log_softmax(-1)
    tokens_P1 = torch.tensor(decided.tokens, device=logprobs_PV.device)[:, None]
    top_PA = logprobs_PV.topk(alternatives, dim=-1)
    chosen = logprobs_PV.gather(1, tokens_P1)[:, 0].tolist()
    likeliest = [
        list(zip(*row, strict=True)) for row in zip(top_PA.indices.tolist(), top_PA.values.tolist(), strict=True)
    ]
    return [Logprob(*one) for one in zip(chosen, likeliest, strict=True)]
