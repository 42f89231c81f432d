"""The one row format of all steps: a chat without its answer, and the answer. One JSON object per line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gorgon.config import nearest
from gorgon.data.jsonl import check_text, read_objects
from gorgon.errors import DataError


@dataclass(frozen=True)
class Example:
    """A prompt and its answer.

    Args:
        id: unique within its split, and the same for the same row in every run.
        messages: the chat so far, each with `role` and `content`; the last one is not the assistant's.
        answer: the reference (`prepare`) or the model's own text (`distill`).
        context: SQL schema on which the answer can be run, if there is one.
        answer_ids: exact token ids, end token included; only `distill` writes them.
    """

    id: str
    messages: list[dict[str, str]]
    answer: str
    context: str | None = None
    answer_ids: list[int] | None = None


FIELDS = tuple(field.name for field in dataclasses.fields(Example))


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """One line per example; fields that are None are left out."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for example in examples:
            document = {name: getattr(example, name) for name in FIELDS if getattr(example, name) is not None}
            file.write(json.dumps(document, ensure_ascii=False) + "\n")


def read_examples(path: Path) -> list[Example]:
    """All examples of a file.

    Raises: DataError naming file, line and field: file missing or empty, invalid JSON or UTF-8, a field missing,
        unknown or of the wrong type, an id that occurs twice, a chat that is empty or ends with the assistant.
    """
    examples: list[Example] = []
    seen: dict[str, int] = {}
    for line, document in read_objects(path):
        example = _example(document, path, line)
        if example.id in seen:
            raise DataError(
                f"the id occurs twice, first on line {seen[example.id]}", file=path, line=line, field="id",
                value=example.id,
            )  # fmt: skip
        seen[example.id] = line
        examples.append(example)
    if not examples:
        raise DataError("the file holds no rows", file=path)
    return examples


def check_messages(value: object, *, file: Path | str, line: int, field: str = "messages") -> list[dict[str, str]]:
    """A list of `{role, content}` with text in both.

    Raises: DataError when it is not, naming the message.
    """
    if not isinstance(value, list) or not value:
        raise DataError("expected a list of messages", file=file, line=line, field=field, value=value)
    messages = []
    for number, message in enumerate(value):
        where = f"{field}[{number}]"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(
                "a message needs role and content", file=file, line=line, field=where, value=message,
                allowed='{"role": "user", "content": "..."}',
            )  # fmt: skip
        extra = sorted(key for key in message.keys() - {"role", "content"} if message[key] is not None)
        if extra:
            raise DataError(
                f"a message has keys that we cannot keep: {', '.join(map(str, extra))}", file=file, line=line,
                field=where, allowed="role and content",
            )  # fmt: skip
        role = check_text(message["role"], file=file, line=line, field=f"{where}.role")
        content = check_text(message["content"], file=file, line=line, field=f"{where}.content")
        messages.append({"role": role, "content": content})
    return messages


def _example(document: dict[str, Any], path: Path, line: int) -> Example:
    for name in document:
        if name not in FIELDS:
            raise DataError("unknown field", file=path, line=line, field=name, hint=nearest(name, FIELDS))
    for name in ("id", "messages", "answer"):
        if name not in document:
            raise DataError("the field is missing", file=path, line=line, field=name)
    messages = check_messages(document["messages"], file=path, line=line)
    if messages[-1]["role"] == "assistant":
        raise DataError("the chat must end before the assistant's answer", file=path, line=line, field="messages")
    ids = document.get("answer_ids")
    if ids is not None and not (
        isinstance(ids, list) and ids and all(type(i) is int and i >= 0 for i in ids)  # True is an int, too
    ):
        raise DataError("expected a list of token ids", file=path, line=line, field="answer_ids", value=ids)
    context = document.get("context")
    return Example(
        id=check_text(document["id"], file=path, line=line, field="id"),
        messages=messages,
        answer=check_text(document["answer"], file=path, line=line, field="answer", empty=ids is not None),
        context=None if context is None else check_text(context, file=path, line=line, field="context", empty=True),
        answer_ids=ids,
    )
