"""How good the answers are, apart from how fast they come: compared with the references, and run as SQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gorgon.bench.sql import SqlOutcome, is_schema, run_sql
from gorgon.bench.workload import Prompt


@dataclass(frozen=True)
class RowQuality:
    """One answer against its reference; `sql` is None for a row without a schema, or when SQL is turned off."""

    exact: bool
    sql: SqlOutcome | None
    reference_sql: SqlOutcome | None


def same_text(answer: str, reference: str) -> bool:
    """Equal after runs of whitespace count as one space and none at either end."""
    return answer.split() == reference.split()


def judge(prompt: Prompt, answer: str, *, sql: bool) -> RowQuality:
    """Compares one answer with its reference, and runs both on the row's schema where it has one."""
    exact = same_text(answer, prompt.reference)
    if not sql or not is_schema(prompt.context):
        return RowQuality(exact, None, None)
    schema = prompt.context or ""
    return RowQuality(exact, run_sql(schema, answer), run_sql(schema, prompt.reference))


def summarize_quality(
    prompts: Sequence[Prompt], rows: Sequence[RowQuality], other_texts: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Shares between 0 and 1. The SQL shares are over rows with a schema; they are None when there are none.

    Args: rows: our answers, judged; other_texts: decoder name -> its texts, for their exact match beside ours.
    """
    with_sql = [r for r in rows if r.sql is not None]
    ran = [r for r in with_sql if r.sql is not None and r.sql.runs]
    references = [r for r in with_sql if r.reference_sql is not None and r.reference_sql.runs]
    return {
        "rows": len(rows),
        "exact_match": sum(r.exact for r in rows) / len(rows),
        "exact_match_of": {
            name: sum(same_text(t, p.reference) for t, p in zip(texts, prompts, strict=True)) / len(prompts)
            for name, texts in other_texts.items()
        },
        "sql_rows": len(with_sql),
        "sql_runs": len(ran) / len(with_sql) if with_sql else None,
        "reference_runs": len(references) / len(with_sql) if with_sql else None,
    }
