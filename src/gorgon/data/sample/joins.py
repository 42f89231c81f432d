"""Questions of the synthetic sample about linked tables: joins over two or three tables, IN, NOT IN and UNION.

One form throughout: the table with the foreign key is T1, the table it names T2, and a third one T3.
"""

# ruff: noqa: S608 - making SQL text is the purpose; none of it touches a real database

from __future__ import annotations

import random
from dataclasses import dataclass

from gorgon.data.sample import questions as q
from gorgon.data.sample.questions import Builder, Pair
from gorgon.data.sample.schema import Schema, Table


@dataclass(frozen=True)
class Link:
    """A child table and one table it names."""

    child: Table
    key: str
    parent: Table

    @property
    def joined(self) -> str:
        """The FROM clause of both tables."""
        return f"FROM {self.child.name} AS T1 JOIN {self.parent.name} AS T2 ON T1.{self.key} = T2.{self.parent.key}"


def links(schema: Schema) -> list[Link]:
    """Every foreign key of the schema."""
    return [Link(t, key, parent) for t in schema.tables for key, parent in t.parents.items()]


def _link(rng: random.Random, schema: Schema) -> Link | None:
    found = links(schema)
    return rng.choice(found) if found else None


def join_filter(rng: random.Random, schema: Schema) -> Pair | None:
    """Rows, a count or an aggregate of the child, filtered by its parent's columns."""
    link = _link(rng, schema)
    if link is None:
        return None
    child, parent = link.child, link.parent
    test = q.condition(rng, schema, rng.choice(parent.columns), alias="T2.", of=f"{parent.singular} ")
    words, sql = f"whose {test.words}", f"WHERE {test.sql}"
    if rng.random() < 0.25:
        more = q.condition(rng, schema, rng.choice(child.columns), alias="T1.")
        words, sql = f"{words} and whose own {more.words}", f"{sql} AND {more.sql}"
    way = rng.choices(("rows", "count", "aggregate"), (60, 20, 20))[0]
    column = q.measure_of(child, rng)
    if way == "count":
        text = f"{rng.choice(('How many', 'Count the'))} {child.plural} {words}"
        return q.closed(text), f"SELECT COUNT(*) {link.joined} {sql}"
    if way == "aggregate" and column is not None:
        function = rng.choice(sorted(q.AGGREGATES))
        text = f"What is the {rng.choice(q.AGGREGATES[function])} {column.words} of {child.plural} {words}"
        return q.closed(text), f"SELECT {function}(T1.{column.name}) {link.joined} {sql}"
    columns = q.pick(rng, child, 2)
    text = f"{rng.choice(q.SHOW)} the {q.shown(columns)} of {child.plural} {words}"
    return q.closed(text), f"SELECT {q.names(columns, 'T1.')} {link.joined} {sql}"


def join_both(rng: random.Random, schema: Schema) -> Pair | None:
    """Columns of both tables side by side, sometimes filtered or sorted."""
    link = _link(rng, schema)
    if link is None:
        return None
    child, parent = link.child, link.parent
    ours, theirs = q.pick(rng, child, 2), q.pick(rng, parent, 1)
    their_words = q.owned(theirs[0], f"{parent.singular} ")
    text = f"{rng.choice(q.SHOW)} the {q.shown(ours)} of each {child.singular} and the {their_words}"
    sql = f"SELECT {q.names(ours, 'T1.')}, {q.names(theirs, 'T2.')} {link.joined}"
    way = rng.choice(("", "filter", "sort"))
    number = q.number_of(child, rng)
    if way == "filter":
        test = q.condition(rng, schema, rng.choice(child.columns), alias="T1.", of=f"{child.singular} ")
        return q.closed(f"{text} where the {test.words}"), f"{sql} WHERE {test.sql}"
    if way == "sort" and number is not None:
        down = rng.random() < 0.5
        text += f", sorted by {number.words} {'in descending order' if down else 'in ascending order'}"
        sql += f" ORDER BY T1.{number.name}{' DESC' if down else ''}"
    return q.closed(text), sql


