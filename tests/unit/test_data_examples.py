"""The row format of all steps: what is written is read back; what is malformed is named."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gorgon.data.examples import Example, read_examples, write_examples
from gorgon.errors import DataError

GOOD = {"id": "a", "messages": [{"role": "user", "content": "hi"}], "answer": "yes"}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda s: s.strip())


@given(st.lists(st.tuples(TEXT, TEXT, st.none() | TEXT, st.none() | st.lists(st.integers(0, 99), min_size=1))))
def test_round_trip(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("examples") / "rows.jsonl"
    examples = [
        Example(f"id{i}", [{"role": "user", "content": question}], answer, context, ids)
        for i, (question, answer, context, ids) in enumerate(rows)
    ]
    write_examples(path, examples)
    if examples:
        assert read_examples(path) == examples
    else:
        with pytest.raises(DataError, match="empty"):
            read_examples(path)


def test_none_is_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_examples(path, [Example("a", [{"role": "user", "content": "ü"}], "b")])
    assert path.read_text(encoding="utf-8") == (
        '{"id": "a", "messages": [{"role": "user", "content": "ü"}], "answer": "b"}\n'
    )


def test_empty_answer_needs_ids(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_examples(path, [Example("a", GOOD["messages"], "", None, [1])])
    assert read_examples(path)[0].answer_ids == [1]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"answer": None}, "answer"),
        ({"answer": 3}, "answer"),
        ({"answer": " "}, "answer"),
        ({"id": 1}, "id"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages"),
        ({"answer_ids": [True]}, "answer_ids"),
        ({"answer_ids": []}, "answer_ids"),
        ({"answer_ids": [-1]}, "answer_ids"),
        ({"answer": "\ud800"}, "answer"),
        ({"context": 5}, "context"),
        ({"anwser": "x"}, "anwser"),
    ],
)
def test_faults_name_file_line_and_field(tmp_path, change, field):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(GOOD | {"id": "b"} | change) + "\n")
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert (caught.value.file, caught.value.line, caught.value.field) == (path, 3, field)


@pytest.mark.parametrize("name", ["id", "messages", "answer"])
def test_missing_field(tmp_path, name):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({k: v for k, v in GOOD.items() if k != name}))
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert (caught.value.line, caught.value.field) == (1, name)


def test_an_id_twice(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD))
    with pytest.raises(DataError, match="twice") as caught:
        read_examples(path)
    assert caught.value.line == 2


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_examples(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="directory"):
        read_examples(tmp_path)
