"""Token ids to text while they arrive, and stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gorgon.errors import GorgonError


class TextStream:
    """Decodes tokens one by one and finds stop strings, wherever token borders fall.

    Invariant: the text is the same however many tokens arrive at once.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        """Raises: GorgonError for an empty stop string, which would end every answer before it begins."""
        if any(not text for text in stop):
            raise GorgonError("a stop string is empty", field="stop", value=list(stop), hint="remove it")
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._sent = self._anchor = 0
        self._text = ""

    @property
    def text(self) -> str:
        """Everything decoded so far, cut before the stop string if one was found."""
        return cut_at_stop(self._text, self._stop)

    def push(self, token: int) -> bool:
        """Adds a token; True when a stop string is now complete."""
        self._ids.append(token)
        # Decode from an anchor a few tokens back: enough context for spaces and joined characters, and no work that
        # grows with the answer.
        before = self._decode(self._ids[self._anchor : self._sent])
        now = self._decode(self._ids[self._anchor :])
        if not now.endswith("�") and len(now) >= len(before):
            self._text += now[len(before) :]
            self._anchor, self._sent = self._sent, len(self._ids)
        return any(text in self._text for text in self._stop)

    def finish(self) -> str:
        """The whole text, incomplete characters at its end included, cut before the stop string."""
        return cut_at_stop(self._decode(self._ids), self._stop)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string in it."""
    found = [place for s in stop if (place := text.find(s)) >= 0]
    return text[: min(found)] if found else text
