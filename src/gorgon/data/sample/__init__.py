"""The embedded text-to-SQL dataset: synthetic, seeded, made from word lists when asked for.

No row is real: schemas, questions and values are drawn from the lists in `domains.yaml` and `values.py`. The format
is that of the hub dataset b-mc2/sql-create-context. Domains come in two groups that share no table: the embedded
backbone was trained on `BACKBONE_DOMAINS`; `dataset: embedded` gives `SAMPLE_DOMAINS`, which it has never seen.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from gorgon.config import nearest
from gorgon.data.sample.joins import LINKED
from gorgon.data.sample.questions import SINGLE
from gorgon.data.sample.schema import Schema, draw_schema, load_domains
from gorgon.errors import DataError

BACKBONE_DOMAINS: tuple[str, ...] = tuple(load_domains()["backbone"])
"""Domains that trained the embedded backbone; never part of `dataset: embedded`."""

SAMPLE_DOMAINS: tuple[str, ...] = tuple(load_domains()["sample"])
"""Domains of `dataset: embedded`."""


def generate_rows(seed: int, rows: int, domains: Sequence[str] | None = None) -> list[dict[str, str]]:
    """`rows` different rows with the keys question, context (CREATE TABLE statements) and answer (one SELECT).

    Args: domains: names from BACKBONE_DOMAINS or SAMPLE_DOMAINS; None is all of SAMPLE_DOMAINS.
    Raises: DataError when a domain is unknown, none is given, or `rows` is negative.
    Invariant: every answer runs in SQLite on its own context; the same arguments give the same rows on every machine;
        fewer rows are a prefix of more rows.
    """
    known = {name: tables for group in load_domains().values() for name, tables in group.items()}
    chosen = list(SAMPLE_DOMAINS if domains is None else domains)
    for name in chosen:
        if name not in known:
            raise DataError(
                "unknown domain of the embedded sample", field="domains", value=name, hint=nearest(name, list(known))
            )
    if rows < 0 or not chosen:
        raise DataError("the embedded sample needs rows >= 0 and a domain", field="rows", value=rows)
    rng = random.Random(f"gorgon sample {seed}")  # a string is hashed by SHA-512: the same in every process
    found: list[dict[str, str]] = []
    seen: set[tuple[str, str]] = set()
    while len(found) < rows:
        schema = draw_schema(rng, known[rng.choice(chosen)])
        for _ in range(rng.randint(1, 2)):
            pair = draw_question(rng, schema)
            if pair is not None and (schema.context, pair[0]) not in seen:
                seen.add((schema.context, pair[0]))
                found.append({"question": pair[0], "context": schema.context, "answer": pair[1]})
    return found[:rows]


def draw_question(rng: random.Random, schema: Schema) -> tuple[str, str] | None:
    """A random question on a schema with its SQL, or None where the drawn kind does not fit the schema."""
    linked = len(schema.tables) > 1 and rng.random() < 0.75
    table = LINKED if linked else SINGLE
    builder, _ = rng.choices(table, [weight for _, weight in table])[0]
    return builder(rng, schema)
