"""report.html: one page, standing alone, made from summary.json and answers.jsonl and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gorgon.bench import figures
from gorgon.bench.decoders import MEDUSA, PLAIN, TRANSFORMERS
from gorgon.bench.tree_figure import static_tree, step_tree
from gorgon.config import EMBEDDED

DIFFERENCES_SHOWN = 20
DECODERS = (MEDUSA, PLAIN, TRANSFORMERS)


def render(summary: Mapping[str, Any], answers: Sequence[Mapping[str, Any]], *, examples: int) -> str:
    """The whole page as text.

    Args: summary, answers: what `compare` writes; examples: how many answers to show.
    Invariant: every string that came from a model, a dataset or a configuration is escaped; nothing is fetched.
    """
    environment = Environment(
        loader=PackageLoader("gorgon.bench", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"ms": milliseconds, "percent": percent, "number": thousands}
    return environment.get_template("report.html").render(
        s=summary,
        decoders=[(name, figures.LABELS[name]) for name in DECODERS],
        headline=headline(summary),
        same=same_answers(summary),
        model=model_phrase(summary["model"]),
        machine=machine_phrase(summary),
        data=data_phrase(summary["data"]["name"]),
        figures=_figures(summary, answers),
        examples=pick_examples(answers, examples),
        differing=summary["differing"][:DIFFERENCES_SHOWN],
        config=yaml.safe_dump(summary["config"], sort_keys=False, allow_unicode=True),
    )


def headline(summary: Mapping[str, Any]) -> str:
    """The one number, as a sentence; it does not claim a gain where there is none."""
    ratio = summary["speedup"]["vs_plain"]
    if ratio < 1:
        return f"Slower: {ratio:.2f} times the speed of plain decoding"
    exact = "and the same answers" if summary["exact_match"] == 1 else "but some answers differ"
    return f"{ratio:.2f} times as fast, {exact}"


def same_answers(summary: Mapping[str, Any]) -> str:
    """Whether the answers are those of plain decoding, in one sentence."""
    prompts, trials = summary["prompts"], summary["trials"]
    same = round(summary["exact_match"] * prompts)
    if same == prompts:
        return (
            f"All {thousands(prompts)} answers are the answers of plain decoding, token for token, in each of the "
            f"{trials} trials." if trials > 1 else
            f"All {thousands(prompts)} answers are the answers of plain decoding, token for token."
        )  # fmt: skip
    return (
        f"{thousands(prompts - same)} of {thousands(prompts)} answers differ from plain decoding in at least one "
        "token. In exact arithmetic none would; the margins below show how close the backbone was to a tie."
    )


def model_phrase(model: Mapping[str, Any]) -> str:
    """Such as '4.3M-parameter llama model with 5 Medusa heads, computing in float32'."""
    return (
        f"{magnitude(model['parameters'])}-parameter {model['type']} model with {model['heads']} Medusa heads, "
        f"computing in {model['dtype']}"
    )


def machine_phrase(summary: Mapping[str, Any]) -> str:
    """The device, and for a CPU how many threads computed."""
    model, machine = summary["model"], summary["machine"]
    if model["device"] != "cpu":
        return str(model["device"])
    threads = model["threads"]
    name = str(machine["cpu"]).replace("(R)", "").replace("(TM)", "")
    return f"{name} ({threads} thread{'' if threads == 1 else 's'} of {machine['cores']} logical cores)"


def data_phrase(name: str) -> str:
    """The dataset's name within a sentence."""
    return "the embedded sample" if name == EMBEDDED else f"‘{name}’"


def pick_examples(answers: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Answers spread evenly from the fewest to the most tokens per step: not only the flattering ones."""
    ordered = sorted(answers, key=lambda a: (a["tokens_per_step"], a["id"]))
    if count >= len(ordered):
        return ordered[::-1]
    if count == 0:
        return []
    last = len(ordered) - 1
    chosen = dict.fromkeys(round(i * last / max(count - 1, 1)) for i in range(count))
    return [ordered[i] for i in chosen][::-1]


def _figures(summary: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> dict[str, Markup]:
    medians = {name: [a["median_ms"][name] for a in answers] for name in DECODERS}
    tree, heads = summary["tree"], summary["heads"]
    made = {
        "latency": figures.latency(medians),
        "paired": figures.paired(medians[PLAIN], medians[MEDUSA]),
        "accepted": figures.accepted(summary["accepted_histogram"]),
        "cost": figures.step_cost(tree["cost_curve"], round(tree["mean_nodes"])),
        "candidates": figures.candidate_rates(tree["candidates"], tree),
        "tree": step_tree(tree["example"]) if tree["kind"] == "dynamic" else static_tree(tree),
    }
    if heads["evaluations"]:  # imported heads come without
        made["heads"] = figures.head_accuracy(heads["accuracy"])
        made["learning"] = figures.learning(heads["evaluations"])
    return {name: Markup(text) for name, text in made.items()}  # noqa: S704  our own SVG, its texts escaped by svg.py


def milliseconds(value: float) -> str:
    """Three significant digits, without a unit."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def percent(value: float | None, digits: int = 1) -> str:
    """0.5 as '50 %'; a dash for None. 100 % is only said when nothing is missing."""
    if value is None:
        return "–"
    shown = f"{100 * value:.{digits}f}"
    if float(shown) == 100 and value < 1:
        shown = f"{100 - 10.0**-digits:.{digits}f}"
    return (shown.rstrip("0").rstrip(".") if "." in shown else shown) + " %"


def thousands(value: float) -> str:
    """12345 as '12,345'."""
    return f"{value:,.0f}"


def magnitude(count: int) -> str:
    """4262144 as '4.3M'."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return str(count)
