"""report.html: one page, standing alone, made from summary.json and answers.jsonl and nothing else.

A comparison on endpoints (endpoints.py) fills a template of its own, which takes all but a few parts from this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gorgon.bench import figures
from gorgon.bench.decoders import MEDUSA, PLAIN
from gorgon.bench.tree_figure import static_tree, step_tree
from gorgon.config import EMBEDDED

DIFFERENCES_SHOWN = 20


def render(summary: Mapping[str, Any], answers: Sequence[Mapping[str, Any]], *, examples: int) -> str:
    """The whole page as text.

    Args: summary, answers: what `compare` writes; examples: how many answers to show.
    """
    return fill(
        "report.html", summary, figures.DECODERS, _figures(summary, answers), pick_examples(answers, examples),
        same=same_answers(summary), model=model_phrase(summary["model"]), machine=machine_phrase(summary),
        side="Decoder", command="gorgon compare", plain_words="Plain answers", other_words="transformers.generate",
    )  # fmt: skip


def fill(
    template: str, summary: Mapping[str, Any], shown: figures.Sides, drawn: Mapping[str, str],
    examples: Sequence[Mapping[str, Any]], **words: str,
) -> str:  # fmt: skip
    """A page of this package from one of its templates.

    Args: shown: the three sides; drawn: figures by name; words: what else the template needs to be told.
    Invariant: every string that came from a model, a dataset or a configuration is escaped; nothing is fetched.
    """
    environment = Environment(
        loader=PackageLoader("gorgon.bench", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"ms": milliseconds, "percent": percent, "number": thousands, "usd": dollars}
    fast, plain, other = shown
    page = environment.get_template(template)
    return page.render(
        s=summary,
        up=summary["speedup"],
        sides=[(name, style.label, style.key) for name, style in shown.items()],
        fast=fast,
        plain=plain,
        other=other,
        headline=headline(summary),
        data=data_phrase(summary["data"]["name"]),
        figures={name: Markup(text) for name, text in drawn.items()},  # noqa: S704 - our own SVG, escaped by svg.py
        examples=examples,
        differing=summary["differing"][:DIFFERENCES_SHOWN],
        config=yaml.safe_dump(summary["config"], sort_keys=False, allow_unicode=True),
        **words,
    )


def headline(summary: Mapping[str, Any]) -> str:
    """The one number, as a sentence; it does not claim a gain where there is none."""
    ratio = summary["speedup"][f"vs_{summary.get('reference', PLAIN)}"]
    if ratio < 1:
        return f"Slower: {ratio:.2f} times the speed of plain decoding"
    exact = "and the same answers" if summary["exact_match"] == 1 else "but some answers differ"
    return f"{ratio:.2f} times as fast, {exact}"


def same_answers(summary: Mapping[str, Any], *, whose: str = "plain decoding", unit: str = "token") -> str:
    """Whether the answers are those of the reference, in one sentence."""
    prompts, trials = summary["prompts"], summary["trials"]
    same = round(summary["exact_match"] * prompts)
    if same == prompts:
        all_same = f"All {thousands(prompts)} answers are the answers of {whose}, {unit} for {unit}"
        return f"{all_same}, in each of the {trials} trials." if trials > 1 else f"{all_same}."
    return (
        f"{thousands(prompts - same)} of {thousands(prompts)} answers differ from {whose} in at least one {unit}. In "
        "exact arithmetic none would"
        + ("; the margins below show how close the backbone was to a tie." if unit == "token" else ".")
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


def pick_examples(
    answers: Sequence[Mapping[str, Any]], count: int, by: str = "tokens_per_step"
) -> list[Mapping[str, Any]]:  # fmt: skip
    """Answers spread evenly from the fewest to the most tokens per step: not only the flattering ones."""
    ordered = sorted(answers, key=lambda a: (a[by], a["id"]))
    if count >= len(ordered):
        return ordered[::-1]
    if count == 0:
        return []
    last = len(ordered) - 1
    chosen = dict.fromkeys(round(i * last / max(count - 1, 1)) for i in range(count))
    return [ordered[i] for i in chosen][::-1]


def _figures(summary: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    medians = {name: [a["median_ms"][name] for a in answers] for name in figures.DECODERS}
    tree = summary["tree"]
    return {
        "latency": figures.latency(medians),
        "paired": figures.paired(medians[PLAIN], medians[MEDUSA]),
        "accepted": figures.accepted(summary["accepted_histogram"]),
        "tree": step_tree(tree["example"]) if tree["kind"] == "dynamic" else static_tree(tree),
        **tuning_figures(tree),
        **head_figures(summary["heads"]),
    }


def tuning_figures(tree: Mapping[str, Any]) -> dict[str, str]:
    """What a larger tree costs, and what tuning expected of each candidate."""
    return {
        "cost": figures.step_cost(tree["cost_curve"], round(tree["mean_nodes"])),
        "candidates": figures.candidate_rates(tree["candidates"], tree),
    }


def head_figures(heads: Mapping[str, Any]) -> dict[str, str]:
    """How well the heads guess, and how they learnt it; nothing for imported heads, which come without."""
    if not heads["evaluations"]:
        return {}
    return {"heads": figures.head_accuracy(heads["accuracy"]), "learning": figures.learning(heads["evaluations"])}


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


def dollars(value: float | None) -> str:
    """Three significant digits, cents at least; a dash for None."""
    return "–" if value is None else f"{value:,.2f}" if value >= 1 else f"{value:#.3g}"


def thousands(value: float) -> str:
    """12345 as '12,345'."""
    return f"{value:,.0f}"


def magnitude(count: int) -> str:
    """4262144 as '4.3M'."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return str(count)
