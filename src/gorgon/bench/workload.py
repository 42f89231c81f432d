"""The prompts that every decoder answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gorgon.data.chat import encode_prompt
from gorgon.data.examples import Example, read_examples
from gorgon.errors import LimitError


@dataclass(frozen=True)
class Prompt:
    """One test row as the decoders see it, and as the report shows it."""

    id: str
    question: str
    context: str | None
    reference: str
    token_ids: list[int]


def load_prompts(
    path: Path, tokenizer: Any, *, limit: int | None, seed: int, max_length: int, max_new_tokens: int
) -> list[Prompt]:
    """The rows of a test file as prompts, in the file's order.

    Args:
        limit: keep this many, chosen by `seed`; None keeps all.
        max_length: the model's context, in tokens; prompt and answer together must fit into it.
    Raises: what `read_examples` raises; LimitError naming the first row that does not fit.
    """
    examples = choose(read_examples(path), limit, seed)
    return [_prompt(example, tokenizer, max_length, max_new_tokens) for example in examples]


def choose(examples: Sequence[Example], limit: int | None, seed: int) -> list[Example]:
    """`limit` of the examples, the same ones for the same seed, in their own order; all of them for None."""
    if limit is None or limit >= len(examples):
        return list(examples)
    chosen = sorted(random.Random(seed).sample(range(len(examples)), limit))
    return [examples[i] for i in chosen]


def _prompt(example: Example, tokenizer: Any, max_length: int, max_new_tokens: int) -> Prompt:
    token_ids = encode_prompt(tokenizer, example.messages)
    room = max_length - max_new_tokens
    if len(token_ids) > room:
        raise LimitError(
            f"the prompt of row '{example.id}' and {max_new_tokens} new tokens do not fit into the model's context",
            field="max_new_tokens", value=f"{len(token_ids)} prompt tokens",
            allowed=f"at most {max(room, 0)} prompt tokens (context {max_length})",
            hint="lower max_new_tokens, or prepare with a smaller max_length",
        )  # fmt: skip
    question = next((str(m["content"]) for m in reversed(example.messages) if m["role"] == "user"), "")
    return Prompt(str(example.id), question, example.context, example.answer, token_ids)
