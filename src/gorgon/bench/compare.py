"""The `compare` step: measures, checks, judges, and writes summary.json, answers.jsonl and report.html."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gorgon.artifacts import StepResult, StepRun, provenance, read_manifest, require_step_file, run_step, write_json
from gorgon.bench.contestants import Contestants
from gorgon.bench.decoders import MEDUSA, PLAIN, TRANSFORMERS, top_margin
from gorgon.bench.facts import head_facts, single_request, tuned_facts
from gorgon.bench.measure import Series, measure
from gorgon.bench.quality import RowQuality, judge, summarize_quality
from gorgon.bench.report import render
from gorgon.bench.summary import (
    accepted_histogram,
    accepted_nodes,
    prompt_medians,
    speedup,
    timing_summary,
    tokens_per_step,
)
from gorgon.bench.workload import Prompt, load_prompts
from gorgon.config import CompareConfig
from gorgon.core.tree import DraftTree
from gorgon.errors import DataError, GorgonError
from gorgon.models.directory import is_imported
from gorgon.progress import say

MARGINS = 20
"""Differing answers whose logit margin is computed: each costs a forward over the whole answer."""


def compare(config: CompareConfig, out: Path, *, force: bool = False) -> StepResult:
    """Plain decoding, Medusa decoding and `transformers.generate` on the same test prompts, in one run.

    Writes summary.json, answers.jsonl (one line per prompt) and report.html.
    Raises: GorgonError when model or data are missing or lack a file that an earlier step writes; LimitError when a
        prompt does not fit; Interrupted; what loading the model raises.
    """
    tree_file = require_step_file(config.model, "tree.json", field="model", step="tune")
    test_file = require_step_file(config.data, "test.jsonl", field="data", step="prepare")

    trained = not is_imported(tree_file.parent)
    if trained:
        require_step_file(config.model, "heads.json", field="model", step="train-heads")

    def body(run: StepRun) -> None:
        tuned = read_document(tree_file, "trees", "tune")
        heads: dict[str, Any] = {"evaluations": []}
        if trained:
            heads = read_document(tree_file.with_name("heads.json"), "evaluations", "train-heads")
        with run.timed("load"):
            contestants = Contestants.load(
                tree_file.parent, dtype=config.dtype, quantization=config.quantization, steps=config.steps,
                extra={size: best_tree(tuned, size) for size in config.extra_nodes},
            )  # fmt: skip
            backbone = contestants.engine.backbone
            prompts = load_prompts(
                test_file, backbone.tokenizer, limit=config.prompts, seed=config.seed,
                max_length=backbone.max_length, max_new_tokens=config.max_new_tokens,
            )  # fmt: skip
        with run.timed("measure"):
            series = measure(
                contestants.decoders, prompts, max_new_tokens=config.max_new_tokens, stop=config.stop,
                trials=config.trials, warmup_prompts=config.warmup_prompts,
            )  # fmt: skip
        with run.timed("judge"):
            rows = [
                judge(p, a.text, sql=config.sql) for p, a in zip(prompts, series[MEDUSA].answers, strict=True)
            ]  # fmt: skip
        facts = tree_facts(series[MEDUSA], contestants, prompts[0], tuned)
        summary = summarize(config, series, prompts, rows, facts, heads)
        summary |= {"model": contestants.facts(), "data": data_facts(test_file, len(prompts))}
        summary["differing"] = differing(series, prompts, contestants)
        answers = answer_lines(series, prompts, rows, contestants)
        write_json(run.directory / "summary.json", summary)
        with (run.directory / "answers.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in answers)
        page = render(summary, answers, examples=config.examples)
        (run.directory / "report.html").write_text(page, encoding="utf-8")
        run.metrics |= {
            key: summary[key] for key in ("exact_match", "speedup", "tokens_per_step", "latency_ms", "tokens_per_s")
        }
        if summary["exact_match"] < 1:
            count = len({d.prompt for d in series[MEDUSA].differences})
            run.warnings.append(f"{count} answers differ from plain decoding")
        say(
            f"{summary['speedup']['vs_plain']:.2f} times as fast as plain decoding, "
            f"{summary['speedup']['vs_transformers']:.2f} times as transformers.generate; "
            f"{summary['tokens_per_step']:.2f} tokens per step; same answers: {100 * summary['exact_match']:.1f} %"
        )

    inputs = {"model": config.model, "data": config.data}
    return run_step("compare", config, inputs, out, body, force=force)


def read_document(path: Path, key: str, step: str) -> dict[str, Any]:
    """A JSON file of an earlier step.

    Raises: DataError when it is not JSON, or `key` is missing or empty.
    """
    try:
        loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        present = bool(loaded.get(key))
    except (ValueError, AttributeError) as error:
        raise DataError("not valid JSON", file=path, hint=f"run `gorgon {step}` again") from error
    if not present:
        raise DataError("an entry is missing or empty", file=path, field=key, hint=f"run `gorgon {step}` again")
    return loaded


def best_tree(tuned: Mapping[str, Any], size: int) -> DraftTree:
    """The best tree of `size` nodes that has the heads' drafts alone, by the rank statistics in tree.json.

    Raises: GorgonError when the statistics hold too few paths.
    """
    ranked = sorted(tuned["rank_statistics"]["paths"], key=lambda p: (-p["share"], len(p["path"]), p["path"]))
    if not 2 <= size <= len(ranked) + 1:
        raise GorgonError(
            "no such tree in the rank statistics", field="extra_nodes", value=size,
            allowed=f"2 to {len(ranked) + 1}",
        )  # fmt: skip
    return DraftTree.of(p["path"] for p in ranked[: size - 1])


def summarize(
    config: CompareConfig,
    series: Mapping[str, Series],
    prompts: Sequence[Prompt],
    rows: Sequence[RowQuality],
    tree: Mapping[str, Any],
    heads: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything in summary.json that follows from the measurement and the files of earlier steps."""
    ours = series[MEDUSA]
    gains: dict[str, Any] = {}
    for other in (PLAIN, TRANSFORMERS):
        gains[f"vs_{other}"], gains[f"vs_{other}_range"] = speedup(ours, series[other])
    gains["plain_vs_transformers"], gains["plain_vs_transformers_range"] = speedup(series[PLAIN], series[TRANSFORMERS])
    texts = {name: [a.text for a in series[name].answers] for name in (PLAIN, TRANSFORMERS)}
    return {
        "format": 1,
        "prompts": len(prompts),
        "trials": config.trials,
        "exact_match": ours.exact_match,
        "exact_match_of": {name: one.exact_match for name, one in series.items()},
        "speedup": gains,
        "tokens_per_step": tokens_per_step(ours.answers),
        **timing_summary(dict(series)),
        "accepted_histogram": accepted_histogram(ours.answers),
        "heads": head_facts(heads),
        "tree": tree,
        "extra_trees": [
            {"name": name, "nodes": int(name.removeprefix("tree_")), "exact_match": one.exact_match,
             "tokens_per_step": tokens_per_step(one.answers), "vs_plain": speedup(one, series[PLAIN])[0]}
            for name, one in series.items() if name.startswith("tree_")
        ],
        "quality": summarize_quality(prompts, rows, texts),
        "config": config.model_dump(mode="json"),
        **provenance(),
    }  # fmt: skip


