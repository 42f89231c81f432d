"""The report of a comparison on endpoints: the statistics, figures and page of `gorgon compare`, with what tokens cost.

Made from measured.json, which holds every answer and its time, and nothing else. The reference is the fine-tuned model
without heads; texts are compared, as endpoints do not tell token ids.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gorgon.artifacts import provenance, write_json
from gorgon.bench import figures
from gorgon.bench.decoders import Answer
from gorgon.bench.facts import head_facts, single_request, tuned_facts
from gorgon.bench.measure import Difference, Series, first_difference
from gorgon.bench.quality import RowQuality, judge, summarize_quality
from gorgon.bench.report import dollars, fill, head_figures, percent, pick_examples, same_answers, tuning_figures
from gorgon.bench.summary import distribution_ms, prompt_medians, speedup, tokens_per_second
from gorgon.bench.workload import Prompt
from gorgon.errors import DataError
from gorgon.progress import say

FAST, REFERENCE, BASE = "medusa", "fine-tuned", "base"
SIDES = figures.sides(
    {FAST: "Fine-tuned, Medusa heads", REFERENCE: "Fine-tuned, no heads", BASE: "Base model, no heads"}
)
EXAMPLES = 6
SHOWN_AROUND = 24
"""Characters shown from the place on where two answers differ."""
ENGINES = {"gorgon": "Gorgon’s engine", "vllm": "vLLM", "tgi": "TGI"}


def report(measured: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Writes summary.json, answers.jsonl, table.md and report.html, and returns the summary.

    Raises: DataError when it was not measured with the three sides.
    """
    if set(measured["answers"]) != set(SIDES) or not measured["rows"]:
        raise DataError("not a comparison of three endpoints", field="answers", value=sorted(measured["answers"]),
                        allowed=", ".join(SIDES))  # fmt: skip
    series = {name: read_series(name, measured) for name in SIDES}
    prompts = [prompt_of(row, number) for number, row in enumerate(measured["rows"])]
    rows = [judge(p, a.text, sql=True) for p, a in zip(prompts, series[FAST].answers, strict=True)]
    summary = summarize(measured, series, prompts, rows)
    answers = answer_lines(measured, series, prompts, rows)
    write_json(out / "summary.json", summary)
    with (out / "answers.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in answers)
    (out / "table.md").write_text(table(summary) + "\n", encoding="utf-8")
    (out / "report.html").write_text(render(summary, answers, examples=EXAMPLES), encoding="utf-8")
    say(table(summary))
    say(f"{out / 'report.html'}: the whole report")
    return summary


def read_series(name: str, measured: Mapping[str, Any]) -> Series:
    """One endpoint's answers as a series, with each that differs from the reference's first one."""
    made, expected = Series(name), [a["text"] for a in measured["answers"][REFERENCE][0]]
    for trial, answers in enumerate(measured["answers"][name]):
        made.seconds.append([a["seconds"] for a in answers])
        made.tokens.append([a["tokens"] for a in answers])
        for prompt, (answer, text) in enumerate(zip(answers, expected, strict=True)):
            place = first_difference([ord(c) for c in text], [ord(c) for c in answer["text"]])
            if place is not None:
                made.differences.append(Difference(prompt, str(prompt), trial, place, None, None))
    made.answers = [Answer([], a["text"], 0.0) for a in measured["answers"][name][0]]
    return made


def prompt_of(row: Mapping[str, Any], number: int) -> Prompt:
    """A test row as the report shows it; the reference answer stands beside the chat, or ends it."""
    messages = row["messages"]
    last = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
    question = next((str(m["content"]) for m in reversed(messages) if m["role"] == "user"), "")
    return Prompt(str(row.get("id", number)), question, row.get("context"), str(row.get("answer", last)), [])


def summarize(
    measured: Mapping[str, Any], series: Mapping[str, Series], prompts: Sequence[Prompt], rows: Sequence[RowQuality]
) -> dict[str, Any]:
    """Everything in summary.json, under the names that `gorgon compare` gives it where it has it too."""
    gains: dict[str, Any] = {}
    for other in (REFERENCE, BASE):
        gains[f"vs_{other}"], gains[f"vs_{other}_range"] = speedup(series[FAST], series[other])
    rates: dict[str, Any] = {}
    for name, one in series.items():
        rates[name], rates[f"{name}_range"] = tokens_per_second(one)
    steps = {name: tokens_per_step(measured["answers"][name]) for name in series}
    settings = measured["settings"]
    return {
        "format": 2,
        "reference": REFERENCE,
        "prompts": len(prompts),
        "trials": settings["trials"],
        "exact_match": series[FAST].exact_match,
        "exact_match_of": {name: one.exact_match for name, one in series.items()},
        "speedup": gains,
        "tokens_per_step": steps[FAST],
        "tokens_per_step_of": steps,
        "latency_ms": {name: distribution_ms(one.seconds) for name, one in series.items()},
        "tokens_per_s": rates,
        "usd_per_million_tokens": {
            name: usd_per_million(one, measured["endpoints"][name]["usd_per_hour"]) for name, one in series.items()
        },
        "endpoints": dict(measured["endpoints"]),
        "region": measured["region"],
        "tree": tree_facts(measured["tuning"].get("tree.json", {})),
        "heads": head_facts(measured["tuning"].get("heads.json", {})),
        "quality": summarize_quality(
            prompts, rows, {name: [a.text for a in series[name].answers] for name in (REFERENCE, BASE)}
        ),
        "differing": differing(series, prompts, measured),
        "data": {"name": measured["data"], "prompts": len(prompts)},
        "config": settings,
        **provenance(),
    }  # fmt: skip


def usd_per_million(series: Series, usd_per_hour: float | None) -> float | None:
    """USD for a million answer tokens at one request at a time, the median of the trials; None without a price."""
    if usd_per_hour is None:
        return None
    rates = [sum(t) / sum(s) for t, s in zip(series.tokens, series.seconds, strict=True)]
    rate = statistics.median(rates)
    return usd_per_hour / 3600 / rate * 1e6 if rate else None


def tokens_per_step(trials: Sequence[Sequence[Mapping[str, Any]]]) -> float | None:
    """Tokens that steps emitted over the steps of the first trial; None where the engine does not tell."""
    steps = [a["steps"] for a in trials[0]]
    if any(s is None for s in steps):
        return None
    return round(sum(a["stepped"] for a in trials[0]) / sum(steps), 4) if sum(steps) else 1.0


def tree_facts(tuned: Mapping[str, Any]) -> dict[str, Any] | None:
    """The drafts that tuning took for single requests, and the costs that chose them; None where nobody tuned."""
    if not (tuned.get("trees") and tuned.get("cost_curves") and tuned.get("candidates")):
        return None
    threshold = single_request(tuned).get("threshold")
    return {**tuned_facts(tuned), "threshold": threshold, "device": tuned.get("device"), "dtype": tuned.get("dtype")}


def differing(
    series: Mapping[str, Series], prompts: Sequence[Prompt], measured: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One entry for each prompt whose Medusa answer is not the reference's, at the first such trial."""
    found, seen = [], set()
    for d in series[FAST].differences:
        if d.prompt not in seen:
            seen.add(d.prompt)
            ours, theirs = measured["answers"][FAST][d.trial], measured["answers"][REFERENCE][0]
            cut = slice(d.position, d.position + SHOWN_AROUND)
            found.append({"decoder": FAST, "id": prompts[d.prompt].id, "trial": d.trial, "position": d.position,
                          "reference": theirs[d.prompt]["text"][cut], "text": ours[d.prompt]["text"][cut]})  # fmt: skip
    return found


def answer_lines(
    measured: Mapping[str, Any], series: Mapping[str, Series], prompts: Sequence[Prompt], rows: Sequence[RowQuality]
) -> list[dict[str, Any]]:
    """The lines of answers.jsonl: each prompt with the texts, tokens and every latency of the three."""
    medians = {name: [1000 * v for v in prompt_medians(one.seconds)] for name, one in series.items()}
    other = {d.prompt for d in series[FAST].differences}
    lines = []
    for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        lines.append({
            "id": prompt.id, "question": prompt.question, "context": prompt.context, "reference": prompt.reference,
            "messages": measured["rows"][index]["messages"],
            "answers": {
                name: {"text": one.answers[index].text, "tokens": one.tokens[0][index],
                       "seconds": [round(trial[index], 4) for trial in one.seconds]}
                for name, one in series.items()
            },
            "same_as_reference_endpoint": index not in other, "same_as_reference": row.exact,
            "sql_runs": None if row.sql is None else row.sql.runs,
            "sql_error": None if row.sql is None else row.sql.error,
            "median_ms": {name: round(values[index], 4) for name, values in medians.items()},
            "speedup": round(medians[REFERENCE][index] / medians[FAST][index], 3),
        })  # fmt: skip
    return lines


def table(summary: Mapping[str, Any]) -> str:
    """The summary as a Markdown table."""
    head = ["endpoint", "mean ms", "p90 ms", "tokens/s", "speed of medusa over it", "same answers", "USD per 1M tokens"]
    lines = [head, ["---"] * len(head)]
    for name in (BASE, REFERENCE, FAST):
        latency, cost = summary["latency_ms"][name], summary["usd_per_million_tokens"][name]
        gain = "–"
        if name != FAST:
            low, high = summary["speedup"][f"vs_{name}_range"]
            gain = f"{summary['speedup'][f'vs_{name}']:.2f}x ({low:.2f} to {high:.2f})"
        lines.append(
            [name, f"{latency['mean']:.0f}", f"{latency['p90']:.0f}", f"{summary['tokens_per_s'][name]:.1f}", gain,
             percent(summary["exact_match_of"][name]), "unknown" if cost is None else dollars(cost)]
        )  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def render(summary: Mapping[str, Any], answers: Sequence[Mapping[str, Any]], *, examples: int) -> str:
    """The page, which stands alone.

    Args: summary, answers: what `report` writes; examples: how many answers to show.
    """
    medians = {name: [a["median_ms"][name] for a in answers] for name in SIDES}
    known = {name: usd for name, usd in summary["usd_per_million_tokens"].items() if usd is not None}
    drawn = {
        "latency": figures.latency(medians, SIDES),
        "paired": figures.paired(medians[REFERENCE], medians[FAST], ("Without heads", "Medusa heads")),
        **({"usd": figures.costs(known, SIDES)} if known else {}),
        **(tuning_figures(summary["tree"]) if summary["tree"] else {}),
        **head_figures(summary["heads"]),
    }
    return fill(
        "endpoints.html", summary, SIDES, drawn, pick_examples(answers, examples, by="speedup"),
        same=same_answers(summary, whose="the same model without heads", unit="character"), side="Endpoint",
        command="gorgon endpoints compare", plain_words="Answers of the fine-tuned model without heads",
        other_words="Answers of the base model", machines=machines(summary["endpoints"]),
    )  # fmt: skip


def machines(endpoints: Mapping[str, Mapping[str, Any]]) -> str:
    """Such as 'ml.g5.4xlarge each, with Gorgon’s engine'."""
    one = endpoints[FAST]
    count = f"{one['machines']} × " if one["machines"] > 1 else ""
    return f"{count}{one['instance_type']} each, with {ENGINES[one['engine']]}"
