"""The `tune` step: rank and acceptance statistics, measured step times, and the drafter with the most tokens/s."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gorgon.artifacts import StepResult, StepRun, link_tree, machine, require_step_file, run_step, write_json
from gorgon.config import TuneConfig
from gorgon.core.rank_stats import best_tree, count_prefixes
from gorgon.data.chat import encode_prompt
from gorgon.data.examples import read_examples
from gorgon.decode.calibrate import Recording, count_acceptance, record, write_answers
from gorgon.decode.candidates import Candidate, TextCounts, dynamic_candidates, heads_only, static_candidates
from gorgon.decode.drafts import StaticDrafter
from gorgon.decode.engine import PLAIN, Engine
from gorgon.decode.load import load_engine
from gorgon.decode.timing import step_times
from gorgon.decode.vocabulary import count_tokens, draft_vocabulary
from gorgon.errors import DataError, Interrupted
from gorgon.interrupts import requested
from gorgon.models.directory import HEADS_FILE, TREE_FORMAT
from gorgon.progress import say

SIZES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
FINALISTS = 3
"""Candidates of each kind that are decoded for real before one is chosen; predictions err by a few percent."""
SHOWN = 512
"""Rank prefixes that tree.json keeps."""


def tune(config: TuneConfig, out: Path, *, force: bool = False) -> StepResult:
    """Writes the model directory again, with `tree.json` in it.

    Raises: DataError without validation rows; what loading and decoding raise.
    """
    heads = require_step_file(config.model, HEADS_FILE, field="model", step="train-heads")
    rows = require_step_file(config.data, "validation.jsonl", field="data", step="prepare")
    counted = rows.with_name("train.jsonl")
    inputs = {"model": heads.parent, "data": rows, "train": counted if counted.is_file() else None}
    return run_step(
        "tune", config, inputs, out,
        lambda run: _body(config, heads.parent, rows, run), force=force,
    )  # fmt: skip


def _body(config: TuneConfig, model: Path, rows: Path, run: StepRun) -> None:
    with run.timed("load"):
        engine = load_engine(
            model, dtype=config.dtype, quantization=config.quantization, drafters=PLAIN, steps=config.steps
        )
    prompts = _prompts(engine, rows, config)
    with run.timed("answers"):
        answers = write_answers(
            engine, prompts, config.max_new_tokens, max(config.batch_sizes), "writing calibration answers"
        )
    pairs = [(p, a) for p, a in zip(prompts, answers, strict=True) if len(a) > 1]
    if not pairs:
        raise DataError("the model writes only empty answers to the validation prompts", file=rows)
    with run.timed("statistics"):
        counted = count_tokens(engine, rows.with_name("train.jsonl"), [a for _, a in pairs])
        vocabulary = draft_vocabulary(counted, config.draft_coverage, engine.backbone.vocab_size)
        if vocabulary is not None:
            vocabulary_U = torch.tensor(vocabulary, device=engine.backbone.device)
            engine = Engine(engine.backbone, engine.heads, PLAIN, vocabulary_U)
        recordings = [record(engine, p, a, config.width) for p, a in pairs]
        counts = count_prefixes((p for r in recordings for p in r.positions), max_rank=config.max_rank)
        rates = count_acceptance(recordings, len(engine.heads or ())).rates()
    entries: list[dict[str, Any]] = []
    found: dict[int, list[tuple[Candidate, float]]] = {}
    considered: dict[int, list[Candidate]] = {}
    best_static: dict[int, Candidate] = {}
    curves: dict[int, dict[int, float]] = {}
    for batch in sorted(set(config.batch_sizes)):
        with run.timed(f"step times, batch {batch}"):
            curves[batch] = curve = _measure(engine, counts, [p for p, _ in pairs], batch, config)
        with run.timed(f"choice, batch {batch}"):
            static = static_candidates(recordings, curve, config)
            dynamic = dynamic_candidates(recordings, curve, rates, config) if config.dynamic else []
            plain = next(c for c in static if c.plain)
            finalists = [*static[:FINALISTS], *dynamic[:FINALISTS]]
            finalists += [] if any(c.plain for c in finalists) else [plain]
            found[batch] = _decode(engine, finalists, recordings, batch, config)
        best_static[batch] = static[0]
        considered[batch] = sorted([*static, *dynamic], key=lambda c: -c.tokens_per_s)
        best, speed = max(found[batch], key=lambda pair: pair[1])
        plain_speed = next(s for c, s in found[batch] if c.plain)
        entries.append({
            "batch_size": batch,
            **best.describe(),
            "tokens_per_step": round(best.tokens_per_step, 4),
            "mean_nodes": round(best.mean_nodes, 2),
            "step_ms": round(best.step_ms, 4),
            "plain_step_ms": round(curve[1], 4),
            "measured_speedup": round(speed / plain_speed, 4),
        })  # fmt: skip
        say(
            f"batch {batch}: {best.drafter.nodes} nodes, {entries[-1]['kind']}, {best.tokens_per_step:.2f} tokens per "
            f"step, step time {best.step_ms / curve[1]:.2f}x plain, {speed / plain_speed:.2f} times as fast as plain"
        )
    link_tree(model, run.directory, skip=frozenset({"manifest.json"}))
    positions = sum(len(r.positions) for r in recordings)
    first = min(curves)
    write_json(
        run.directory / "tree.json",
        {
            "format": TREE_FORMAT,
            "machine": machine(),
            "device": _device_name(engine),
            "dtype": str(engine.backbone.dtype).removeprefix("torch."),
            "quantization": engine.backbone.quantization,
            "threads": torch.get_num_threads(),
            "steps": engine.backbone.steps,
            "draft_vocabulary": vocabulary,
            "acceptance": [[[round(rate, 4) for rate in row] for row in rows_] for rows_ in rates],
            "trees": entries,
            "cost_curves": {
                str(b): [{"nodes": n, "step_ms": round(ms, 4)} for n, ms in sorted(c.items())]
                for b, c in curves.items()
            },
            "best_static": best_static[first].describe(),
            "candidates": [c.as_json() for c in considered[first]],
            "finalists": {
                str(b): [{**c.as_json(), "measured_tokens_per_s": round(speed, 1)} for c, speed in pairs_]
                for b, pairs_ in found.items()
            },
            "best_by_nodes": [heads_only(recordings, counts, n) for n in SIZES if n <= config.max_nodes],
            "rank_statistics": {
                "positions": positions,
                "paths": [
                    {"path": list(path), "share": round(count / positions, 5)}
                    for path, count in sorted(counts.items(), key=_by_count)[:SHOWN]
                ],
            },
        },
    )
    single = entries[0]
    run.metrics.update(
        {key: single[key] for key in ("kind", "nodes", "mean_nodes", "tokens_per_step", "step_ms", "plain_step_ms")},
        calibration_positions=positions,
        draft_vocabulary=engine.backbone.vocab_size if vocabulary is None else len(vocabulary),
        speedup_by_batch={str(e["batch_size"]): e["measured_speedup"] for e in entries},
    )


def _by_count(item: tuple[tuple[int, ...], int]) -> tuple[int, int, tuple[int, ...]]:
    path, count = item
    return (-count, len(path), path)


def _prompts(engine: Engine, rows: Path, config: TuneConfig) -> list[list[int]]:
    examples = read_examples(rows)
    random.Random(config.seed).shuffle(examples)
    prompts = [encode_prompt(engine.backbone.tokenizer, e.messages) for e in examples]
    fitting = [p for p in prompts if len(p) + config.max_new_tokens <= engine.backbone.max_length]
    if not fitting:
        raise DataError("no validation prompt fits the model's context", file=rows)
    return fitting[: config.prompts]


def _measure(
    engine: Engine, counts: TextCounts, prompts: Sequence[list[int]], batch: int, config: TuneConfig
) -> dict[int, float]:
    """Step time of the best static tree of each size; fewer counted paths than nodes make sizes fall together."""
    trees = [best_tree(counts, n) for n in SIZES if n <= config.max_nodes]
    engines = {tree.nodes: engine.with_drafter(StaticDrafter(tree)) for tree in trees}
    return step_times(engines, prompts[: max(batch, 4)], batch, config.trials)


def _decode(
    engine: Engine,
    candidates: Sequence[Candidate],
    recordings: Sequence[Recording],
    batch: int,
    config: TuneConfig,
) -> list[tuple[Candidate, float]]:
    """Measured tokens per second of each candidate on whole answers, prefill included; candidates take turns."""
    engines = [engine.with_drafter(c.drafter) for c in candidates]
    chosen = recordings[: max(16, 2 * batch)]
    prompts, longest = [r.prompt_ids for r in chosen], max(len(r.answer_ids) for r in chosen)
    speeds: list[list[float]] = [[] for _ in candidates]
    for trial in range(config.trials + 1):
        for index, one in enumerate(engines):
            if requested():
                raise Interrupted("stopped while timing", hint="the same command starts this step again")
            start = time.perf_counter()
            tokens = sum(len(g.token_ids) for g in one.generate(prompts, max_new_tokens=longest, together=batch))
            if trial:
                speeds[index].append(tokens / (time.perf_counter() - start))
    return [(c, statistics.median(s)) for c, s in zip(candidates, speeds, strict=True)]


def _device_name(engine: Engine) -> str:
    device = engine.backbone.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(machine()["cpu"])
