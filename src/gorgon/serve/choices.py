"""From a job's events to text as it may be sent: no broken characters, nothing that a stop string may yet take back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gorgon.decode.logprobs import Logprob
from gorgon.decode.request import Generation
from gorgon.decode.text import TextStream
from gorgon.serve.jobs import End, Event, Job


@dataclass(frozen=True)
class Delta:
    """What an event adds to the answer.

    Attributes:
        text: new text, often of several tokens.
        tokens: the new tokens with their log-probabilities, without the end token; empty unless asked for.
        finish: OpenAI's word for how the answer ended: 'stop' or 'length'; None while it goes on.
    """

    text: str
    tokens: list[tuple[int, Logprob]]
    finish: str | None = None


class Choice:
    """One answer as it grows.

    Invariant: the texts of all deltas together are `generation.text`.
    """

    def __init__(self, tokenizer: Any, end_ids: frozenset[int], job: Job) -> None:
        self._stop = job.request.stop
        self._stream = TextStream(tokenizer, self._stop)
        self._end_ids = frozenset() if job.request.ignore_end else end_ids
        self._sent = 0
        self.generation: Generation | None = None

    def take(self, event: Event) -> Delta:
        """The next event's part of the answer.

        Raises: the error that ended the job.
        """
        if isinstance(event, End):
            if event.error is not None:
                raise event.error
            self.generation = event.generation
            rest = event.generation.text[self._sent :]
            self._sent = len(event.generation.text)
            return Delta(rest, [], "length" if event.generation.finish == "length" else "stop")
        kept = [token for token in event.ids if token not in self._end_ids]
        for token in kept:
            self._stream.push(token)
        text = self._stream.text
        ready = len(text) - possible_stop(text, self._stop)
        delta = text[self._sent : ready]
        self._sent = max(self._sent, ready)
        return Delta(delta, list(zip(kept, event.logprobs, strict=False)))


def possible_stop(text: str, stop: Sequence[str]) -> int:
    """Characters at the end of the text that may be the beginning of a stop string."""
    longest = 0
    for one in stop:
        for size in range(min(len(one) - 1, len(text)), longest, -1):
            if text.endswith(one[:size]):
                longest = size
                break
    return longest


def token_text(tokenizer: Any, token: int) -> str:
    """A token on its own; an incomplete character is U+FFFD."""
    text: str = tokenizer.decode([token], skip_special_tokens=False)
    return text