def tree_facts(ours: Series, contestants: Contestants, prompt: Prompt, tuned: Mapping[str, Any]) -> dict[str, Any]:
    """What is drafted, what came of it, and the costs that chose it.

    A static tree has expected and observed acceptance by node; of a dynamic one a step of the first prompt is shown.
    """
    chosen = single_request(tuned)
    facts = {
        **tuned_facts(tuned),
        "steps": sum(len(a.step_nodes) for a in ours.answers),
        "calibration_positions": tuned["rank_statistics"].get("positions"),
        "tuned": {key: chosen.get(key) for key in ("tokens_per_step", "step_ms", "plain_step_ms")},
    }
    if chosen["kind"] == "dynamic":
        return {**facts, "threshold": chosen["threshold"], "example": contestants.example_step(prompt.token_ids)}
    tree = DraftTree.of(chosen["paths"], ngram=chosen["ngram"])
    shares = {tuple(p["path"]): float(p["share"]) for p in tuned["rank_statistics"]["paths"]}
    counts = accepted_nodes(ours.answers, tree.parents)
    steps = facts["steps"]
    return {
        **facts,
        "paths": [list(p) for p in tree.paths],
        "parents": tree.parents,
        "accepted_steps": counts,
        "observed": [round(c / steps, 4) if steps else 0.0 for c in counts],
        "expected": [1.0, *(shares.get(p) for p in tree.paths), *([None] * tree.ngram)],
    }


def data_facts(test_file: Path, prompts: int) -> dict[str, Any]:
    """What the test prompts are: the dataset's name as `prepare` was given it, and how many were answered."""
    name = test_file.parent.name
    if (test_file.parent / "manifest.json").is_file():
        made = read_manifest(test_file.parent).get("config", {})
        name = made.get("dataset") or Path(made.get("test") or made.get("train") or name).name
    return {"name": name, "prompts": prompts}


def differing(
    series: Mapping[str, Series], prompts: Sequence[Prompt], contestants: Contestants
) -> list[dict[str, Any]]:
    """One entry for each decoder and prompt whose tokens differ from plain decoding's, at the first such trial."""
    found: list[dict[str, Any]] = []
    for name, one in series.items():
        seen: set[int] = set()
        for d in one.differences:
            if d.prompt in seen:
                continue
            seen.add(d.prompt)
            margin = None
            if len(found) < MARGINS:
                before = series[PLAIN].answers[d.prompt].token_ids[: d.position]
                margin = top_margin(contestants.engine.backbone, prompts[d.prompt].token_ids + before)
            found.append({"decoder": name, "id": d.id, "trial": d.trial, "position": d.position,
                          "plain_token": d.plain_token, "token": d.token, "logit_margin": margin})  # fmt: skip
    return found


def answer_lines(
    series: Mapping[str, Series], prompts: Sequence[Prompt], rows: Sequence[RowQuality], contestants: Contestants
) -> list[dict[str, Any]]:
    """The lines of answers.jsonl."""
    medians = {name: [1000 * v for v in prompt_medians(one.seconds)] for name, one in series.items()}
    lines = []
    for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        answer = series[MEDUSA].answers[index]
        lines.append({
            "id": prompt.id, "question": prompt.question, "context": prompt.context,
            "reference": prompt.reference, "answer": answer.text,
            "same_as_plain": answer.token_ids == series[PLAIN].answers[index].token_ids,
            "same_as_reference": row.exact,
            "sql_runs": None if row.sql is None else row.sql.runs,
            "sql_error": None if row.sql is None else row.sql.error,
            "prompt_tokens": len(prompt.token_ids), "tokens": len(answer.token_ids), "steps": len(answer.step_tokens),
            "tokens_per_step": tokens_per_step([answer]),
            "blocks": contestants.blocks(answer),
            "median_ms": {name: round(values[index], 4) for name, values in medians.items()},
            "speedup": round(medians[PLAIN][index] / medians[MEDUSA][index], 3),
        })  # fmt: skip
    return lines
