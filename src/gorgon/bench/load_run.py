"""`gorgon bench URL`: prompts, warm-up, the levels one after another, and the result's files."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gorgon.artifacts import storage_errors, write_json
from gorgon.bench.load import Level, run_level
from gorgon.bench.load_client import Api, HttpTransport, Outcome, Transport, body_of
from gorgon.bench.load_report import render, summarize
from gorgon.decode.prompts import conversation, read_prompts
from gorgon.errors import DataError, GorgonError
from gorgon.progress import bar, say

BUILT_IN = (
    ("CREATE TABLE head (age INTEGER, name VARCHAR)", "How many heads are older than 56?"),
    (
        "CREATE TABLE city (name VARCHAR, country VARCHAR, population INTEGER)",
        "List the cities of France by population.",
    ),
    ("CREATE TABLE singer (singer_id INTEGER, name VARCHAR, age INTEGER)", "What is the average age of all singers?"),
    ("CREATE TABLE pet (pet_id INTEGER, kind VARCHAR, weight REAL)", "How much does the heaviest dog weigh?"),
)
"""Asked when no prompts are given."""


def bench(
    url: str,
    *,
    api: Api = "openai",
    levels: Sequence[Level],
    prompts: Path | None = None,
    model: str | None = None,
    api_key: str | None = None,
    max_tokens: int = 128,
    warmup: int = 4,
    timeout_s: float = 120.0,
    reference: Path | None = None,
    extra: Mapping[str, Any] | None = None,
    out: Path | None = None,
    seed: int = 0,
    connect: Callable[[], Transport] | None = None,
) -> dict[str, Any]:
    """Runs the levels against the server and returns the result; `out` gets load.json, load.html and answers.jsonl.

    Answers are compared with the reference file if there is one, else with those of the first level.
    Args:
        reference: JSONL, a row per prompt in order, its answer in 'text' or 'answer'.
        connect: makes a client's connection; HTTP to the URL unless given.
    Raises: GorgonError when the server cannot be reached or refuses a first request; DataError for bad files.
    """
    chats = [conversation(q, s) for s, q in BUILT_IN] if prompts is None else read_prompts(prompts, None)
    bodies = [body_of(c, api, model=model, max_tokens=max_tokens, extra=extra or {}) for c in chats]
    expected = None if reference is None else read_reference(reference, len(bodies))
    connect = connect or (lambda: HttpTransport(url, api, api_key, timeout_s))
    _try(url, connect(), bodies[0])
    rows = []
    with bar("load", warmup + sum(level.requests for level in levels)) as progress:
        run_level(Level(warmup), bodies, connect, done=progress.advance)
        answers: dict[int, str] = {}
        for level in levels:
            progress.note(level.name)
            outcomes = run_level(level, bodies, connect, seed=seed, done=progress.advance)
            if not answers:
                answers = _texts(outcomes)
            rows.append(summarize(level, outcomes, answers if expected is None else expected))
            say(_line(rows[-1]))
    document = {
        "url": url, "api": api, "model": model, "prompts": len(bodies), "max_tokens": max_tokens, "warmup": warmup,
        "compared_with": "first level" if reference is None else reference.name,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "levels": rows,
    }  # fmt: skip
    if out is not None:
        with storage_errors(out):
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "load.json", document)
            (out / "load.html").write_text(render(document), encoding="utf-8")
            lines = [json.dumps({"prompt": i, "text": answers.get(i)}, ensure_ascii=False) for i in range(len(bodies))]
            (out / "answers.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return document


def read_reference(path: Path, prompts: int) -> dict[int, str]:
    """Text by prompt.

    Raises: DataError for a missing file, a row without text, or another number of rows than prompts.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise DataError("no such text file", file=path) from error
    if len(lines) != prompts:
        raise DataError("the reference has another number of rows than there are prompts", file=path,
                        value=len(lines), allowed=str(prompts))  # fmt: skip
    texts = {}
    for index, line in enumerate(lines):
        try:
            row = json.loads(line)
            text = row.get("text", row.get("answer"))
        except (ValueError, AttributeError) as error:
            raise DataError("not a JSON object", file=path, line=index + 1) from error
        if text is None:  # a prompt without an answer is not compared
            continue
        if not isinstance(text, str):
            raise DataError("'text' must be text", file=path, line=index + 1, field="text", value=text)
        texts[index] = text
    return texts


def _try(url: str, transport: Transport, body: Mapping[str, Any]) -> None:
    """One request before all others, so that a wrong address or key is an error and not a table of errors."""
    try:
        for _ in transport.lines(body):
            pass
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise GorgonError(f"the server cannot be reached: {reason}", field="url", value=url,
                          hint="is it running, and is the address right?") from error  # fmt: skip
    finally:
        transport.close()


def _texts(outcomes: Sequence[Outcome]) -> dict[int, str]:
    return {o.prompt: o.text for o in reversed(outcomes) if not o.error}


def _line(row: Mapping[str, Any]) -> str:
    latency = row["latency_ms"] or {"p50": 0.0, "p90": 0.0, "p99": 0.0}
    text = (f"{row['level']:<14} {row['tokens_per_s']:8.1f} tokens/s   p50 {latency['p50']:.1f} ms   "
            f"p90 {latency['p90']:.1f}   p99 {latency['p99']:.1f}")  # fmt: skip
    if "tokens_per_step" in row:
        text += f"   {row['tokens_per_step']:.2f} tokens per step"
    if row["errors"]:
        text += f"   errors: {', '.join(f'{count} x {kind}' for kind, count in row['errors'].items())}"
    return text + (f"   exact match {row['exact_match']:.4f}" if row.get("exact_match") is not None else "")
