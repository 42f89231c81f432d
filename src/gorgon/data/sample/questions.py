"""Questions of the synthetic sample about one table: each builder makes a question and the one SQL that answers it."""

# ruff: noqa: S608 - making SQL text is the purpose; none of it touches a real database

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gorgon.data.sample.schema import Column, Schema, Table

Pair = tuple[str, str]
Builder = Callable[[random.Random, Schema], Pair | None]

SHOW = ("Show", "List", "Give", "Find", "Return", "What are", "Tell me")
AGGREGATES = {
    "AVG": ("average", "mean"),
    "MAX": ("highest", "maximum", "largest"),
    "MIN": ("lowest", "minimum", "smallest"),
    "SUM": ("total", "combined"),
}
MORE = {
    ">": ("is greater than", "is more than", "is above", "is over", "exceeds"),
    "<": ("is less than", "is below", "is under", "is smaller than"),
    ">=": ("is at least", "is no less than"),
    "<=": ("is at most", "is no more than"),
    "=": ("is", "equals", "is exactly"),
    "<>": ("is not", "is different from"),
}
DATES = {">": ("is after", "is later than"), "<": ("is before", "is earlier than"), "=": ("is", "is on")}


@dataclass(frozen=True)
class Condition:
    """`city is Oslo` and `city = "Oslo"`."""

    words: str
    sql: str


def listed(words: Sequence[str], last: str = "and") -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def closed(text: str) -> str:
    """The sentence with its first letter raised and a final mark."""
    asks = text.split(" ", 1)[0].lower() in {"what", "which", "how", "who"}
    return text[:1].upper() + text[1:] + ("?" if asks else ".")


def number_of(table: Table, rng: random.Random) -> Column | None:
    """A numeric column, or None."""
    return _choose(rng, [c for c in table.columns if c.numeric])


def measure_of(table: Table, rng: random.Random) -> Column | None:
    """A numeric column that may be summed and averaged: years are not."""
    return _choose(rng, [c for c in table.columns if c.kind in ("int", "real")])


def group_of(table: Table, rng: random.Random) -> Column | None:
    """A column with few values, or None."""
    return _choose(rng, [c for c in table.columns if c.repeats])


def _choose(rng: random.Random, columns: list[Column]) -> Column | None:
    return rng.choice(columns) if columns else None


def pick(rng: random.Random, table: Table, most: int = 3) -> list[Column]:
    """One to `most` columns to show, in random order."""
    return rng.sample(table.columns, min(len(table.columns), rng.choices((1, 2, 3), (45, 40, 15))[0], most))


def value(rng: random.Random, column: Column, schema: Schema) -> str:
    """A value that is no name of the schema: SQLite would read `"city"` as the column."""
    for _ in range(50):
        drawn = column.draw(rng)
        if drawn.casefold() not in schema.names:
            return drawn
    return f"{drawn} 1"


def condition(rng: random.Random, schema: Schema, column: Column, *, alias: str = "", of: str = "") -> Condition:
    """A random test on one column.

    Args: alias: `T1.` or nothing, in SQL. of: words in front of the column's, such as `author `.
    """
    name, words = alias + column.name, owned(column, of)
    if column.kind == "text":
        return _text_condition(rng, schema, column, name, words)
    if column.kind == "date":
        op = rng.choices(list(DATES), (40, 40, 20))[0]
        drawn, said = column.draw(rng), rng.choice(DATES[op])
        if words.endswith(" on"):
            said = said.removesuffix(" on")
        return Condition(f"{words} {said} {drawn}", f'{name} {op} "{drawn}"')
    if rng.random() < 0.15:
        low, high = sorted((column.draw(rng), column.draw(rng)), key=float)
        if low != high:
            return Condition(f"{words} is between {low} and {high}", f"{name} BETWEEN {low} AND {high}")
    op = rng.choices(list(MORE), (28, 28, 12, 12, 15, 5))[0]
    drawn = column.draw(rng)
    return Condition(f"{words} {rng.choice(MORE[op])} {drawn}", f"{name} {op} {drawn}")


