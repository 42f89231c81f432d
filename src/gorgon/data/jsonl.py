"""JSON objects, one per line, with the line number in every complaint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from gorgon.errors import DataError


def read_bytes(path: Path) -> bytes:
    """The contents of a data file.

    Raises: DataError when it is missing, a directory, unreadable or empty.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            "no such file", file=path, hint="check the path; a relative one starts in the current directory"
        ) from error
    except IsADirectoryError as error:
        raise DataError("this is a directory, not a file", file=path) from error
    except OSError as error:
        raise DataError(f"cannot read the file: {error.strerror}", file=path) from error
    if not data.strip():
        raise DataError("the file is empty", file=path)
    return data


def decode(data: bytes, path: Path, first_line: int = 1) -> str:
    """UTF-8 text; a byte-order mark is taken off.

    Raises: DataError naming the line of the first byte that is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + data[: error.start].count(b"\n")
        raise DataError(
            f"not UTF-8 text: byte 0x{data[error.start]:02x}", file=path, line=line,
            hint="save the file as UTF-8, for example: iconv -f latin1 -t utf-8",
        ) from error  # fmt: skip


def parse(text: str, path: Path, line: int | None = None) -> Any:
    """One JSON document. `NaN` and `Infinity` are no JSON.

    Raises: DataError naming the line, counted from `line` or, for a whole file, from its beginning.
    """

    def refuse(name: str) -> NoReturn:
        raise DataError(f"not valid JSON: {name} is no JSON number", file=path, line=line)

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        where = error.lineno if line is None else line
        raise DataError(
            f"not valid JSON: {error.msg}, column {error.colno}", file=path, line=where,
            hint="a .jsonl file holds one JSON object per line, a .json file one list of objects",
        ) from error  # fmt: skip
    except (RecursionError, ValueError) as error:  # nested thousands deep, or a number of thousands of digits
        raise DataError("not readable as JSON: nested too deep or a number too long", file=path, line=line) from error


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) for every line; blank lines are passed over.

    Raises: DataError for a missing or empty file, bytes that are not UTF-8, invalid JSON, a line that is no object.
    """
    for number, data in enumerate(read_bytes(path).split(b"\n"), start=1):
        text = decode(data, path, number).strip()
        if not text:
            continue
        document = parse(text, path, number)
        if not isinstance(document, dict):
            raise DataError("a line must be a JSON object", file=path, line=number, value=document)
        yield number, document


def check_text(value: object, *, file: Path | str, line: int, field: str, empty: bool = False) -> str:
    """The value if it is usable text.

    Args: empty: blank text is allowed.
    Raises: DataError when it is no string, blank, or holds half a surrogate pair (which no file can store).
    """
    if not isinstance(value, str):
        what = "null" if value is None else type(value).__name__
        raise DataError(f"expected text, found {what}", file=file, line=line, field=field, value=value)
    if not empty and not value.strip():
        raise DataError("the value is empty", file=file, line=line, field=field, value=value)
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError("the text holds half a surrogate pair", file=file, line=line, field=field, value=value)
    return value
