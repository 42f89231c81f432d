"""The reference system's comparison, made fair: base, fine-tuned and Medusa endpoints side by side, then gone again.

Requests are interleaved, so that a slow minute hits all three alike, and every latency is kept. All three run the same
engine, the first two without drafts. What is made of the measurement, numbers and page, is the business of the layer
that makes them for `gorgon compare` too; it is handed in.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gorgon.artifacts import write_json
from gorgon.cloud.aws import Aws, resolve_place
from gorgon.cloud.config import COMPARE_MINUTES, EndpointConfig, SageMakerConfig
from gorgon.cloud.deploy import clean_up, deploy, endpoint_cost, ends_on_sigterm, invoke
from gorgon.cloud.endpoint import EndpointSpec, compared_names
from gorgon.cloud.launch import RUN, Export, Launch
from gorgon.cloud.pricing import Cost, guard
from gorgon.cloud.storage import read_text
from gorgon.errors import CloudError, DataError
from gorgon.progress import bar, say

BASE, TUNED, MEDUSA = "base", "fine-tuned", "medusa"
MEASURED = "measured.json"
TUNING = ("tree.json", "heads.json")
"""What a model directory knows of its heads and drafts, for the report."""
Messages = list[dict[str, str]]
Ask = Callable[[str, Messages], "Answer"]
Report = Callable[[Mapping[str, Any], Path], dict[str, Any]]
"""Makes the numbers and the page of what was measured, in a directory, and returns the numbers."""


@dataclass(frozen=True)
class Answer:
    """One answer: text, tokens, seconds on the wire and in between.

    `steps` and `stepped`, the tokens that steps emitted, are None where the engine does not tell.
    """

    text: str
    tokens: int
    seconds: float
    steps: int | None = None
    stepped: int | None = None


def read_rows(source: str, aws: Aws | None, limit: int | None) -> list[dict[str, Any]]:
    """Rows of the test split in a directory that `prepare` wrote, here or in S3.

    Raises: DataError when there are none, or one is no chat.
    """
    text = read_text(source, "test.jsonl", aws)
    if text is None:
        raise DataError("there is no test.jsonl here", file=source, field="data", hint="`gorgon prepare` writes it")
    try:
        rows: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines() if line.strip()][:limit]
        for row in rows:
            prompt_of(row)
    except (ValueError, LookupError, TypeError) as error:
        raise DataError("test.jsonl holds a row that is no chat", file=source, field="messages",
                        hint="run `gorgon prepare` again") from error  # fmt: skip
    if not rows:
        raise DataError("the test split is empty", file=source)
    return rows


def read_tuning(model: str, aws: Aws | None) -> dict[str, Any]:
    """What the model directory tells of its heads and drafts: file name -> document, those that are there.

    Raises: DataError when one is not JSON.
    """
    found: dict[str, Any] = {}
    for name in TUNING:
        text = read_text(model, name, aws)
        try:
            found |= {} if text is None else {name: json.loads(text)}
        except ValueError as error:
            raise DataError(f"{name} is not valid JSON", file=model, field="model") from error
    return found


def measure(
    names: Sequence[str], prompts: Sequence[Messages], ask: Ask, *, trials: int, end: float
) -> dict[str, list[list[Answer]]]:
    """Asks every endpoint every prompt in each trial, one request at a time, taking turns at going first.

    Args: end: moment of `time.monotonic` to stop at. What was asked by then counts: whole trials, or of a first trial
        that is not whole the prompts that every endpoint has answered.
    Returns: endpoint -> answers[trial][prompt].
    Raises: CloudError when there was time for nothing.
    """
    series: dict[str, list[list[Answer]]] = {name: [] for name in names}
    for name in names:
        ask(name, prompts[0])  # the first request of a connection is another matter
    with bar("comparing", trials * len(prompts)) as shown:
        for trial in range(trials):
            answers: dict[str, list[Answer]] = {name: [] for name in names}
            for number, prompt in enumerate(prompts):
                if time.monotonic() > end:
                    return _in_time(series, answers, trial, number)
                first = (trial + number) % len(names)
                for name in (*names[first:], *names[:first]):
                    answers[name].append(ask(name, prompt))
                shown.advance()
            for name in names:
                series[name].append(answers[name])
    return series


def _in_time(
    series: dict[str, list[list[Answer]]], last: dict[str, list[Answer]], trials: int, prompts: int
) -> dict[str, list[list[Answer]]]:
    if trials == 0 and prompts == 0:
        raise CloudError(
            f"the endpoints took all {COMPARE_MINUTES} minutes of the comparison to come up", field="endpoint.compare",
            hint="take a smaller model or a faster machine",
        )  # fmt: skip
    kept = f"whole trials that count: {trials}" if trials else f"prompts that count: {prompts}"
    say(f"the comparison's {COMPARE_MINUTES} minutes are up; {kept}")
    return series if trials else {name: [answers] for name, answers in last.items()}


def compare_endpoints(
    base: str, model: str, data: str, cloud: SageMakerConfig, out: Path, *,
    report: Report, stamp: str, export: Export | None = None, tuned: str | None = None, stop: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Deploys three endpoints, compares them, deletes all three, keeps what was measured, and has it reported.

    Args: base: the backbone before fine-tuning; model: the model directory with heads; data: what `prepare` wrote;
        tuned: the directory that `model` was exported from, whose heads and drafts the report describes.
    Returns: what `report` returns.
    Raises: CloudError, BudgetError; the endpoints are gone in any case.
    """
    aws = Aws(cloud.region)
    place = resolve_place(cloud, aws)
    settings = cloud.endpoint or EndpointConfig()
    rows = read_rows(data, aws, settings.compare_prompts)
    tuning = read_tuning(tuned or model, aws)
    limited = settings.model_copy(update={"delete_after_minutes": COMPARE_MINUTES})
    cloud = cloud.model_copy(update={"endpoint": limited})
    first, second, third = compared_names(stamp)
    launches = {
        BASE: Launch(base, cloud, name=first, plain=True),
        TUNED: Launch(model, cloud, name=second, plain=True),
        MEDUSA: Launch(model, cloud, name=third, export=export),
    }
    specs = {name: launch.checked(aws, place) for name, launch in launches.items()}
    costs = {name: endpoint_cost(spec, cloud, aws) for name, spec in specs.items()}
    guard(list(costs.values()), cloud.budget_usd)
    specs = {name: launches[name].upload(aws, place, spec) for name, spec in specs.items()}
    names = {name: spec.name for name, spec in specs.items()}

    def ask(name: str, prompt: Messages) -> Answer:
        request: dict[str, Any] = {"messages": prompt, "max_tokens": settings.compare_max_tokens, "temperature": 0}
        start = time.perf_counter()
        answer = invoke(aws, names[name], {**request, "stop": list(stop)} if stop else request)
        return _answer(answer, time.perf_counter() - start)

    end = time.monotonic() + 60 * COMPARE_MINUTES
    with ends_on_sigterm():
        deploy(aws, list(specs.values()), cloud, place, run=RUN)
        try:
            series = measure(list(names), [prompt_of(row) for row in rows], ask,
                             trials=settings.compare_trials, end=end)  # fmt: skip
        finally:
            for endpoint in names.values():
                clean_up(aws, endpoint)
    done = series[BASE]
    measured = {
        "format": 1, "data": data, "region": aws.region,
        "settings": {"prompts": len(done[0]), "trials": len(done), "max_tokens": settings.compare_max_tokens,
                     "stop": list(stop), "endpoint": limited.model_dump(mode="json", exclude={"compare"})},
        "endpoints": {name: _facts(specs[name], costs[name]) for name in names},
        "answers": {name: [[asdict(a) for a in trial] for trial in one] for name, one in series.items()},
        "rows": rows[: len(done[0])], "tuning": tuning,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / MEASURED, measured)  # first of all: it was paid for
    say(f"{out / MEASURED}: every answer and its time")
    return report(measured, out)


def prompt_of(row: Mapping[str, Any]) -> Messages:
    """The messages before the answer."""
    messages: Messages = row["messages"]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _answer(document: Mapping[str, Any], seconds: float) -> Answer:
    usage = document["usage"]
    told = usage.get("speculation")
    steps = None if told is None else int(told["steps"])
    stepped = None if told is None else round(told["steps"] * told["tokens_per_step"])
    return Answer(document["choices"][0]["message"]["content"], usage["completion_tokens"], seconds, steps, stepped)


def _facts(spec: EndpointSpec, cost: Cost) -> dict[str, Any]:
    """What an endpoint was, and what it cost per hour."""
    price = cost.price.per_hour
    return {
        "endpoint": spec.name, "model": spec.model, "engine": spec.settings.engine, "image": spec.image,
        "instance_type": spec.settings.instance_type, "machines": cost.machines, "price": cost.price.source,
        "usd_per_hour": None if price is None else price * cost.machines,
    }  # fmt: skip