def _text_condition(rng: random.Random, schema: Schema, column: Column, name: str, words: str) -> Condition:
    drawn = value(rng, column, schema)
    shown = f'"{drawn}"' if rng.random() < 0.3 else drawn
    way = rng.choices(("=", "<>", "contains", "starts", "in"), (66, 12, 7, 7, 8))[0]
    if way == "<>":
        return Condition(f"{words} {rng.choice(MORE['<>'])} {shown}", f'{name} <> "{drawn}"')
    if way in ("contains", "starts"):
        part = drawn.split(" ")[0][:4] if way == "starts" else drawn.split(" ")[-1]
        if part.casefold() not in schema.names:
            verb = "contains" if way == "contains" else "starts with"
            return Condition(f'{words} {verb} "{part}"', f'{name} LIKE "{"%" if way == "contains" else ""}{part}%"')
    other = value(rng, column, schema)
    if way == "in" and other != drawn:
        return Condition(f"{words} is either {drawn} or {other}", f'{name} IN ("{drawn}", "{other}")')
    return Condition(f"{words} {rng.choice(('is', 'is', 'equals', 'is equal to'))} {shown}", f'{name} = "{drawn}"')


def where(
    rng: random.Random, schema: Schema, table: Table, *, least: int = 0, spare: Sequence[Column] = ()
) -> Condition:
    """Up to two conditions with their lead word and WHERE, or nothing; both texts begin with a blank.

    Args: spare: columns that are tested only when there is no other: nobody asks for the city of those in Oslo.
    """
    count = max(least, rng.choices((0, 1, 2), (15, 60, 25))[0])
    free = [c for c in table.columns if c not in spare] or list(table.columns)
    columns = rng.sample(free, min(count, len(free)))
    if not columns:
        return Condition("", "")
    found = [condition(rng, schema, c) for c in columns]
    lead = rng.choice(("whose", "where the", "for which the"))
    joint = rng.choice(("and", "and", "or")) if len(found) == 2 else "and"
    again = f" {joint} {lead if rng.random() < 0.5 else 'the'} "
    return Condition(
        f" {lead} {again.join(c.words for c in found)}", f" WHERE {f' {joint.upper()} '.join(c.sql for c in found)}"
    )


def owned(column: Column, of: str) -> str:
    """`author birth year`, but `author name` for a column that already carries its table's name."""
    return column.words if column.words.startswith(of) else of + column.words


def shown(columns: Sequence[Column]) -> str:
    """`name, age and city`."""
    return listed([c.words for c in columns])


def names(columns: Sequence[Column], alias: str = "") -> str:
    """`name, age, city` in SQL."""
    return ", ".join(alias + c.name for c in columns)


def table_of(rng: random.Random, schema: Schema) -> Table:
    """One of the schema's tables."""
    return rng.choice(schema.tables)


def select(rng: random.Random, schema: Schema) -> Pair | None:
    """Projection and filter, sometimes DISTINCT, sometimes everything."""
    table = table_of(rng, schema)
    columns = pick(rng, table)
    test = where(rng, schema, table, least=1, spare=columns)
    if rng.random() < 0.08:
        text = f"{rng.choice(('Show everything about', 'List all details of', 'Show all columns of'))} {table.plural}"
        return closed(text + test.words), f"SELECT * FROM {table.name}{test.sql}"
    if rng.random() < 0.15:
        text = f"{rng.choice(SHOW)} the {rng.choice(('different', 'distinct'))} {shown(columns[:1])} of {table.plural}"
        return closed(text + test.words), f"SELECT DISTINCT {columns[0].name} FROM {table.name}{test.sql}"
    kind = rng.choice(("all", "the", "every"))
    noun = table.singular if kind == "every" else table.plural
    text = f"{rng.choice(SHOW)} the {shown(columns)} of {kind} {noun}{test.words}"
    return closed(text), f"SELECT {names(columns)} FROM {table.name}{test.sql}"


