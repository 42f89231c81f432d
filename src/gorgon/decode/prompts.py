"""Prompts for `gorgon generate`: from the command line, a text file, or JSONL."""

from __future__ import annotations

import json
from pathlib import Path

from gorgon.errors import DataError, GorgonError

Messages = list[dict[str, str]]


def conversation(prompt: str, system: str | None) -> Messages:
    """A chat of one user message, with a system message before it if one is given."""
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": prompt}]


def read_prompts(path: Path, system: str | None) -> list[Messages]:
    """Prompts of a file: JSONL rows with `messages` or `prompt`, or else one prompt per line.

    Raises: DataError naming file and line for a row that is neither, for a missing or an empty file.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise DataError("no such file", file=path) from error
    except UnicodeDecodeError as error:
        raise DataError("not a UTF-8 text file", file=path) from error
    filled = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not filled:
        raise DataError("the file holds no prompts", file=path)
    if path.suffix != ".jsonl":
        return [conversation(line.strip(), system) for _, line in filled]
    return [_row(path, number, line, system) for number, line in filled]


def _row(path: Path, number: int, line: str, system: str | None) -> Messages:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError("not valid JSON", file=path, line=number) from error
    if not isinstance(row, dict) or not ("messages" in row or "prompt" in row):
        raise DataError("a row needs 'messages' or 'prompt'", file=path, line=number, field="messages")
    if "prompt" in row:
        if not isinstance(row["prompt"], str):
            raise DataError("'prompt' must be text", file=path, line=number, field="prompt", value=row["prompt"])
        return conversation(row["prompt"], system)
    messages = row["messages"]
    fine = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not fine or not messages:
        raise DataError("'messages' must be a list of {role, content}", file=path, line=number, field="messages")
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise GorgonError("a conversation holds only an answer", field="messages", value=number)
    return [{"role": m["role"], "content": m["content"]} for m in messages]
