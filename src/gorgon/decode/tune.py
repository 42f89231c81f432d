"""The `tune` step: rank and acceptance statistics, measured step times, and the drafter with the most tokens/s."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gorgon.artifacts import StepResult, StepRun, link_tree, machine, require_step_file, run_step, write_json
from gorgon.config import TuneConfig
from gorgon.core.phrasebook import Phrasebook
from gorgon.core.rank_stats import best_tree, count_prefixes
from gorgon.core.tree import DraftTree
from gorgon.data.chat import encode_answer, encode_prompt
from gorgon.data.examples import Example, read_examples
from gorgon.decode.calibrate import count_acceptance, record, write_answers
from gorgon.decode.candidates import Candidate, Replays, dynamic_candidates, heads_only, static_candidates
from gorgon.decode.drafts import StaticDrafter
from gorgon.decode.engine import PLAIN, Engine
from gorgon.decode.finalists import Finalist, choose_finalist, decode_finalists, pick_finalists
from gorgon.decode.load import load_engine
from gorgon.decode.threads import measure_threads, use_measured
from gorgon.decode.timing import StepCosts, step_times
from gorgon.decode.vocabulary import draft_vocabulary
from gorgon.errors import DataError
from gorgon.models.directory import HEADS_FILE, PHRASEBOOK_FILE, TREE_FORMAT
from gorgon.progress import say

SIZES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
HEADS_TRIED = (1, 2, 3)
"""Numbers of heads, beside all of them, that a dynamic tree may read: few are cheap, and with the context's and the
phrasebook's help often enough."""
HEADS_AT = 6
"""Nodes of the draft with which the cost of reading heads is measured."""
COUNTED_ROWS = 50_000
"""Training answers that are counted for the draft vocabulary and the phrasebook."""
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
        engine = load_engine(model, dtype=config.dtype, quantization=config.quantization, drafters=PLAIN, steps="eager")
        threads = measure_threads(engine.backbone)
        if threads:
            use_measured(threads)
        engine.backbone.run_steps(config.steps)
    with run.timed("answers"):
        pairs = _answers(engine, rows, config)
    with run.timed("statistics"):
        written = _training_answers(engine, rows.with_name("train.jsonl"))
        counted = Counter(token for answer in (*written, *(a for _, a in pairs)) for token in answer)
        vocabulary = draft_vocabulary(counted, config.draft_coverage, engine.backbone.vocab_size)
        if vocabulary is not None:
            vocabulary_U = torch.tensor(vocabulary, device=engine.backbone.device)
            engine = Engine(engine.backbone, engine.heads, PLAIN, vocabulary_U)
        phrasebook = Phrasebook.of(written if config.phrasebook else [])
        recordings = [record(engine, p, a, config.width) for p, a in pairs]
        counts = count_prefixes((p for r in recordings for p in r.positions), max_rank=config.max_rank)
        available = len(engine.heads or ())
        acceptances = [
            count_acceptance(recordings, k, config.width, phrasebook).fit()
            for k in sorted({*HEADS_TRIED, available} if config.dynamic else ())
            if k <= available
        ]
        trees = {tree.nodes: tree for tree in (best_tree(counts, n) for n in SIZES if n <= config.max_nodes)}
        replays = Replays(recordings, phrasebook, sorted(trees), config)
    entries: list[dict[str, Any]] = []
    finalists: dict[int, list[Finalist]] = {}
    considered: dict[int, list[Candidate]] = {}
    best_static: dict[int, Candidate] = {}
    costs: dict[int, StepCosts] = {}
    for batch in sorted(set(config.batch_sizes)):
        with run.timed(f"step times, batch {batch}"):
            costs[batch] = _measure(engine, trees, pairs, batch, config)
        with run.timed(f"choice, batch {batch}"):
            static = static_candidates(replays, costs[batch])
            dynamic = dynamic_candidates(replays, costs[batch], acceptances)
            chosen = pick_finalists(static, dynamic)
            finalists[batch] = decode_finalists(engine, chosen, recordings, batch, config)
        best_static[batch] = static[0]
        considered[batch] = sorted([*static, *dynamic], key=lambda c: -c.tokens_per_s)
        entries.append(_entry(batch, finalists[batch], costs[batch]))
        say(
            f"batch {batch}: {entries[-1]['nodes']} nodes, {entries[-1]['kind']}, {entries[-1]['tokens_per_step']:.2f} "
            f"tokens per step, {entries[-1]['measured_speedup']:.2f} times as fast as plain decoding"
        )
    link_tree(model, run.directory, skip=frozenset({"manifest.json"}))
    write_json(run.directory / PHRASEBOOK_FILE, phrasebook.as_json(), indent=None)
    positions = sum(len(r.positions) for r in recordings)
    first = min(costs)
    write_json(
        run.directory / "tree.json",
        {
            "format": TREE_FORMAT,
            "machine": machine(),
            "device": _device_name(engine),
            "dtype": str(engine.backbone.dtype).removeprefix("torch."),
            "quantization": engine.backbone.quantization,
            "threads": torch.get_num_threads(),
            "thread_ms": {str(count): round(ms, 4) for count, ms in threads.items()},
            "steps": engine.backbone.steps,
            "draft_vocabulary": vocabulary,
            "phrases": len(phrasebook.phrases),
            "trees": entries,
            "cost_curves": {
                str(b): [{"nodes": n, "step_ms": round(ms, 4)} for n, ms in sorted(c.by_nodes.items())]
                for b, c in costs.items()
            },
            "head_costs": {
                str(b): [{"heads": k, "step_ms": round(ms, 4)} for k, ms in sorted(c.by_heads.items())]
                for b, c in costs.items()
            },
            "best_static": best_static[first].describe(),
            "candidates": [c.as_json() for c in considered[first]],
            "finalists": {
                str(b): [
                    {
                        **f.candidate.as_json(),
                        "measured_tokens_per_s": round(f.tokens_per_s, 1),
                        "over_plain": [round(x, 3) for x in f.over_plain],
                    }
                    for f in found
                ]
                for b, found in finalists.items()
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
    shown = ("kind", "nodes", "heads", "mean_nodes", "tokens_per_step", "step_ms", "plain_step_ms")
    run.metrics.update(
        {key: single[key] for key in shown},
        calibration_positions=positions,
        draft_vocabulary=engine.backbone.vocab_size if vocabulary is None else len(vocabulary),
        phrases=len(phrasebook.phrases),
        speedup_by_batch={str(e["batch_size"]): e["measured_speedup"] for e in entries},
    )


def _entry(batch: int, finalists: Sequence[Finalist], costs: StepCosts) -> dict[str, Any]:
    """The chosen finalist as an entry of tree.json's `trees`."""
    best = choose_finalist(finalists)
    return {
        "batch_size": batch,
        **best.candidate.describe(),
        "tokens_per_step": round(best.candidate.tokens_per_step, 4),
        "mean_nodes": round(best.candidate.mean_nodes, 2),
        "step_ms": round(best.candidate.step_ms, 4),
        "plain_step_ms": round(costs.by_nodes[1], 4),
        "measured_speedup": round(best.speedup, 4),
    }


def _by_count(item: tuple[tuple[int, ...], int]) -> tuple[int, int, tuple[int, ...]]:
    path, count = item
    return (-count, len(path), path)


def _answers(engine: Engine, rows: Path, config: TuneConfig) -> list[tuple[list[int], list[int]]]:
    """Prompts and what the model writes on them: as `distill` recorded it, else written now.

    Raises: DataError when no prompt fits the model's context, or every answer is empty.
    """
    examples = read_examples(rows)
    random.Random(config.seed).shuffle(examples)
    prompts = [(encode_prompt(engine.backbone.tokenizer, e.messages), e.answer_ids) for e in examples]
    fitting = [(p, a) for p, a in prompts if len(p) + config.max_new_tokens <= engine.backbone.max_length]
    if not fitting:
        raise DataError("no validation prompt fits the model's context", file=rows)
    recorded = [(p, a) for p, a in fitting if a is not None and len(p) + len(a) <= engine.backbone.max_length]
    if len(recorded) == len(fitting):
        pairs = recorded[: config.prompts]
    else:
        chosen = [p for p, _ in fitting[: config.prompts]]
        title, together = "writing calibration answers", max(config.batch_sizes)
        pairs = list(zip(chosen, write_answers(engine, chosen, config.max_new_tokens, together, title), strict=True))
    pairs = [(p, a) for p, a in pairs if len(a) > 1]
    if not pairs:
        raise DataError("the model writes only empty answers to the validation prompts", file=rows)
    return pairs


def _training_answers(engine: Engine, rows: Path) -> list[list[int]]:
    """Token ids of the training split's answers, end tokens included; none without that split."""
    examples: list[Example] = read_examples(rows)[:COUNTED_ROWS] if rows.is_file() else []
    backbone = engine.backbone
    return [encode_answer(backbone.tokenizer, e, backbone.end_ids) for e in examples]


def _measure(
    engine: Engine,
    trees: Mapping[int, DraftTree],
    pairs: Sequence[tuple[list[int], list[int]]],
    batch: int,
    config: TuneConfig,
) -> StepCosts:
    """Step time of the best static tree of each size; fewer counted paths than nodes have made sizes fall together.

    All heads are read whatever the tree needs of them, so that nodes and heads are told apart.
    """
    available = len(engine.heads or ())
    engines = {
        ("nodes", n): engine.with_drafter(StaticDrafter(tree, available if n > 1 else 0)) for n, tree in trees.items()
    }
    star = DraftTree.of((rank,) for rank in range(min(HEADS_AT, config.max_nodes, config.width + 1) - 1))
    for heads in range(1, available + 1):
        engines["heads", heads] = engine.with_drafter(StaticDrafter(star, heads))
    prompts, longest = [p for p, _ in pairs], max(len(a) for _, a in pairs)
    times = step_times(engines, prompts, batch, config.trials, longest)
    by_nodes = {n: ms for (kind, n), ms in times.items() if kind == "nodes"}
    by_heads = {n: ms for (kind, n), ms in times.items() if kind == "heads"}
    if by_heads:  # a step without heads lies on the line through the others; timing noise must not bend it upwards
        by_heads[0] = max(0.0, by_heads[1] - max(0.0, (by_heads[available] - by_heads[1]) / max(1, available - 1)))
    return StepCosts(by_nodes, by_heads)


def _device_name(engine: Engine) -> str:
    device = engine.backbone.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(machine()["cpu"])
