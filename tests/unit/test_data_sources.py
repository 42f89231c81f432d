"""Files and hub datasets: every malformed row is named by file, line and field."""

import json
import os

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from gorgon.data.sources import load_embedded, load_file, load_hub
from gorgon.errors import DataError

ROWS = [
    {"question": "Who?", "context": "CREATE TABLE a (b TEXT)", "answer": "SELECT b FROM a"},
    {"question": 'He said "é, ü"\nand left', "context": "CREATE TABLE c (d TEXT)", "answer": "SELECT d FROM c"},
]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        quoted = ["question,context,answer"]
        quoted += [",".join('"' + v.replace('"', '""') + '"' for v in row.values()) for row in rows]
        path.write_text("\n".join(quoted) + "\n", encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "JSONL"])
def test_all_formats_give_the_same_rows(tmp_path, suffix):
    path = write(tmp_path / f"rows.{suffix.lower()}", ROWS)
    path = path.rename(tmp_path / f"rows.{suffix}")
    found = load_file(path)
    assert [row.values for row in found] == ROWS
    assert all(row.file == str(path) for row in found)


def test_lines_of_multiline_csv(tmp_path):
    path = write(tmp_path / "rows.csv", [*ROWS, ROWS[0]])
    assert [row.line for row in load_file(path)] == [2, 3, 5]


def test_byte_order_mark(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode())
    assert load_file(path)[0].values == ROWS[0]


def test_long_csv_value(tmp_path):
    path = write(tmp_path / "rows.csv", [ROWS[0] | {"context": "x" * 300_000}])
    assert len(load_file(path)[0].values["context"]) == 300_000


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', 2),
        ("a.jsonl", b'{"a": 1}\n[1]\n', 2),
        ("a.jsonl", b'{"a": 1}\n\n{"a": "\xff"}\n', 3),
        ("a.jsonl", b'{"a": NaN}\n', 1),
        ("a.jsonl", b"[" * 100_000, 1),
        ("a.json", b'[{"a": 1},\n{"a": }]', 2),
        ("a.json", b'[{"a": 1}, 3]', 2),
        ("a.json", b'{"a": 1}', None),
        ("a.json", b'[\n{"a": "\xc3\x28"}]', 2),
        ("a.csv", b"a,b\n1,2\n1\n", 3),
        ("a.csv", b"a,b\n1,2,3\n", 2),
        ("a.csv", b"a,a\n1,2\n", 1),
        ("a.csv", b'a,b\n1,"2\n', 2),
        ("a.csv", b"a,b\n1,\xe9\n", 2),
        ("a.csv", b"a,b\n", None),
        ("a.json", b"[]", None),
        ("a.parquet", b"PAR1 not really", None),
        ("a.jsonl", b"", None),
        ("a.jsonl", b" \n \n", None),
    ],
)
def test_faults_name_the_line(tmp_path, name, content, line):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_file(path)
    assert str(caught.value.file) == str(path)
    assert caught.value.line == line


def test_unknown_suffix_and_missing_file(tmp_path):
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(DataError, match="unknown kind") as caught:
        load_file(tmp_path / "rows.txt")
    assert ".parquet" in caught.value.allowed
    with pytest.raises(DataError, match="no such file"):
        load_file(tmp_path / "rows.csv")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    path.chmod(0)
    with pytest.raises(DataError, match="cannot read"):
        load_file(path)


def test_embedded():
    rows = load_embedded(42, 5)
    assert [row.line for row in rows] == [1, 2, 3, 4, 5]
    assert set(rows[0].values) == {"question", "context", "answer"}


@pytest.mark.parametrize(
    ("raised", "field", "text"),
    [
        (datasets.exceptions.DatasetNotFoundError("x"), "dataset", "no such dataset"),
        (ConnectionError("offline"), "dataset", "cannot be reached"),
        (ValueError('Unknown split "tran"'), "dataset_split", "tran"),
        (RuntimeError("Dataset scripts are no longer supported"), "dataset", "no longer supported"),
    ],
)
def test_hub_faults(monkeypatch, raised, field, text):
    def fail(*_args, **_kwargs):
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=text) as caught:
        load_hub("owner/name", "train")
    assert caught.value.field == field


def test_hub_rows(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(ROWS))
    rows = load_hub("owner/name", "train")
    assert [row.values for row in rows] == ROWS
    assert "owner/name" in rows[1].file
    assert rows[1].line == 2


def test_offline_mode_of_the_hub_library(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        load_hub("nobody/nothing-of-that-name", "train")
    assert caught.value.field == "dataset"
    assert "embedded" in caught.value.hint
