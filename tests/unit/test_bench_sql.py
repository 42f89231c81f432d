"""Untrusted SQL: what runs, what does not, and what must not do harm."""

import time

import pytest

from gorgon.bench.sql import is_schema, run_sql

SCHEMA = "CREATE TABLE head (age INTEGER, name VARCHAR); CREATE TABLE town (id INTEGER, head_name VARCHAR)"


@pytest.mark.parametrize(
    "query",
    [
        "SELECT COUNT(*) FROM head WHERE age > 56",
        'SELECT name FROM head WHERE name = "guy forget"',
        "SELECT a.name FROM head AS a JOIN town AS b ON a.name = b.head_name GROUP BY a.name HAVING MAX(a.age) > 3;",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 10) SELECT * FROM n",
        "SELECT name FROM head EXCEPT SELECT head_name FROM town ORDER BY 1 LIMIT 1",
    ],
)
def test_honest_queries_run(query):
    assert run_sql(SCHEMA, query).runs


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("SELECT height FROM head", "no such column"),
        ("SELECT name FROM body", "no such table"),
        ("SELEC name", "syntax error"),
        ("", "not a query"),
        ("-- nothing", "not a query"),
        ("SELECT 1; SELECT 2", "one statement"),
        ("SELECT 'a\x00b' FROM head", ""),
        ("SELECT \ud800", ""),
    ],
)
def test_faulty_queries_say_why(query, reason):
    outcome = run_sql(SCHEMA, query)
    assert not outcome.runs
    assert outcome.error is not None
    assert reason in outcome.error


@pytest.mark.parametrize(
    "query",
    [
        "ATTACH DATABASE '{file}' AS x",
        "VACUUM INTO '{file}'",
        "PRAGMA writable_schema = 1",
        "PRAGMA hard_heap_limit = 1",
        "DROP TABLE head",
        "DELETE FROM head",
        "INSERT INTO head VALUES (1, 'x')",
        "UPDATE head SET age = 1",
        "CREATE TABLE t (a)",
        "CREATE TEMP TABLE t (a)",
        "CREATE VIRTUAL TABLE t USING fts5(a)",
        "CREATE TRIGGER g AFTER INSERT ON head BEGIN SELECT 1; END",
        "SELECT load_extension('{file}')",
        "SELECT * FROM pragma_database_list",
        "BEGIN EXCLUSIVE",
        "SAVEPOINT a",
        "REINDEX",
        "ANALYZE",
    ],
)
def test_hostile_statements_are_refused(query, tmp_path):
    target = tmp_path / "stolen.db"
    assert not run_sql(SCHEMA, query.format(file=target)).runs
    assert not target.exists()


@pytest.mark.parametrize(
    "query",
    [
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n",
        "WITH RECURSIVE n(s) AS (SELECT 'x' UNION ALL SELECT s || s FROM n) SELECT MAX(LENGTH(s)) FROM n",
        "SELECT zeroblob(2000000000)",
        "SELECT randomblob(1000000000)",
        "SELECT " + "(" * 5000 + "1" + ")" * 5000,
        "SELECT 1 WHERE " + " OR ".join(["1"] * 30000),
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 300) "
        "SELECT COUNT(*) FROM n a, n b, n c, n d ORDER BY 1",
    ],
)
def test_greedy_queries_are_stopped_soon(query):
    start = time.monotonic()
    assert not run_sql(SCHEMA, query).runs
    assert time.monotonic() - start < 10


def test_endless_rows_are_not_fetched():
    assert run_sql(SCHEMA, "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n").runs


def test_the_clock_stops_a_query_too():
    ticks = iter(range(100))
    query = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n"
    outcome = run_sql(SCHEMA, query, seconds=1.5, clock=lambda: float(next(ticks)))
    assert outcome.error == "stopped: it ran longer than allowed"


@pytest.mark.parametrize(
    "schema", ["ATTACH 'x' AS y", "CREATE TABLE a (", "DROP TABLE sqlite_master", "PRAGMA user_version = 3"]
)
def test_a_hostile_or_broken_schema_does_not_run(schema):
    assert not run_sql(schema, "SELECT 1").runs


def test_schema_with_keys_and_indexes():
    schema = "CREATE TABLE a (id INTEGER PRIMARY KEY, b TEXT UNIQUE, FOREIGN KEY (id) REFERENCES c (id)); "
    schema += "CREATE INDEX i ON a (b)"
    assert run_sql(schema, "SELECT b FROM a WHERE b = 'x'").runs


def test_is_schema():
    assert is_schema("create  TABLE x (a)")
    assert not is_schema(None)
    assert not is_schema("You are a helpful assistant.")