def join_group(rng: random.Random, schema: Schema) -> Pair | None:
    """Counts or aggregates of the child for each label of its parent."""
    link = _link(rng, schema)
    if link is None:
        return None
    child, parent = link.child, link.parent
    by = rng.choice([parent.label, *(c for c in parent.columns if c.repeats)])
    name = q.owned(by, f"{parent.singular} ")
    column = q.measure_of(child, rng)
    if rng.random() < 0.3:
        few = rng.random() < 0.4
        text = f"Which {name} has the {'fewest' if few else 'most'} {child.plural}"
        tail = f"GROUP BY T2.{by.name} ORDER BY COUNT(*){'' if few else ' DESC'} LIMIT 1"
        return q.closed(text), f"SELECT T2.{by.name} {link.joined} {tail}"
    if column is not None and rng.random() < 0.5:
        function = rng.choice(sorted(q.AGGREGATES))
        said, call = (
            f"{rng.choice(q.AGGREGATES[function])} {child.singular} {column.words}",
            f"{function}(T1.{column.name})",
        )
        limit = column.draw(rng)
    else:
        said, call, limit = f"number of {child.plural}", "COUNT(*)", str(rng.randint(2, 20))
    ending, tail = q.group_tail(rng, f"the {said}", call, limit)
    text = rng.choice((f"For each {name}, show the {said}", f"What is the {said} for each {name}"))
    return q.closed(text + ending), f"SELECT T2.{by.name}, {call} {link.joined} GROUP BY T2.{by.name}{tail}"


def membership(rng: random.Random, schema: Schema) -> Pair | None:
    """Parents with, or without, a child that passes a test: IN and NOT IN."""
    link = _link(rng, schema)
    if link is None:
        return None
    child, parent = link.child, link.parent
    columns = q.pick(rng, parent, 2)
    inside = rng.random() < 0.5
    words, sql = "", ""
    if inside or rng.random() < 0.5:
        test = q.condition(rng, schema, rng.choice(child.columns))
        words, sql = f" whose {test.words}", f" WHERE {test.sql}"
    text = f"{rng.choice(q.SHOW)} the {q.shown(columns)} of {parent.plural} that have "
    text += f"at least one {child.singular}{words}" if inside else f"no {child.singular}{words}"
    inner = f"SELECT {link.key} FROM {child.name}{sql}"
    outer = f"SELECT {q.names(columns)} FROM {parent.name} WHERE {parent.key}"
    return q.closed(text), f"{outer} {'IN' if inside else 'NOT IN'} ({inner})"


def join_three(rng: random.Random, schema: Schema) -> Pair | None:
    """Three tables: a chain (grandparent, parent, child) or a child with two parents."""
    found = links(schema)
    if len(found) < 2:
        return None
    first, second = found[0], found[1]
    if first.child is second.child:
        start, ties = first, (second.parent, f"T1.{second.key}")
    else:
        lower, upper = (first, second) if first.parent is second.child else (second, first)
        start, ties = lower, (upper.parent, f"T2.{upper.key}")
    third, reference = ties
    ours, theirs = q.pick(rng, start.child, 2), rng.choice(start.parent.columns)
    test = q.condition(rng, schema, rng.choice(third.columns), alias="T3.", of=f"{third.singular} ")
    text = f"{rng.choice(q.SHOW)} the {q.shown(ours)} of each {start.child.singular}"
    sql = f"SELECT {q.names(ours, 'T1.')}"
    if rng.random() < 0.5:
        text += f" and the {q.owned(theirs, start.parent.singular + ' ')}"
        sql += f", T2.{theirs.name}"
        text += f" where the {test.words}"
    else:
        mid = q.condition(rng, schema, theirs, alias="T2.", of=f"{start.parent.singular} ")
        test = q.Condition(f"{mid.words} and the {test.words}", f"{mid.sql} AND {test.sql}")
        text += f" where the {test.words}"
    return q.closed(
        text
    ), f"{sql} {start.joined} JOIN {third.name} AS T3 ON {reference} = T3.{third.key} WHERE {test.sql}"


def union(rng: random.Random, schema: Schema) -> Pair | None:
    """The text values of two tables in one list."""
    if len(schema.tables) < 2:
        return None
    one, two = rng.sample(schema.tables, 2)
    first, second = f"{one.label.words} of all {one.plural}", f"{two.label.words} of all {two.plural}"
    text = f"{rng.choice(q.SHOW)} the {first} together with the {second}"
    return q.closed(text), f"SELECT {one.label.name} FROM {one.name} UNION SELECT {two.label.name} FROM {two.name}"


LINKED: tuple[tuple[Builder, int], ...] = (
    (join_filter, 30), (join_both, 22), (join_group, 20), (membership, 18), (join_three, 16), (union, 3),
)  # fmt: skip
"""Builders that need linked tables, and their weights."""
