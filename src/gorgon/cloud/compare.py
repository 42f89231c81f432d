"""The reference system's comparison, made fair: base, fine-tuned and Medusa endpoints side by side, then gone again.

Requests are interleaved, so that a slow minute hits all three alike; answers are compared before speed is told; every
latency is kept. All three run the same engine, the first two without drafts.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gorgon.artifacts import write_json
from gorgon.cloud.aws import Aws, resolve_place
from gorgon.cloud.config import EndpointConfig, SageMakerConfig
from gorgon.cloud.deploy import clean_up, deploy, endpoint_cost, ends_on_sigterm, invoke
from gorgon.cloud.launch import RUN, Launch
from gorgon.cloud.pricing import guard
from gorgon.cloud.storage import split_uri
from gorgon.cloud.submit import COMPARE_MINUTES
from gorgon.errors import CloudError, DataError
from gorgon.progress import bar, say

BASE, TUNED, MEDUSA = "base", "fine-tuned", "medusa"
Messages = list[dict[str, str]]
Ask = Callable[[str, Messages], "Answer"]


@dataclass(frozen=True)
class Answer:
    """One answer: text, tokens, seconds on the wire and in between."""

    text: str
    tokens: int
    seconds: float


@dataclass
class Series:
    """All answers of one endpoint, by trial and prompt."""

    trials: list[list[Answer]] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """Every latency."""
        return [answer.seconds for trial in self.trials for answer in trial]

    @property
    def tokens(self) -> int:
        """Tokens of all answers."""
        return sum(answer.tokens for trial in self.trials for answer in trial)


def read_prompts(source: str, aws: Aws | None, limit: int | None) -> list[Messages]:
    """Test prompts of a directory that `prepare` wrote, here or in S3: the messages before the reference answer.

    Raises: DataError when there are none.
    """
    if source.startswith("s3://"):
        bucket, key = split_uri(source.rstrip("/"))
        if aws is None:
            raise DataError("this is in S3", file=source)
        text = aws.call("s3", "get_object", Bucket=bucket, Key=f"{key}/test.jsonl")["Body"].read().decode()
    else:
        path = Path(source) / "test.jsonl"
        if not path.is_file():
            raise DataError("there is no test.jsonl here", file=source, field="data", hint="`gorgon prepare` writes it")
        text = path.read_text(encoding="utf-8")
    rows = [json.loads(line)["messages"] for line in text.splitlines() if line.strip()][:limit]
    prompts = [messages[:-1] if messages[-1]["role"] == "assistant" else messages for messages in rows]
    if not prompts:
        raise DataError("the test split is empty", file=source)
    return prompts


def measure(names: Sequence[str], prompts: Sequence[Messages], ask: Ask, *, trials: int) -> dict[str, Series]:
    """Asks every endpoint every prompt in each trial, one request at a time, taking turns at going first.

    Raises: CloudError when the time is up.
    """
    series = {name: Series() for name in names}
    end = time.monotonic() + 60 * COMPARE_MINUTES
    for name in names:
        ask(name, prompts[0])  # the first request of a connection is another matter
    with bar("comparing", trials * len(prompts)) as shown:
        for _ in range(trials):
            for one in series.values():
                one.trials.append([])
            for number, prompt in enumerate(prompts):
                first = number % len(names)
                for name in (*names[first:], *names[:first]):
                    if time.monotonic() > end:
                        raise CloudError(
                            f"the comparison took more than {COMPARE_MINUTES} minutes", hint="take fewer prompts"
                        )
                    series[name].trials[-1].append(ask(name, prompt))
                shown.advance()
    return series


def summarize(series: Mapping[str, Series], prices: Mapping[str, float | None]) -> dict[str, Any]:
    """Latency, speed, sameness of answers, and USD per million tokens at one request at a time."""
    reference = TUNED if TUNED in series else next(iter(series))
    rows = {}
    for name, one in series.items():
        ordered, total = sorted(one.seconds), sum(one.seconds)
        ratios = [
            sum(a.seconds for a in theirs) / sum(a.seconds for a in ours)
            for ours, theirs in zip(one.trials, series[reference].trials, strict=True)
        ]
        pairs = [
            (a.text, b.text)
            for ours, theirs in zip(one.trials, series[reference].trials, strict=True)
            for a, b in zip(ours, theirs, strict=True)
        ]
        price = prices.get(name)
        per_million = None if price is None or not one.tokens else price / 3600 * total / one.tokens * 1e6
        rows[name] = {
            "latency_ms": {"mean": 1000 * statistics.fmean(ordered), **_percentiles(ordered)},
            "tokens_per_s": one.tokens / total, "speedup": statistics.median(ratios),
            "speedup_range": [min(ratios), max(ratios)], "same_answers": sum(a == b for a, b in pairs) / len(pairs),
            "usd_per_million_tokens": per_million,
        }  # fmt: skip
    return {"format": 1, "reference": reference, "prompts": len(series[reference].trials[0]),
            "trials": len(series[reference].trials), "endpoints": rows}  # fmt: skip


def _percentiles(ordered: Sequence[float]) -> dict[str, float]:
    return {f"p{p}": 1000 * ordered[min(len(ordered) - 1, round(p / 100 * (len(ordered) - 1)))] for p in (50, 90, 99)}


def table(summary: Mapping[str, Any]) -> str:
    """The summary as a Markdown table."""
    head = ["endpoint", "mean ms", "p90 ms", "tokens/s", "speed-up", "same answers", "USD per 1M tokens"]
    lines = [head, ["---"] * len(head)]
    for name, row in summary["endpoints"].items():
        low, high = row["speedup_range"]
        cost = row["usd_per_million_tokens"]
        lines.append(
            [name, f"{row['latency_ms']['mean']:.0f}", f"{row['latency_ms']['p90']:.0f}", f"{row['tokens_per_s']:.1f}",
             f"{row['speedup']:.2f}x ({low:.2f} to {high:.2f})", f"{100 * row['same_answers']:.1f} %",
             "unknown" if cost is None else f"{cost:.2f}"]
        )  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def compare_endpoints(
    base: str, model: str, data: str, cloud: SageMakerConfig, out: Path, *,
    stamp: str, prompts: int | None = None, trials: int = 3, max_tokens: int = 128, stop: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Deploys three endpoints, compares them, writes summary.json, answers.jsonl and table.md, and deletes all three.

    Args: base: the backbone before fine-tuning; model: the model directory with heads; data: what `prepare` wrote.
    Raises: CloudError, BudgetError; the endpoints are gone in any case.
    """
    aws = Aws(cloud.region)
    place = resolve_place(cloud, aws)
    messages = read_prompts(data, aws, prompts)
    limited = (cloud.endpoint or EndpointConfig()).model_copy(update={"delete_after_minutes": COMPARE_MINUTES})
    cloud = cloud.model_copy(update={"endpoint": limited})
    launches = {
        BASE: Launch(base, cloud, name=f"base-{stamp}", plain=True),
        TUNED: Launch(model, cloud, name=f"sft-{stamp}", plain=True),
        MEDUSA: Launch(model, cloud, name=f"medusa-{stamp}"),
    }
    specs = {name: launch.checked(aws, place) for name, launch in launches.items()}
    costs = {name: endpoint_cost(spec, cloud, aws) for name, spec in specs.items()}
    guard(list(costs.values()), cloud.budget_usd)
    specs = {name: launches[name].upload(aws, place, spec) for name, spec in specs.items()}
    names = {name: spec.name for name, spec in specs.items()}

    def ask(name: str, prompt: Messages) -> Answer:
        request: dict[str, Any] = {"messages": prompt, "max_tokens": max_tokens, "temperature": 0}
        start = time.perf_counter()
        answer = invoke(aws, names[name], {**request, "stop": list(stop)} if stop else request)
        seconds = time.perf_counter() - start
        return Answer(answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"], seconds)

    with ends_on_sigterm():
        deploy(aws, list(specs.values()), cloud, place, run=RUN)
        try:
            series = measure(list(names), messages, ask, trials=trials)
        finally:
            for endpoint in names.values():
                clean_up(aws, endpoint)
    prices = {
        name: None if cost.price.per_hour is None else cost.price.per_hour * cost.machines
        for name, cost in costs.items()
    }
    summary = summarize(series, prices)
    write_results(out, summary, series, messages)
    say(table(summary))
    return summary


def write_results(
    out: Path, summary: Mapping[str, Any], series: Mapping[str, Series], prompts: Sequence[Any]
) -> None:  # fmt: skip
    """summary.json, answers.jsonl with every latency, and table.md."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "summary.json", summary)
    with (out / "answers.jsonl").open("w", encoding="utf-8") as file:
        for number, prompt in enumerate(prompts):
            answers = {
                name: {"text": one.trials[0][number].text, "tokens": one.trials[0][number].tokens,
                       "seconds": [round(trial[number].seconds, 4) for trial in one.trials]}
                for name, one in series.items()
            }  # fmt: skip
            file.write(json.dumps({"messages": prompt, "answers": answers}, ensure_ascii=False) + "\n")
    (out / "table.md").write_text(table(summary) + "\n", encoding="utf-8")
