"""The `tune` step: rank statistics, measured step times, and the draft tree that gives the most tokens per second."""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gorgon.artifacts import StepResult, StepRun, link_tree, machine, require_step_file, run_step, write_json
from gorgon.config import TuneConfig
from gorgon.core.rank_stats import Position, Replay, best_tree, count_prefixes, replay
from gorgon.core.tree import DraftTree
from gorgon.data.chat import encode_prompt
from gorgon.data.examples import read_examples
from gorgon.decode.calibrate import positions_of, write_answers
from gorgon.decode.engine import Engine, load_engine
from gorgon.errors import DataError, Interrupted
from gorgon.interrupts import requested
from gorgon.models.directory import HEADS_FILE
from gorgon.progress import say

SIZES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256)
COUNTED_ROWS = 20_000
"""Training answers whose tokens are counted for the draft vocabulary."""
MOST_OF = 0.75
"""A draft vocabulary above this share of the whole one saves too little to be worth a table."""
FINALISTS = 4
"""Candidates that are decoded for real before one is chosen; step times predict speed to a few percent only."""


@dataclass(frozen=True)
class Candidate:
    """A tree with what replaying and timing say about it."""

    tree: DraftTree
    replay: Replay
    step_ms: float

    @property
    def tokens_per_s(self) -> float:
        """Predicted decoding speed, prefill excluded."""
        return self.replay.tokens_per_step / self.step_ms * 1000

    def as_json(self) -> dict[str, Any]:
        """The row of tree.json's `candidates`."""
        return {
            "nodes": self.tree.nodes,
            "ngram": self.tree.ngram,
            "tokens_per_step": round(self.replay.tokens_per_step, 4),
            "step_ms": round(self.step_ms, 4),
            "tokens_per_s": round(self.tokens_per_s, 1),
        }


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
    engine = load_engine(model, dtype=config.dtype, tree=DraftTree(), traced=True)
    prompts = _prompts(engine, rows, config)
    with run.timed("answers"):
        answers = write_answers(engine, prompts, config.max_new_tokens, "writing calibration answers")
    pairs = [(p, a) for p, a in zip(prompts, answers, strict=True) if len(a) > 1]
    if not pairs:
        raise DataError("the model writes only empty answers to the validation prompts", file=rows)
    with run.timed("statistics"):
        counted = count_tokens(engine, rows.with_name("train.jsonl"), [a for _, a in pairs])
        vocabulary = draft_vocabulary(counted, config.draft_coverage, engine.backbone.vocab_size)
        if vocabulary is not None:
            vocabulary_U = torch.tensor(vocabulary, device=engine.backbone.device)
            engine = Engine(engine.backbone, engine.heads, engine.tree, vocabulary_U)
        texts = [positions_of(engine, p, a) for p, a in pairs]
    counts = count_prefixes((p for text in texts for p in text), max_rank=config.max_rank)
    with run.timed("step times"):
        curve = measure_steps(engine, counts, pairs, config)
    with run.timed("choice"):
        candidates = candidates_of(texts, curve, config)
        speeds = _decode_finalists(engine, candidates, pairs, config)
    best = max(speeds, key=lambda pair: pair[1])[0]
    plain = curve[1]
    positions = sum(len(text) for text in texts)
    link_tree(model, run.directory, skip=frozenset({"manifest.json"}))
    write_json(
        run.directory / "tree.json",
        {
            "format": 1,
            "machine": machine(),
            "device": _device_name(engine),
            "dtype": str(engine.backbone.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "draft_vocabulary": vocabulary,
            "trees": [
                {
                    "batch_size": 1,
                    "paths": [list(path) for path in best.tree.paths],
                    "ngram": best.tree.ngram,
                    "nodes": best.tree.nodes,
                    "tokens_per_step": round(best.replay.tokens_per_step, 4),
                    "step_ms": round(best.step_ms, 4),
                    "plain_step_ms": round(plain, 4),
                }
            ],
            "cost_curve": [{"nodes": n, "step_ms": round(ms, 4)} for n, ms in sorted(curve.items())],
            "candidates": [c.as_json() for c in candidates],
            "finalists": [{**c.as_json(), "measured_tokens_per_s": round(speed, 1)} for c, speed in speeds],
            "best_by_nodes": [_heads_only(texts, counts, n) for n in sorted(curve)],
            "rank_statistics": {
                "positions": positions,
                "paths": [
                    {"path": list(path), "share": round(count / positions, 5)}
                    for path, count in sorted(counts.items(), key=lambda item: (-item[1], len(item[0]), item[0]))[:512]
                ],
            },
        },
    )
    run.metrics.update(
        nodes=best.tree.nodes, ngram=best.tree.ngram, tokens_per_step=round(best.replay.tokens_per_step, 4),
        step_ms=round(best.step_ms, 4), plain_step_ms=round(plain, 4), calibration_positions=positions,
        draft_vocabulary=engine.backbone.vocab_size if vocabulary is None else len(vocabulary),
    )  # fmt: skip
    say(
        f"tuned tree: {best.tree.nodes} nodes ({best.tree.ngram} of them n-gram), "
        f"{best.replay.tokens_per_step:.2f} tokens per step, step time {best.step_ms / plain:.2f}x plain"
    )


def count_tokens(engine: Engine, rows: Path, answers: Sequence[list[int]]) -> Counter[int]:
    """How often each token occurs in reference answers of the training split, and in answers the model wrote."""
    counts = Counter(token for answer in answers for token in answer)
    tokenizer = engine.backbone.tokenizer
    if rows.is_file():
        texts = [example.answer for example in read_examples(rows)[:COUNTED_ROWS]]
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []:
            counts.update(ids)
    return counts


def draft_vocabulary(counts: Counter[int], coverage: float, size: int) -> list[int] | None:
    """The fewest tokens that make up `coverage` of all occurrences, in order of id; None when they are most of `size`.

    Source: frequency-ranked draft vocabularies, FR-Spec, arXiv:2502.14856. Lossless, because the backbone verifies
    over its whole vocabulary: a token outside is never drafted, and costs a step where it occurs.
    """
    wanted, taken, chosen = coverage * counts.total(), 0, []
    for token, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if taken >= wanted:
            break
        taken += count
        chosen.append(token)
    return None if coverage >= 1 or len(chosen) > MOST_OF * size else sorted(chosen)


def _prompts(engine: Engine, rows: Path, config: TuneConfig) -> list[list[int]]:
    examples = read_examples(rows)
    random.Random(config.seed).shuffle(examples)
    prompts = [encode_prompt(engine.backbone.tokenizer, e.messages) for e in examples]
    fitting = [p for p in prompts if len(p) + config.max_new_tokens <= engine.backbone.max_length]
    if not fitting:
        raise DataError("no validation prompt fits the model's context", file=rows)
    return fitting[: config.prompts]


def _heads_only(texts: Sequence[Sequence[Position]], counts: Counter[tuple[int, ...]], nodes: int) -> dict[str, Any]:
    """Tokens per step of the best tree of this size without n-gram branch: the figure that no machine changes."""
    tree = best_tree(counts, nodes)
    return {"nodes": nodes, "paths": len(tree.paths), "tokens_per_step": round(replay(texts, tree).tokens_per_step, 4)}


def measure_steps(
    engine: Engine,
    counts: Counter[tuple[int, ...]],
    pairs: Sequence[tuple[list[int], list[int]]],
    config: TuneConfig,
) -> dict[int, float]:
    """Median time of one step, in ms, for the best tree of each size; sizes interleaved so that noise hits all alike.

    Timed as decoding does it: heads, drafts, verification, acceptance and commit, on calibration prompts.
    """
    sizes = [n for n in SIZES if n <= config.max_nodes]
    engines = {n: engine.with_tree(best_tree(counts, n)) for n in sizes}
    engines = {e.tree.nodes: e for e in engines.values()}  # fewer counted paths than nodes: sizes fall together
    samples: dict[int, list[float]] = {n: [] for n in engines}
    chosen = pairs[:4]
    for trial in range(config.trials + 1):
        for nodes, sized in engines.items():
            if requested():
                raise Interrupted("stopped while timing", hint="the same command starts this step again")
            for prompt_ids, answer_ids in chosen:
                generation = sized.generate(prompt_ids, max_new_tokens=len(answer_ids))
                if trial and generation.step_tokens:  # the first pass warms up
                    spent = generation.seconds - generation.first_token_s
                    samples[nodes].append(spent / len(generation.step_tokens) * 1000)
    return {nodes: statistics.median(values) for nodes, values in samples.items() if values}


def step_ms(curve: dict[int, float], nodes: int) -> float:
    """Step time at a size between the measured ones, by linear interpolation; flat beyond the ends."""
    sizes = sorted(curve)
    above = next((n for n in sizes if n >= nodes), sizes[-1])
    below = max((n for n in sizes if n <= nodes), default=sizes[0])
    if above == below:
        return curve[above]
    share = (nodes - below) / (above - below)
    return curve[below] * (1 - share) + curve[above] * share


def candidates_of(texts: Sequence[Sequence[Position]], curve: dict[int, float], config: TuneConfig) -> list[Candidate]:
    """Every size with every length of the n-gram branch, fastest first; the one-node tree is always among them."""
    candidates = []
    flat = [p for text in texts for p in text]
    for ngram in sorted(set(config.ngram_lengths) | {0}):
        counts = count_prefixes(flat, max_rank=config.max_rank, ngram=ngram)
        for nodes in sorted({*curve, *(n + ngram for n in curve)}):
            if not ngram < nodes <= max(curve):
                continue
            tree = best_tree(counts, nodes, ngram=ngram)
            result = replay(texts, tree)
            short = step_ms(curve, tree.nodes - ngram)
            total = result.steps_with_ngram * step_ms(curve, tree.nodes) + result.steps_without * short
            candidates.append(Candidate(tree, result, total / result.steps))
    return sorted(candidates, key=lambda c: (-c.tokens_per_s, c.tree.nodes))


def _decode_finalists(
    engine: Engine,
    candidates: Sequence[Candidate],
    pairs: Sequence[tuple[list[int], list[int]]],
    config: TuneConfig,
) -> list[tuple[Candidate, float]]:
    """Measured tokens per second of the best candidates and of plain decoding, interleaved, best of the medians."""
    plain = next(c for c in candidates if c.tree.nodes == 1)
    finalists = [*candidates[:FINALISTS], *([] if plain in candidates[:FINALISTS] else [plain])]
    engines = [engine.with_tree(c.tree) for c in finalists]
    chosen = pairs[:16]
    speeds: list[list[float]] = [[] for _ in finalists]
    for trial in range(config.trials + 1):
        for index, sized in enumerate(engines):
            if requested():
                raise Interrupted("stopped while timing", hint="the same command starts this step again")
            start = time.perf_counter()
            tokens = sum(len(sized.generate(p, max_new_tokens=len(a)).token_ids) for p, a in chosen)
            if trial:
                speeds[index].append(tokens / (time.perf_counter() - start))
    return [(c, statistics.median(s)) for c, s in zip(finalists, speeds, strict=True)]


def _device_name(engine: Engine) -> str:
    device = engine.backbone.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else machine()["cpu"]
