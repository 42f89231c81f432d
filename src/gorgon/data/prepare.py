"""The `prepare` step: rows in, three disjoint splits of chat examples and their token statistics out."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gorgon import interrupts
from gorgon.artifacts import StepResult, StepRun, run_step, write_json
from gorgon.config import EMBEDDED, PrepareConfig
from gorgon.data.chat import encode_answer, encode_prompt, special_texts
from gorgon.data.examples import Example, write_examples
from gorgon.data.records import Record, make_plan, make_record
from gorgon.data.sources import EMBEDDED_ROWS, RawRow, load_embedded, load_file, load_hub
from gorgon.data.splits import assign_splits, group_rows, keys_of, normalise
from gorgon.errors import ConfigError, DataError, Interrupted, ModelError
from gorgon.progress import bar

SPLITS = ("train", "validation", "test")
STATS = "stats.json"
REASONS = {
    "duplicate": "they repeat an earlier row",
    "not_selected": "`rows` or `test_rows` asks for fewer",
    "special_token": "their text spells a control token of the tokenizer",
    "too_long": "they are longer than `max_length` tokens",
    "collision": "they share a question or schema with a given validation or test file",
}


def prepare(config: PrepareConfig, out: Path, *, tokenizer: Any, force: bool = False) -> StepResult:
    """Writes train.jsonl, validation.jsonl, test.jsonl and stats.json.

    Rows are read, freed of duplicates, shuffled by `seed`, cut to `rows`, measured, and split. `rows` counts rows of
    the main source before long ones are dropped; rows beyond it and test rows beyond `test_rows` are counted as
    `not_selected`. A validation or test file keeps its rows: those of the main source that share a disjoint value with
    one are dropped and counted as `collision` (and rows of the validation file that share one with the test file).
    Args: tokenizer: of `config.model`, with a chat template; the caller loads it.
    Raises: ConfigError when the sources contradict each other; DataError for bad rows or when none is left;
        ModelError when the chat template cannot hold the messages.
    """
    _check_sources(config)
    given = {name: getattr(config, name) for name in SPLITS}
    source = f"{EMBEDDED}, version 1" if config.dataset == EMBEDDED else config.dataset
    vocabulary = Path(str(getattr(tokenizer, "name_or_path", ""))) / "tokenizer.json"
    inputs = {"dataset": source, **given, "tokenizer": vocabulary if vocabulary.is_file() else None}
    return run_step("prepare", config, inputs, out, lambda run: _body(config, tokenizer, run), force=force)


def _check_sources(config: PrepareConfig) -> None:
    if (config.dataset is None) == (config.train is None):
        raise ConfigError(
            ["prepare needs exactly one of 'dataset' and 'train'"],
            hint="`--dataset embedded` needs no network; your own file: `--train rows.jsonl`",
        )
    held_out = sum(_fractions(config).values())
    if held_out >= 1:
        raise ConfigError([f"prepare.validation_fraction and test_fraction leave nothing to train on: {held_out:g}"])


def _fractions(config: PrepareConfig) -> dict[str, float]:
    """Held-out splits that must be made, and their shares."""
    wanted = {"validation": config.validation_fraction, "test": config.test_fraction}
    return {name: share for name, share in wanted.items() if getattr(config, name) is None}


def _body(config: PrepareConfig, tokenizer: Any, run: StepRun) -> None:
    dropped: Counter[str] = Counter()
    with run.timed("read"):
        sources = {"train": _load_main(config)}
        for name in ("validation", "test"):
            path = getattr(config, name)
            if path is not None:
                sources[name] = load_file(Path(path))
    with run.timed("records"):
        records = _records(config, sources, dropped, run.warnings)
    with run.timed("measure"):
        lengths: dict[str, tuple[int, int]] = {}
        records = _measure(config, tokenizer, records, lengths, dropped)
    splits = _split(config, records, dropped, run.warnings)
    _check_left(splits, dropped)
    for name in SPLITS:
        write_examples(run.directory / f"{name}.jsonl", (record.example for record in splits[name]))
    stats = {
        "tokenizer": config.model,
        "source_rows": {name: len(rows) for name, rows in sources.items()},
        "splits": {name: _statistics([lengths[r.example.id] for r in splits[name]]) for name in SPLITS},
        "dropped": {reason: dropped[reason] for reason in REASONS},
    }
    run.warnings += [
        f"{dropped[reason]} rows were dropped: {why}." for reason, why in REASONS.items()
        if dropped[reason] and reason != "not_selected"
    ]  # fmt: skip
    write_json(run.directory / STATS, stats)
    run.metrics.update(stats)


def _load_main(config: PrepareConfig) -> list[RawRow]:
    if config.train is not None:
        return load_file(Path(config.train))
    if config.dataset == EMBEDDED:
        return load_embedded(config.seed, config.rows or EMBEDDED_ROWS)
    return load_hub(str(config.dataset), config.dataset_split)


def _records(
    config: PrepareConfig, sources: Mapping[str, Sequence[RawRow]], dropped: Counter[str], warnings: list[str]
) -> dict[str, list[Record]]:
    """Examples of every source without duplicates; the given held-out files go first, so that they stay whole."""
    records: dict[str, list[Record]] = {}
    seen: set[str] = set()
    for name in sorted(sources, key=SPLITS.index, reverse=True):
        plan = make_plan(config, sources[name])
        warnings += [text for text in plan.warnings if text not in warnings]
        kept = []
        for row in sources[name]:
            record = make_record(config, plan, row)
            if record.example.id in seen:  # a hash of the contents
                dropped["duplicate"] += 1
                continue
            seen.add(record.example.id)
            kept.append(record)
        limit = {"train": config.rows, "test": config.test_rows}.get(name)
        if name == "train" or limit is not None:
            random.Random(f"rows {config.seed}").shuffle(kept)
        if limit is not None:
            dropped["not_selected"] += max(0, len(kept) - limit)
            kept = kept[:limit]
        records[name] = kept
    return records


def _measure(
    config: PrepareConfig,
    tokenizer: Any,
    records: Mapping[str, list[Record]],
    lengths: dict[str, tuple[int, int]],
    dropped: Counter[str],
) -> dict[str, list[Record]]:
    """Keeps the rows that fit; `lengths` gets (prompt, answer) in tokens for each id."""
    control = special_texts(tokenizer)
    total = sum(len(rows) for rows in records.values())
    checked = False
    kept: dict[str, list[Record]] = {name: [] for name in records}
    with bar("measuring rows", total) as progress:
        for name, rows in records.items():
            for record in rows:
                if interrupts.requested():
                    raise Interrupted("stopped while measuring rows; nothing was written")
                progress.advance()
                example = record.example
                texts = [*(message["content"] for message in example.messages), example.answer]
                if any(token in text for text in texts for token in control):
                    dropped["special_token"] += 1
                    continue
                if not checked:
                    _check_template(tokenizer, example)
                    checked = True
                prompt, answer = len(encode_prompt(tokenizer, example.messages)), len(encode_answer(tokenizer, example))
                if prompt + answer > config.max_length:
                    dropped["too_long"] += 1
                    continue
                lengths[example.id] = (prompt, answer)
                kept[name].append(record)
    return kept


def _check_template(tokenizer: Any, example: Example) -> None:
    """Templates may leave out a role without a word; the model would then never see the schema."""
    shown = normalise(tokenizer.decode(encode_prompt(tokenizer, example.messages)))
    for message in example.messages:
        if "".join(message["content"].casefold().split()) not in "".join(shown.split()):
            raise ModelError(
                f"the model's chat template drops the {message['role']} message", field="chat_template",
                value=message["content"][:80],
                hint="move it into the user message: --system null --user '{context} {question}'",
            )  # fmt: skip


def _split(
    config: PrepareConfig, records: Mapping[str, list[Record]], dropped: Counter[str], warnings: list[str]
) -> dict[str, list[Record]]:
    splits: dict[str, list[Record]] = {name: list(records.get(name, [])) for name in SPLITS}
    taken: set[tuple[int, str]] = set()
    for name in ("test", "validation", "train"):
        fitting = [r for r in splits[name] if taken.isdisjoint(keys_of(r.keys))]
        dropped["collision"] += len(splits[name]) - len(fitting)
        splits[name] = fitting
        taken.update(key for record in fitting for key in keys_of(record.keys))
    fractions = _fractions(config)
    main = splits["train"]
    if not main:
        raise DataError(f"no row is left to train on; dropped: {_reasons(dropped)}", field="train")
    if not fractions:
        return splits
    groups = group_rows([keys_of(record.keys) for record in main])
    splits["train"] = []
    for record, name in zip(main, assign_splits(groups, fractions, config.seed), strict=True):
        splits[name].append(record)
    for name, share in fractions.items():
        found = len(splits[name]) / len(main)
        if abs(found - share) > max(0.2 * share, 1 / len(main)):
            warnings.append(
                f"The {name} split holds {found:.1%} of the rows instead of {share:.1%}: "
                f"rows that share a {' or '.join(config.disjoint)} stay together."
            )
    if config.test is None and config.test_rows is not None:
        dropped["not_selected"] += max(0, len(splits["test"]) - config.test_rows)
        splits["test"] = splits["test"][: config.test_rows]
    return splits


def _check_left(splits: Mapping[str, list[Record]], dropped: Counter[str]) -> None:
    for name in SPLITS:
        if not splits[name]:
            raise DataError(
                f"no row is left in the {name} split; dropped: {_reasons(dropped)}", field=name,
                hint="raise max_length, or give more rows",
            )  # fmt: skip


def _reasons(dropped: Counter[str]) -> str:
    return ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in dropped.items() if count) or "none"


def _statistics(lengths: Sequence[tuple[int, int]]) -> dict[str, Any]:
    parts = {
        "prompt_tokens": [prompt for prompt, _ in lengths],
        "answer_tokens": [answer for _, answer in lengths],
        "total_tokens": [prompt + answer for prompt, answer in lengths],
    }
    return {"rows": len(lengths), **{name: summary(values) for name, values in parts.items()}}


def summary(values: Sequence[int]) -> dict[str, float]:
    """Mean, nearest-rank percentiles and maximum of at least one number."""
    ordered = sorted(values)
    percentiles = {f"p{p}": ordered[max(0, -(-p * len(ordered) // 100) - 1)] for p in (50, 90, 95, 99)}
    return {"mean": round(sum(ordered) / len(ordered), 2), **percentiles, "max": ordered[-1]}
