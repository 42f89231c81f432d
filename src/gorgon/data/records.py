"""Rows to chat examples: column mapping, message templates, and the values that splits must not share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter

from gorgon.config import PrepareConfig
from gorgon.data.examples import Example, check_messages
from gorgon.data.jsonl import check_text
from gorgon.data.sources import RawRow, column_names
from gorgon.errors import ConfigError, DataError

MESSAGES = "messages"
STANDARD = ("question", "context", "answer")


@dataclass(frozen=True)
class Record:
    """An example and the values of its `disjoint` columns, in the order of the plan's `disjoint`."""

    example: Example
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """How rows become examples, settled once per run from the configuration and the first row's columns.

    Args: columns: our name -> the file's. disjoint: our names. chat: rows hold whole conversations.
    """

    columns: dict[str, str]
    disjoint: tuple[str, ...]
    chat: bool
    warnings: tuple[str, ...]


def template_fields(template: str, setting: str) -> list[str]:
    """Column names in a message template.

    Raises: ConfigError when it is malformed or does more than name columns (attributes, indices, formats).
    """
    try:
        parts = [part for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ConfigError([f"prepare.{setting}: {error}"], hint="write a literal brace twice: {{ or }}") from error
    for _, name, specification, conversion in parts:
        if not name or specification or conversion or any(c in name for c in ".["):
            raise ConfigError(
                [f"prepare.{setting}: '{{{name}}}' is not the name of a column"],
                hint="templates may only name columns, such as {question}; write a literal brace twice",
            )
    return [str(name) for _, name, _, _ in parts]


def make_plan(config: PrepareConfig, rows: Sequence[RawRow]) -> Plan:
    """The plan for these rows.

    Raises: DataError naming the missing column and those that exist; ConfigError for a malformed template.
    """
    available = column_names(rows)
    columns = {name: name for name in STANDARD} | config.columns
    templates = {"system": config.system, "user": config.user, "answer": config.answer}
    used = [name for key, text in templates.items() if text is not None for name in template_fields(text, key)]
    mapped = columns.get(MESSAGES, MESSAGES)
    chat = MESSAGES in config.columns or (
        mapped in available and any(columns.get(name, name) not in available for name in used)
    )
    if chat:
        columns, used = {MESSAGES: mapped, "context": columns["context"]}, [MESSAGES]
    for name in used:
        columns.setdefault(name, name)
        if columns[name] not in available:
            raise _missing(columns[name], rows, available)
    disjoint, warnings = [], []
    for name in config.disjoint:
        actual = columns.get(name, name)
        if actual in available or (chat and name in STANDARD):
            columns.setdefault(name, actual)
            disjoint.append(name)
        elif name in STANDARD:
            warnings.append(f"The rows have no column '{actual}', so splits are not kept disjoint by '{name}'.")
        else:
            raise _missing(actual, rows, available)
    if columns["context"] in available and "context" not in used:
        used.append("context")  # kept with the example, for running answers
    needed = {name: actual for name, actual in columns.items() if name in used or name in disjoint}
    return Plan(needed, tuple(disjoint), chat, tuple(warnings))


def make_record(config: PrepareConfig, plan: Plan, row: RawRow) -> Record:
    """One row as an example, its id a hash of its contents.

    Raises: DataError naming file, line and column: value missing, null, empty or no text; a chat without an answer.
    """
    values: dict[str, str] = {}
    if plan.chat:
        column = plan.columns[MESSAGES]
        chat = check_messages(row.values.get(column), file=row.file, line=row.line, field=column)
        if chat[-1]["role"] != "assistant" or len(chat) < 2:
            raise DataError(
                "the chat must be a prompt and, last, the assistant's answer", file=row.file, line=row.line,
                field=column, value=[message["role"] for message in chat],
            )  # fmt: skip
        messages, answer = chat[:-1], chat[-1]["content"]
        system = "\n".join(m["content"] for m in messages if m["role"] == "system")
        values["question"] = json.dumps([m for m in messages if m["role"] != "system"], ensure_ascii=False)
        values["answer"] = answer
        if plan.columns.get("context") in row.values:
            values["context"] = check_text(
                row.values[plan.columns["context"]], file=row.file, line=row.line, field=plan.columns["context"]
            )
        elif system.lstrip()[:12].upper() == "CREATE TABLE":  # a system prompt that all rows share is no schema
            values["context"] = system
    else:
        messages, answer = [], ""
    for name, column in plan.columns.items():
        if name == MESSAGES or name in values or (plan.chat and name in STANDARD):
            continue
        if column not in row.values:
            raise DataError("the column is missing in this row", file=row.file, line=row.line, field=column)
        values[name] = check_text(row.values[column], file=row.file, line=row.line, field=column)
    if not plan.chat:
        if config.system is not None:
            messages.append({"role": "system", "content": config.system.format_map(values)})
        messages.append({"role": "user", "content": config.user.format_map(values)})
        answer = config.answer.format_map(values)
    content = json.dumps([messages, answer], ensure_ascii=False)
    identifier = hashlib.sha256(content.encode()).hexdigest()[:16]
    example = Example(identifier, messages, answer, context=values.get("context"))
    return Record(example, tuple(values.get(name, "") for name in plan.disjoint))


def _missing(column: str, rows: Sequence[RawRow], available: list[str]) -> DataError:
    return DataError(
        "the column is missing", file=rows[0].file, line=rows[0].line, field=column,
        allowed=f"one of the columns there: {', '.join(available)}",
        hint="name the file's columns: --columns '{question: prompt, answer: sql}', or in `gorgon run` "
        "--set 'prepare.columns={question: prompt, answer: sql}'; if there is no schema: system null",
    )  # fmt: skip
