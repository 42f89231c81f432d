"""Where rows come from: the embedded generator, a hub dataset, or a local file. Each row knows its file and line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gorgon.config import EMBEDDED
from gorgon.data.jsonl import decode, parse, read_bytes, read_objects
from gorgon.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
EMBEDDED_ROWS = 4000
"""Rows of `dataset: embedded` when the configuration does not say how many."""


@dataclass(frozen=True)
class RawRow:
    """A row as it was found. `line` is the line in .jsonl and .csv files, the row's number elsewhere; both from 1."""

    values: dict[str, Any]
    file: str
    line: int


def load_file(path: Path) -> list[RawRow]:
    """All rows of a .jsonl, .json, .csv or .parquet file.

    Raises: DataError when it is missing, empty, of another kind, or malformed, with the line at fault.
    """
    readers = {".jsonl": read_objects, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            "unknown kind of file", file=path, value=path.suffix, allowed=", ".join(SUFFIXES),
            hint="convert it, or rename it if its contents are one of these",
        )  # fmt: skip
    rows = [RawRow(values, str(path), line) for line, values in reader(path)]
    if not rows:
        raise DataError("the file holds no rows", file=path)
    return rows


def load_embedded(seed: int, rows: int | None) -> list[RawRow]:
    """Rows of the embedded synthetic sample."""
    from gorgon.data.sample import generate_rows

    made = generate_rows(seed, EMBEDDED_ROWS if rows is None else rows)
    return [RawRow(dict(row), EMBEDDED, number) for number, row in enumerate(made, start=1)]


def load_hub(name: str, split: str) -> list[RawRow]:
    """One split of a dataset on the Hugging Face hub, from the local cache when there is no network.

    Raises: DataError when the dataset or the split does not exist, access is refused, or the hub cannot be reached.
    """
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = datasets.load_dataset(name, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            "there is no such dataset on the hub, or it is private", field="dataset", value=name,
            hint="check the spelling (owner/name); for a private or gated one run `hf auth login`; "
            "without a network use `dataset: embedded` or a local file",
        ) from error  # fmt: skip
    except (ConnectionError, HfHubHTTPError, OSError) as error:  # offline mode is a ConnectionError, too
        raise DataError(
            f"the hub cannot be reached, and the dataset is not in the local cache: {error}", field="dataset",
            value=name, hint="without a network use `dataset: embedded`, or a local file: `train: FILE`",
        ) from error  # fmt: skip
    except ValueError as error:  # unknown split, unknown configuration
        raise DataError(f"the dataset cannot be loaded: {error}", field="dataset_split", value=split) from error
    except RuntimeError as error:  # datasets 4 dropped loading scripts
        raise DataError(f"the dataset cannot be loaded: {error}", field="dataset", value=name) from error
    label = f"dataset {name}, split {split}"
    rows = [RawRow(dict(row), label, number) for number, row in enumerate(found, start=1)]
    if not rows:
        raise DataError("the split holds no rows", file=label, field="dataset_split")
    return rows


def column_names(rows: Sequence[RawRow]) -> list[str]:
    """Columns of the first row, for messages: 'available: ...'."""
    return [str(name) for name in rows[0].values]


def _read_json(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    document = parse(decode(read_bytes(path), path), path)
    if not isinstance(document, list):
        raise DataError(
            f"expected a list of objects, found {type(document).__name__}", file=path,
            hint="one object per line is the .jsonl format",
        )  # fmt: skip
    for number, row in enumerate(document, start=1):
        if not isinstance(row, dict):
            raise DataError("every item must be a JSON object", file=path, line=number, value=row)
        yield number, row


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = decode(read_bytes(path), path)
    limit = csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))  # a schema may be longer than 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    try:
        while True:
            start = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            if not cells:
                continue
            if header is None:
                header = cells
                twice = sorted({name for name in header if header.count(name) > 1})
                if twice:
                    raise DataError("a column occurs twice in the header", file=path, line=start, field=twice[0])
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{len(cells)} values for {len(header)} columns", file=path, line=start,
                    hint='values that hold commas, quotes or line breaks must stand in "double quotes"',
                )  # fmt: skip
            yield start, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"not valid CSV: {error}", file=path, line=reader.line_num) from error
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(read_bytes(path)))
        rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"not a readable Parquet file: {error}", file=path) from error
    yield from enumerate(rows, start=1)
