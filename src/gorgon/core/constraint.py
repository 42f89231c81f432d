"""What may come next in one answer, for grammars: the border between acceptance and the library that knows the grammar.

Shapes: V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Constraint(Protocol):
    """Allows some tokens at each place of one answer, and follows the answer token by token.

    Acceptance asks it along the path that it walks and nowhere else. Every token chosen there is output, so a
    constraint only ever goes forwards, and the answer is that of plain constrained decoding, whatever was drafted.
    """

    def mask(self, logits_V: Tensor) -> Tensor:
        """The logits [V], minus infinity where a token is not allowed now. The argument stays as it is."""
        ...

    def advance(self, token: int) -> None:
        """Follows the answer by one token, which `mask` has allowed."""
        ...
