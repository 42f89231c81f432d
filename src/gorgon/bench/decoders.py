"""What is compared, behind one small protocol: give it a prompt, get a finished answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from gorgon.decode.text import cut_at_stop

if TYPE_CHECKING:  # a report is made of answers, without what made them
    from gorgon.decode.engine import Engine
    from gorgon.models.backbone import Backbone

PLAIN = "plain"
MEDUSA = "medusa"
TRANSFORMERS = "transformers"


@dataclass(frozen=True)
class Answer:
    """One finished answer.

    `token_ids` holds the end token if it was reached, `text` does not. `first_token_s` counts from the call.
    `step_tokens` and `step_nodes` are as in `decode.engine.Generation`: empty for decoders without steps.
    """

    token_ids: list[int]
    text: str
    first_token_s: float
    step_tokens: list[int] = field(default_factory=list)
    step_nodes: list[int] = field(default_factory=list)


class Decoder(Protocol):
    """Answers prompts, greedily, one at a time."""

    name: str

    def answer(self, prompt_ids: list[int], max_new_tokens: int, stop: Sequence[str]) -> Answer:
        """The whole answer; the caller times the call."""
        ...


class EngineDecoder:
    """Our engine with one tree."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.name, self._engine = name, engine

    def answer(self, prompt_ids: list[int], max_new_tokens: int, stop: Sequence[str]) -> Answer:
        """The engine's greedy answer."""
        made = self._engine.answer(prompt_ids, max_new_tokens=max_new_tokens, stop=stop)
        return Answer(
            list(made.token_ids), made.text, made.first_token_s, list(made.step_tokens), list(made.step_nodes)
        )


class _FirstToken:
    """A streamer that only notes when the first new token arrives; `generate` first puts the prompt itself."""

    def __init__(self) -> None:
        self._puts, self.at = 0, 0.0

    def put(self, _value: object) -> None:
        """Called with the prompt, then with each token."""
        self._puts += 1
        if self._puts == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        """Called once at the end; nothing is buffered here."""


class TransformersDecoder:
    """`transformers.generate`, greedy, with its own defaults: what a user has without Gorgon."""

    name = TRANSFORMERS

    def __init__(self, backbone: Backbone) -> None:
        from transformers import GenerationConfig

        self._backbone = backbone
        tokenizer = backbone.tokenizer
        pad = tokenizer.pad_token_id
        # A fresh configuration: the checkpoint's own may sample, penalise repetition or limit the length.
        self._settings: dict[str, Any] = {
            "do_sample": False,
            "num_beams": 1,
            "use_cache": True,
            "eos_token_id": sorted(backbone.end_ids),
            "pad_token_id": min(backbone.end_ids) if pad is None else pad,
        }
        backbone.model.generation_config = GenerationConfig(**self._settings)

    def answer(self, prompt_ids: list[int], max_new_tokens: int, stop: Sequence[str]) -> Answer:
        """Tensor in, `generate`, text out: the same work that our engine does within one call."""
        import torch

        start = time.perf_counter()
        backbone, streamer = self._backbone, _FirstToken()
        ids = torch.tensor([prompt_ids], device=backbone.device)
        extra = {"stop_strings": list(stop), "tokenizer": backbone.tokenizer} if stop else {}
        made = backbone.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            **extra,
        )
        token_ids: list[int] = made[0, len(prompt_ids) :].tolist()
        ended = bool(token_ids) and token_ids[-1] in backbone.end_ids
        text = backbone.tokenizer.decode(token_ids[:-1] if ended else token_ids, skip_special_tokens=True)
        return Answer(token_ids, cut_at_stop(text, stop), streamer.at - start)


def top_margin(backbone: Backbone, token_ids: list[int]) -> float:
    """Logit of the most likely next token minus that of the second: how close the backbone was to a tie.

    Args: token_ids: the prompt and the answer up to the place in question.
    """
    import torch

    with torch.inference_mode():
        hidden = backbone.hidden(torch.tensor([token_ids], device=backbone.device))
        top = backbone.lm_head(hidden[0, -1]).float().topk(2).values
    return float(top[0] - top[1])