def count(rng: random.Random, schema: Schema) -> Pair | None:
    """COUNT(*) and COUNT(DISTINCT column)."""
    table = table_of(rng, schema)
    column = group_of(table, rng)
    if column is not None and rng.random() < 0.3:
        test = where(rng, schema, table, spare=[column])
        text = f"How many {rng.choice(('different', 'distinct'))} {column.words} values are there among {table.plural}"
        return closed(text + test.words), f"SELECT COUNT(DISTINCT {column.name}) FROM {table.name}{test.sql}"
    test = where(rng, schema, table, least=1)
    text = rng.choice(
        (
            f"How many {table.plural} are there{test.words}",
            f"Count the {table.plural}{test.words}",
            f"What is the number of {table.plural}{test.words}",
        )
    )
    return closed(text), f"SELECT COUNT(*) FROM {table.name}{test.sql}"


def aggregate(rng: random.Random, schema: Schema) -> Pair | None:
    """One or two of AVG, MAX, MIN, SUM over one column."""
    table = table_of(rng, schema)
    column = measure_of(table, rng)
    if column is None:
        return None
    functions = rng.sample(sorted(AGGREGATES), rng.choices((1, 2), (65, 35))[0])
    said = listed([rng.choice(AGGREGATES[f]) for f in functions])
    test = where(rng, schema, table, spare=[column])
    text = (
        f"{rng.choice(('What is', 'Find', 'Show', 'Compute'))} the {said} {column.words} of {table.plural}{test.words}"
    )
    called = ", ".join(f"{f}({column.name})" for f in functions)
    return closed(text), f"SELECT {called} FROM {table.name}{test.sql}"


def group(rng: random.Random, schema: Schema) -> Pair | None:
    """GROUP BY one column with a count or an aggregate; sometimes HAVING, ORDER BY, or only the most common value."""
    table = table_of(rng, schema)
    by = group_of(table, rng)
    if by is None:
        return None
    column = measure_of(table, rng)
    if rng.random() < 0.2:
        rare = rng.random() < 0.4
        word = rng.choice(("least common", "rarest")) if rare else rng.choice(("most common", "most frequent"))
        test = where(rng, schema, table, spare=[by])
        text = f"Which {by.words} is the {word} among {table.plural}{test.words}"
        tail = f"GROUP BY {by.name} ORDER BY COUNT(*){'' if rare else ' DESC'} LIMIT 1"
        return closed(text), f"SELECT {by.name} FROM {table.name}{test.sql} {tail}"
    if column is not None and column is not by and rng.random() < 0.5:
        function = rng.choice(sorted(AGGREGATES))
        said, call = f"{rng.choice(AGGREGATES[function])} {column.words}", f"{function}({column.name})"
        limit = column.draw(rng)
    else:
        said, call, limit = f"number of {table.plural}", "COUNT(*)", str(rng.randint(2, 20))
    text = rng.choice(
        (
            f"What is the {said} for each {by.words}",
            f"For each {by.words}, show the {said}",
            f"Show each {by.words} and the {said}",
        )
    )
    sql = f"SELECT {by.name}, {call} FROM {table.name}"
    ending, tail = group_tail(rng, f"the {said}", call, limit)
    if not ending and rng.random() < 0.4:
        test = where(rng, schema, table, least=1, spare=[by])
        text, sql = f"{text}, counting only {table.plural}{test.words}", sql + test.sql
    return closed(text + ending), f"{sql} GROUP BY {by.name}{tail}"


def group_tail(rng: random.Random, said: str, call: str, limit: str) -> tuple[str, str]:
    """What may follow GROUP BY: HAVING, ORDER BY, or nothing, in words and in SQL."""
    way = rng.choices(("", "having", "order"), (45, 35, 20))[0]
    if way == "having":
        op = rng.choice((">", "<", ">="))
        return f", but only where {said} {rng.choice(MORE[op])} {limit}", f" HAVING {call} {op} {limit}"
    if way == "order":
        down = rng.random() < 0.5
        return f", {'highest' if down else 'lowest'} first", f" ORDER BY {call}{' DESC' if down else ''}"
    return "", ""


