"""A request and the answer that grows for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from gorgon.core.sampling import GREEDY, Sampling
from gorgon.decode.grammar import Grammar
from gorgon.decode.logprobs import Logprob
from gorgon.errors import GorgonError, LimitError, SamplingError

Finish = Literal["end", "length", "stop"]


@dataclass(frozen=True)
class Request:
    """What is asked: a prompt, limits, and how tokens are chosen.

    Attributes:
        prompt_ids: at least one token, fewer than the context holds.
        max_new_tokens: at least 1. An answer also ends where the context ends.
        stop: strings that end the answer; the tokens up to the one that completes the string are kept.
        sampling: greedy unless given.
        ignore_end: go on after an end token, for measurements.
        logprobs: how many likeliest tokens to report beside every output token's log-probability; None reports nothing.
        grammar: what the answer must fit, at its beginning; each answer follows a copy.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int
    stop: Sequence[str] = ()
    sampling: Sampling = GREEDY
    ignore_end: bool = False
    logprobs: int | None = None
    grammar: Grammar | None = None

    def limit(self, context: int, vocab_size: int) -> int:
        """Tokens that the answer may have in a context of this length.

        Raises: GorgonError for an empty prompt, a token beyond the vocabulary, a limit below 1, or an option that
            contradicts the grammar; LimitError for a prompt that fills the context.
        """
        self._check_grammar()
        if not self.prompt_ids:
            raise GorgonError("the prompt is empty", field="prompt", hint="give at least one token")
        if self.max_new_tokens < 1:
            raise GorgonError("the token limit is too small", field="max_new_tokens", value=self.max_new_tokens,
                              allowed="at least 1")  # fmt: skip
        if not 0 <= min(self.prompt_ids) <= max(self.prompt_ids) < vocab_size:
            raise GorgonError("a prompt token is not in the vocabulary", field="prompt",
                              value=max(self.prompt_ids), allowed=f"0 to {vocab_size - 1}")  # fmt: skip
        room = context - len(self.prompt_ids)
        if room < 1:
            raise LimitError(
                "the prompt does not fit the model's context", field="prompt",
                value=f"{len(self.prompt_ids)} tokens", allowed=f"at most {context - 1}",
                hint="shorten the prompt, or use a model with a longer context",
            )  # fmt: skip
        return min(self.max_new_tokens, room)

    def _check_grammar(self) -> None:
        if self.grammar is not None and self.ignore_end:
            raise GorgonError("an answer that fits a grammar ends with it", field="ignore_eos", value=True,
                              allowed="false with a grammar")  # fmt: skip
        if self.grammar is not None and self.sampling.acceptance == "typical":
            raise SamplingError("typical acceptance does not know grammars", field="acceptance", value="typical",
                                allowed="exact with a grammar")  # fmt: skip


@dataclass
class Generation:
    """An answer and how it came about.

    Attributes:
        token_ids: the answer, its end token included if it was reached.
        text: the answer without end token and stop string, once it is finished.
        finish: 'end' (end token), 'stop' (stop string) or 'length' (token limit or end of the context).
        step_tokens: tokens emitted by each step. The prefill, which decides the first token, is not a step.
        step_nodes: each step's deepest accepted node, 0 when no draft was right.
        logprobs: one per token if the request asks for them.
        reused_tokens: tokens of the prompt whose cache rows an earlier request had left.
        first_token_s, seconds: wall time to the first token and to the last, in seconds.
        done: whether the answer is complete.
    """

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: Finish = "length"
    step_tokens: list[int] = field(default_factory=list)
    step_nodes: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    reused_tokens: int = 0
    first_token_s: float = 0.0
    seconds: float = 0.0
    done: bool = False

    @property
    def tokens_per_step(self) -> float:
        """Tokens emitted per step, the backbone's own included: 1.0 is plain decoding."""
        return sum(self.step_tokens) / len(self.step_tokens) if self.step_tokens else 1.0
