"""Concrete schemas of the synthetic sample: a random part of a domain, with drawn names, types and spelling."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

import yaml

from gorgon.data.sample import values

Kind = Literal["text", "date", "int", "real", "year"]


@dataclass(frozen=True)
class Column:
    """A drawn column: its name in SQL, in words, and how its values are drawn."""

    name: str
    words: str
    kind: Kind
    draw: Callable[[random.Random], str]
    repeats: bool

    @property
    def numeric(self) -> bool:
        """True where averages and comparisons make sense; years count as numbers, too."""
        return self.kind in ("int", "real", "year")


@dataclass(frozen=True)
class Table:
    """A drawn table. `columns` leaves out keys; `parents` maps a foreign-key column to the table it names."""

    name: str
    singular: str
    plural: str
    columns: tuple[Column, ...]
    key: str | None = None
    parents: dict[str, Table] = field(default_factory=dict)

    @property
    def label(self) -> Column:
        """The column that names a row for people."""
        return self.columns[0]


@dataclass(frozen=True)
class Schema:
    """Tables in the order in which `context` creates them, and the statement itself."""

    tables: tuple[Table, ...]
    context: str
    names: frozenset[str]


@dataclass(frozen=True)
class TableSpec:
    """A table of a domain before anything is drawn."""

    singular: str
    plural: str
    parents: tuple[str, ...]
    columns: tuple[tuple[tuple[str, ...], str | tuple[str, ...]], ...]


@functools.cache
def load_domains() -> dict[str, dict[str, dict[str, TableSpec]]]:
    """group -> domain -> table -> specification, from the packaged YAML file."""
    text = resources.files("gorgon.data.sample").joinpath("domains.yaml").read_text(encoding="utf-8")
    groups = yaml.safe_load(text)
    return {g: {d: _table_specs(tables) for d, tables in domains.items()} for g, domains in groups.items()}


def _table_specs(tables: dict[str, dict[str, Any]]) -> dict[str, TableSpec]:
    specs = {}
    for names, columns in tables.items():
        singular, plural = names.split("/")
        of = columns.get("of", [])
        parents = (of,) if isinstance(of, str) else tuple(of)
        listed = tuple(
            (tuple(synonyms.split("|")), tuple(kind) if isinstance(kind, list) else kind)
            for synonyms, kind in columns.items()
            if synonyms != "of"
        )
        specs[singular] = TableSpec(singular, plural, parents, listed)
    return specs


def _words(name: str) -> str:
    return name.replace("_", " ")


def _column(rng: random.Random, synonyms: tuple[str, ...], kind: str | tuple[str, ...]) -> Column:
    name = rng.choice(synonyms)
    if isinstance(kind, tuple):
        return Column(name, _words(name), "text", lambda r: r.choice(kind), repeats=True)
    base, *numbers = kind.split()
    if base in ("int", "real"):
        low, high, step = (float(n) for n in numbers)
        sort: Kind = "int" if base == "int" else "real"
        return Column(name, _words(name), sort, lambda r: values.number(r, low, high, step), repeats=False)
    if base == "year":
        return Column(name, _words(name), "year", lambda r: str(r.randint(1900, 2024)), repeats=True)
    return Column(
        name, _words(name), "date" if base == "date" else "text", values.TEXTS[base], base in values.REPEATING
    )


def _capitals(name: str) -> str:
    return "_".join(part[:1].upper() + part[1:] for part in name.split("_"))


@dataclass(frozen=True)
class _Style:
    spell: Callable[[str], str]
    plural_tables: bool
    bare_id: bool
    types: dict[str, str]


def _style(rng: random.Random) -> _Style:
    text = rng.choice(("VARCHAR", "VARCHAR", "TEXT"))
    whole = rng.choice(("INTEGER", "INTEGER", "INT"))
    types = {
        "text": text,
        "date": rng.choice((text, "DATE")),
        "int": whole,
        "year": whole,
        "real": rng.choice(("REAL", "DECIMAL", "FLOAT")),
    }
    spell = _capitals if rng.random() < 0.15 else str
    return _Style(spell, rng.random() < 0.4, rng.random() < 0.4, types)


def _pick_specs(rng: random.Random, domain: dict[str, TableSpec]) -> list[TableSpec]:
    """One table, a table with a parent, or three linked ones; parents stand before their children."""
    wanted = rng.choices((1, 2, 3), (35, 45, 20))[0]
    children = [spec for spec in domain.values() if spec.parents]
    if wanted == 1 or not children:
        return [rng.choice(list(domain.values()))]
    child = rng.choice(children)
    parent = domain[rng.choice(child.parents)]
    picked = [parent, child]
    if wanted == 3:
        others = [domain[name] for name in (*child.parents, *parent.parents)]
        others = [spec for spec in others if spec not in picked]
        if others:
            picked.insert(0, rng.choice(others))
    return picked


def draw_schema(rng: random.Random, domain: dict[str, TableSpec]) -> Schema:
    """A random schema over one domain.

    Invariant: no column name occurs twice in a table, and links only point to tables of the schema.
    """
    style, specs = _style(rng), _pick_specs(rng, domain)
    tables: dict[str, Table] = {}
    statements: dict[str, str] = {}
    for spec in specs:
        inner = range(1, len(spec.columns))
        keep = rng.sample(inner, min(len(inner), rng.randint(2, 4)))
        drawn = [_column(rng, *spec.columns[i]) for i in (0, *sorted(keep))]
        columns = tuple(Column(style.spell(c.name), c.words, c.kind, c.draw, c.repeats) for c in drawn)
        referred = any(spec.singular in other.parents for other in specs)
        key = style.spell("id" if style.bare_id else f"{spec.singular}_id") if referred else None
        parents = {style.spell(f"{p}_id"): tables[p] for p in spec.parents if p in tables}
        name = style.spell(spec.plural if style.plural_tables else spec.singular)
        table = Table(name, _words(spec.singular), _words(spec.plural), columns, key, parents)
        tables[spec.singular] = table
        parts = [f"{c.name} {style.types[c.kind]}" for c in columns]
        keys = [f"{k} {style.types['int']}" for k in ([key] if key else []) + list(parents)]
        rng.shuffle(parts)
        statements[table.name] = f"CREATE TABLE {table.name} ({', '.join(keys[:1] + parts + keys[1:])})"
    order = list(tables.values())
    rng.shuffle(order)
    names = {n.casefold() for t in order for n in (t.name, t.key or t.name, *t.parents, *(c.name for c in t.columns))}
    return Schema(tuple(order), "; ".join(statements[t.name] for t in order), frozenset(names))