def order(rng: random.Random, schema: Schema) -> Pair | None:
    """ORDER BY, LIMIT and superlatives."""
    table = table_of(rng, schema)
    by = number_of(table, rng)
    if by is None:
        return None
    columns = [c for c in pick(rng, table) if c is not by] or [table.label]
    down = rng.random() < 0.5
    tail = f"ORDER BY {by.name}{' DESC' if down else ''}"
    way = rng.choice(("sorted", "top", "one"))
    test = where(rng, schema, table, spare=[*columns, by])
    body = f"SELECT {names(columns)} FROM {table.name}{test.sql}"
    if way == "sorted":
        said = rng.choice(("sorted by", "ordered by"))
        way_said = rng.choice(
            ("in descending order", "from high to low") if down else ("in ascending order", "from low to high")
        )
        text = (
            f"{rng.choice(SHOW)} the {shown(columns)} of all {table.plural}{test.words}, {said} {by.words} {way_said}"
        )
        return closed(text), f"{body} {tail}"
    extreme = rng.choice(("highest", "largest")) if down else rng.choice(("lowest", "smallest"))
    if way == "top":
        number = rng.randint(2, 10)
        text = f"{rng.choice(SHOW)} the {shown(columns)} of the {number} {table.plural} with the {extreme} {by.words}"
        text += f" among those{test.words}" if test.words else ""
        return closed(text), f"{body} {tail} LIMIT {number}"
    text = f"What is the {shown(columns)} of the {table.singular} with the {extreme} {by.words}"
    text += f" among those{test.words}" if test.words else ""
    return closed(text), f"{body} {tail} LIMIT 1"


def nested(rng: random.Random, schema: Schema) -> Pair | None:
    """A scalar subquery: above or below the average, or equal to the extreme."""
    table = table_of(rng, schema)
    column = measure_of(table, rng)
    if column is None:
        return None
    columns = [c for c in pick(rng, table, 2) if c is not column] or [table.label]
    op, function, said = rng.choice(
        (
            (">", "AVG", "is above the average"),
            ("<", "AVG", "is below the average"),
            ("=", "MAX", "equals the overall maximum"),
            ("=", "MIN", "equals the overall minimum"),
        )
    )
    test = f"{column.name} {op} (SELECT {function}({column.name}) FROM {table.name})"
    text = f"{rng.choice(SHOW)} the {shown(columns)} of {table.plural} whose {column.words} {said}"
    if rng.random() < 0.35:
        more = condition(rng, schema, rng.choice(table.columns))
        sql = f"SELECT {names(columns)} FROM {table.name} WHERE {test} AND {more.sql}"
        return closed(f"{text} and whose {more.words}"), sql
    if rng.random() < 0.3:
        text = f"How many {table.plural} have a {column.words} that {said}"
        return closed(text), f"SELECT COUNT(*) FROM {table.name} WHERE {test}"
    return closed(text), f"SELECT {names(columns)} FROM {table.name} WHERE {test}"


def sets(rng: random.Random, schema: Schema) -> Pair | None:
    """INTERSECT and EXCEPT over the values of one column."""
    table = table_of(rng, schema)
    by = group_of(table, rng)
    others = [c for c in table.columns if c is not by]
    if by is None or not others:
        return None
    column = rng.choice(others)
    first, second = condition(rng, schema, column), condition(rng, schema, column)
    if first.sql == second.sql:
        return None
    both = rng.random() < 0.5
    text = f"Which {by.words} values have {table.plural} whose {first.words} "
    text += f"and also {table.plural} whose {second.words}" if both else f"but no {table.plural} whose {second.words}"
    word = "INTERSECT" if both else "EXCEPT"
    part = f"SELECT {by.name} FROM {table.name} WHERE "
    return closed(text), f"{part}{first.sql} {word} {part}{second.sql}"


SINGLE: tuple[tuple[Builder, int], ...] = (
    (select, 30), (count, 12), (aggregate, 14), (group, 18), (order, 16), (nested, 8), (sets, 3),
)  # fmt: skip
"""Builders that need one table only, and their weights."""
