"""Runs untrusted SQL in SQLite, in memory, without harm: does it run on the given schema or not?

An answer of a language model is hostile input. The authorizer lets a query read tables and call functions and
nothing else; a budget of virtual-machine steps and a clock end what does not end by itself; limits on lengths keep
memory small. Nothing ever touches a disk.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass

STEP_BUDGET = 2_000_000
"""Virtual-machine instructions that one script may use: three orders of magnitude above an honest query."""
STEPS_PER_CHECK = 10_000
SECONDS = 2.0
MAX_BYTES = 100_000
"""Longest string, blob or statement."""
MAX_ROWS = 1_000

_SCHEMA_TABLES = ("sqlite_master", "sqlite_schema")
_SCHEMA_ACTIONS = {
    sqlite3.SQLITE_CREATE_TABLE, sqlite3.SQLITE_CREATE_INDEX, sqlite3.SQLITE_REINDEX,
    sqlite3.SQLITE_READ, sqlite3.SQLITE_SELECT, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_TRANSACTION,
}  # fmt: skip
_QUERY_ACTIONS = {sqlite3.SQLITE_READ, sqlite3.SQLITE_SELECT, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_FORBIDDEN_FUNCTIONS = frozenset({"load_extension", "fts3_tokenizer", "readfile", "writefile", "edit"})
_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: MAX_BYTES, sqlite3.SQLITE_LIMIT_SQL_LENGTH: MAX_BYTES,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 200, sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 100,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0, sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}  # fmt: skip


@dataclass(frozen=True)
class SqlOutcome:
    """Whether a query ran on its schema; `error` is SQLite's own message, or ours when a limit ended it."""

    runs: bool
    error: str | None = None


def is_schema(context: str | None) -> bool:
    """True when a row's context holds at least one `CREATE TABLE`."""
    return context is not None and "create table" in " ".join(context.lower().split())


def run_sql(
    schema: str, query: str, *, seconds: float = SECONDS, clock: Callable[[], float] = time.monotonic
) -> SqlOutcome:
    """Creates the schema's tables in memory and runs one query on them. They are empty: only whether it runs counts.

    Args: schema: `CREATE TABLE` statements; query: untrusted text; seconds: wall-clock limit for both together.
    Returns: runs = False with the reason for every fault of schema or query; nothing is raised for them.
    Invariant: the query cannot write, attach, change settings or load code.
    """
    guard = _Guard(clock() + seconds, clock)
    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        connection.execute("PRAGMA temp_store = MEMORY")
        for limit, value in _LIMITS.items():
            connection.setlimit(limit, value)
        connection.set_progress_handler(guard.over_budget, STEPS_PER_CHECK)
        connection.set_authorizer(_allow_schema)
        connection.executescript(schema)
        connection.set_authorizer(_allow_query)
        # more rows than this would be looked at by nobody; `execute` itself refuses a second statement
        cursor = connection.execute(query)
        cursor.fetchmany(MAX_ROWS)
        is_query = cursor.description is not None
    except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError, OverflowError) as error:
        reason = "stopped: it ran longer than allowed" if guard.stopped else str(error) or type(error).__name__
        return SqlOutcome(False, reason)
    finally:
        connection.close()
    return SqlOutcome(True) if is_query else SqlOutcome(False, "not a query: it returns no columns")


class _Guard:
    """Counts progress callbacks and watches the clock; once over the limit it stays so."""

    def __init__(self, deadline: float, clock: Callable[[], float]) -> None:
        self._deadline, self._clock, self._steps, self.stopped = deadline, clock, 0, False

    def over_budget(self) -> int:
        """Non-zero tells SQLite to stop."""
        self._steps += STEPS_PER_CHECK
        self.stopped = self.stopped or self._steps > STEP_BUDGET or self._clock() > self._deadline
        return int(self.stopped)


def _allow_schema(action: int, first: str | None, second: str | None, _db: str | None, _by: str | None) -> int:
    if action in (sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE):  # CREATE TABLE writes the schema table by itself
        return sqlite3.SQLITE_OK if first in _SCHEMA_TABLES else sqlite3.SQLITE_DENY
    return _decide(action, second, _SCHEMA_ACTIONS)


def _allow_query(action: int, _first: str | None, second: str | None, _db: str | None, _by: str | None) -> int:
    return _decide(action, second, _QUERY_ACTIONS)


def _decide(action: int, second: str | None, allowed: set[int]) -> int:
    if action not in allowed:
        return sqlite3.SQLITE_DENY
    if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _FORBIDDEN_FUNCTIONS:
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK
