"""Grammars: which tokens an answer may go on with, so that it fits a JSON Schema or a regular expression.

The grammars themselves are llguidance's (https://github.com/guidance-ai/llguidance); nothing else imports it.
Shapes: V vocabulary.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gorgon.errors import GrammarError, MissingDependencyError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

WHITESPACE = r" |\n[ \t]{0,32}"
"""Between JSON's tokens: a space, or a new line and its indentation. JSON allows any amount, and models that were not
trained on JSON fill their answer with it."""
OPTIONS_KEY = "x-guidance"
"""Where the library reads options out of a schema, such as one that ignores keywords."""


class Grammar:
    """The state of one answer within its grammar; a `core.constraint.Constraint`.

    The end token is allowed where the answer is complete, and nothing else where it cannot go on.
    """

    def __init__(self, matcher: LLMatcher, end_ids: frozenset[int], *, ended: bool = False) -> None:
        self._matcher, self._end_ids, self._ended = matcher, end_ids, ended

    def copy(self) -> Grammar:
        """The same state, to be advanced on its own."""
        return Grammar(self._matcher.deep_copy(), self._end_ids, ended=self._ended)

    def mask(self, logits_V: Tensor) -> Tensor:
        """As the protocol says; after the end token anything goes, because nothing of it becomes output.

        Raises: GrammarError when the grammar has grown beyond the library's limits.
        """
        if self._ended:
            return logits_V
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8).to(logits_V.device)
        self._check()
        places_8 = torch.arange(8, dtype=torch.uint8, device=logits_V.device)
        allowed_V = (bits[:, None] >> places_8).bitwise_and(1).flatten()[: len(logits_V)].bool()
        return logits_V.masked_fill(~allowed_V, float("-inf"))

    def advance(self, token: int) -> None:
        """As the protocol says.

        Raises: GrammarError for a token that is not allowed.
        """
        if not self._ended:
            self._matcher.consume_token(token)
            self._check()
            self._ended = token in self._end_ids

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the answer cannot be held to its grammar: {_reason(self._matcher.get_error())}")


class Grammars:
    """Makes grammars for one model's tokens. May be used by several threads."""

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: frozenset[int]) -> None:
        self._tokenizer, self._vocab_size, self._end_ids = tokenizer, vocab_size, end_ids
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Reads the tokenizer, which takes a second where the vocabulary is large; otherwise the first grammar does.

        Raises: GrammarError when the library cannot read it; MissingDependencyError without the library.
        """
        with self._lock:
            _ = self._tokens

    def json(self, schema: Mapping[str, Any] | None = None, *, field: str) -> Grammar:
        """JSON that fits the schema; any JSON object without one. Objects have their properties in the schema's order.

        Args: field: what an error names.
        Raises: GrammarError with the library's reason when it cannot express the schema, or no text fits.
        """
        schema = {"type": "object"} if schema is None else schema
        if OPTIONS_KEY in schema:
            raise GrammarError("the schema holds options of a library", field=f"{field}.{OPTIONS_KEY}")
        try:
            text = _library().grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_pattern": WHITESPACE})
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"the schema is not supported: {_reason(str(error))}", field=field) from error
        return self._checked(text, "schema", field)

    def regex(self, pattern: str, *, field: str) -> Grammar:
        """Text that matches the pattern as a whole.

        Raises: GrammarError with the library's reason when it cannot express the pattern.
        """
        try:
            text = _library().grammar_from_regex(pattern)
        except ValueError as error:  # half of a surrogate pair
            raise GrammarError(f"the pattern is not supported: {_reason(str(error))}", field=field) from error
        return self._checked(text, "pattern", field)

    def _checked(self, text: str, what: str, field: str) -> Grammar:
        self.prepare()
        wrong, reasons = _library().validate_grammar_with_warnings(text, self._tokens)
        if wrong or reasons:  # a warning says that something is left out of account
            raise GrammarError(f"the {what} is not supported: {_reason(reasons[0])}", field=field)
        matcher = _library()(self._tokens, text, log_level=0)
        matcher.compute_bitmask()
        if matcher.is_error():
            raise GrammarError(f"no text fits the {what}: {_reason(matcher.get_error())}", field=field)
        return Grammar(matcher, self._end_ids)

    @cached_property
    def _tokens(self) -> LLTokenizer:
        _library()
        from llguidance import LLTokenizer

        try:
            text = self._tokenizer.backend_tokenizer.to_str()
            size = max(self._vocab_size, len(self._tokenizer))
            return LLTokenizer(text, n_vocab=size, eos_token=sorted(self._end_ids))
        except (AttributeError, ValueError, TypeError) as error:
            raise GrammarError(f"grammars cannot read this model's tokenizer: {_reason(str(error))}") from error


def _library() -> type[LLMatcher]:
    try:
        from llguidance import LLMatcher
    except ModuleNotFoundError as error:
        raise MissingDependencyError("grammars need llguidance", field="llguidance",
                                     hint="pip install 'gorgon-llm[serve]'") from error  # fmt: skip
    return LLMatcher


def _reason(text: str) -> str:
    """The library's words on one line, without the parser's state."""
    return " ".join(text.split("<state>", maxsplit=1)[0].split())[:300] or "it has no beginning"
