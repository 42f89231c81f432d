"""The synthetic sample: every answer runs, seeds decide everything, domains stay apart."""

import hashlib
import json
import os
import random
import re
import sqlite3
import subprocess
import sys

import pytest

from gorgon.data.sample import BACKBONE_DOMAINS, SAMPLE_DOMAINS, generate_rows
from gorgon.data.sample.questions import value as draw_value
from gorgon.data.sample.schema import Column, Schema, load_domains
from gorgon.errors import DataError

ALL = (*BACKBONE_DOMAINS, *SAMPLE_DOMAINS)


@pytest.fixture(scope="module")
def rows():
    return generate_rows(7, 2000, ALL)


def run(row):
    database = sqlite3.connect(":memory:")
    try:
        database.executescript(row["context"])
        return database.execute(row["answer"]).fetchall()
    finally:
        database.close()


def test_every_answer_runs_on_its_own_schema(rows):
    for row in rows:
        run(row)


def test_every_name_of_every_domain_is_usable_in_sqlite():
    database = sqlite3.connect(":memory:")
    for group in load_domains().values():
        for tables in group.values():
            for spec in tables.values():
                for name in (spec.singular, spec.plural):
                    columns = {n for synonyms, _ in spec.columns for n in synonyms}
                    database.execute(f"CREATE TABLE {name} ({', '.join(f'{c} TEXT' for c in columns)}, {name}_id INT)")
                    database.execute(f"SELECT {', '.join(f'T1.{c}' for c in columns)} FROM {name} AS T1")
                    database.execute(f"DROP TABLE {name}")


def test_quoted_values_are_never_read_as_columns(rows):
    for row in rows:
        names = {n.lower() for n in re.findall(r"[A-Za-z_]+", row["context"])}
        for value in re.findall(r'"([^"]+)"', row["answer"]):
            assert value.strip("%").lower() not in names, row


def test_a_value_that_is_a_name_of_the_schema_is_drawn_again():
    schema = Schema((), "", frozenset({"city"}))
    column = Column("name", "name", "text", lambda rng: rng.choice(("City", "Oslo")), repeats=True)
    assert {draw_value(random.Random(seed), column, schema) for seed in range(20)} == {"Oslo"}
    stuck = Column("name", "name", "text", lambda rng: "City", repeats=True)
    assert draw_value(random.Random(1), stuck, schema) == "City 1"


def test_rows_are_well_formed_and_distinct(rows):
    assert len(rows) == 2000
    assert len({(r["context"], r["question"]) for r in rows}) == 2000
    assert len({r["context"] for r in rows}) > 1000
    for row in rows:
        assert list(row) == ["question", "context", "answer"]
        assert row["answer"].startswith("SELECT ")
        assert not row["answer"].endswith(";")
        assert row["question"][-1] in ".?"
        assert "  " not in row["question"] + row["answer"]
        assert row["question"].isascii()


def test_every_literal_stands_in_the_question(rows):
    for row in rows:
        for value in re.findall(r'"([^"]+)"', row["answer"]):
            assert value.strip("%") in row["question"], row
        for number in re.findall(r"[=<>] (-?[0-9.]+)", row["answer"]):
            assert number in row["question"], row


def test_a_question_determines_its_answer_on_a_schema():
    answers = {}
    for seed in range(5):
        for row in generate_rows(seed, 2000, ["zoo"]):
            key = (row["context"], row["question"])
            assert answers.setdefault(key, row["answer"]) == row["answer"]


def test_all_question_kinds_occur(rows):
    text = "\n".join(r["answer"] for r in rows)
    kinds = (
        "GROUP BY", "HAVING", "ORDER BY", "LIMIT", "DISTINCT", "JOIN", "AS T3", " IN (SELECT", "NOT IN (SELECT",
        "BETWEEN",
        "LIKE", " AND ", " OR ", "UNION", "EXCEPT", "INTERSECT", "> (SELECT AVG", "COUNT(*)", "SUM(", "IN (\"",
    )  # fmt: skip
    for kind in kinds:
        assert text.count(kind) >= 5, kind


def test_prefix_and_seed():
    assert generate_rows(3, 40) == generate_rows(3, 200)[:40]
    assert generate_rows(3, 40) != generate_rows(4, 40)
    assert generate_rows(3, 0) == []


def test_the_same_rows_in_every_process():
    code = (
        "import hashlib, json; from gorgon.data.sample import generate_rows;"
        "print(hashlib.sha256(json.dumps(generate_rows(5, 300)).encode()).hexdigest())"
    )
    expected = hashlib.sha256(json.dumps(generate_rows(5, 300)).encode()).hexdigest()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        assert done.stdout.strip() == expected


def test_domain_groups_share_nothing():
    assert not set(BACKBONE_DOMAINS) & set(SAMPLE_DOMAINS)
    groups = load_domains()
    tables = {g: {t for tables in domains.values() for t in tables} for g, domains in groups.items()}
    assert not tables["backbone"] & tables["sample"]
    assert len(ALL) >= 30
    used = {t.lower() for r in generate_rows(1, 500) for t in re.findall(r"CREATE TABLE (\w+)", r["context"])}
    plurals = {s.plural for d in groups["backbone"].values() for s in d.values()}
    assert not used & (tables["backbone"] | plurals)


def test_unknown_domain_names_the_nearest():
    with pytest.raises(DataError) as caught:
        generate_rows(1, 5, ["hospitl"])
    assert "hospital" in caught.value.hint
    with pytest.raises(DataError):
        generate_rows(1, -1)
    with pytest.raises(DataError):
        generate_rows(1, 5, [])


def test_import_is_cheap():
    code = (
        "import sys, gorgon.data.prepare, gorgon.data.sample;"
        "print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
