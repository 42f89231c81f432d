"""What a load run found: one row per level, as JSON and as a page with two figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gorgon.bench.load import Level
from gorgon.bench.load_client import Outcome
from gorgon.bench.svg import MEDUSA, MUTED, drawing, embed

PERCENTILES = (50, 90, 99)


def summarize(level: Level, outcomes: Sequence[Outcome], expected: Mapping[int, str] | None) -> dict[str, Any]:
    """One level's row.

    Args: expected: text by prompt that answers should have; None compares nothing.
    Returns: times in milliseconds. Throughput counts whole answers over the time from the first request to the last
        answer. `tokens_per_step` is there when the server reports steps.
    """
    good = [o for o in outcomes if not o.error]
    seconds = max((o.start + o.seconds for o in outcomes), default=0.0) - min((o.start for o in outcomes), default=0.0)
    tokens, steps = sum(o.tokens for o in good), sum(o.steps for o in good)
    gaps = [(o.seconds - o.first_s) / (o.tokens - 1) for o in good if o.tokens > 1 and o.first_s]
    row: dict[str, Any] = {
        "level": level.name, "clients": level.clients if level.rate is None else None, "rate": level.rate,
        "requests": len(outcomes), "answers": len(good), "errors": dict(Counter(o.error for o in outcomes if o.error)),
        "seconds": round(seconds, 4), "requests_per_s": round(len(good) / seconds, 4) if seconds else 0.0,
        "tokens": tokens, "tokens_per_s": round(tokens / seconds, 3) if seconds else 0.0,
        "latency_ms": percentiles([o.seconds for o in good]),
        "first_token_ms": percentiles([o.first_s for o in good if o.first_s]), "token_ms": percentiles(gaps),
    }  # fmt: skip
    if steps:  # the first token of an answer comes from its prompt, not from a step
        row["tokens_per_step"] = round((tokens - len(good)) / steps, 4)
    if expected is not None:
        same = [o.text == expected[o.prompt] for o in good if o.prompt in expected]
        row["exact_match"] = round(sum(same) / len(same), 6) if same else None
    return row


def percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """Mean, percentiles (nearest rank, so each is a value that occurred) and maximum in ms; None for nothing."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    found = {f"p{p}": ordered[max(-(-p * len(ordered) // 100) - 1, 0)] for p in PERCENTILES}
    values = {"mean": sum(ordered) / len(ordered), **found, "max": ordered[-1]}
    return {name: round(1000 * value, 3) for name, value in values.items()}


def render(document: Mapping[str, Any]) -> str:
    """The page; it stands alone and fetches nothing."""
    environment = Environment(
        loader=PackageLoader("gorgon.bench", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    levels = [row for row in document["levels"] if row["latency_ms"]]
    figures = [Markup(throughput_figure(levels)), Markup(latency_figure(levels))] if levels else []  # noqa: S704 - ours
    return environment.get_template("load.html").render(d=document, figures=figures)


def throughput_figure(levels: Sequence[Mapping[str, Any]]) -> str:
    """Tokens per second by level."""
    with drawing(2.4) as (figure, axes):
        _draw(axes, levels, [row["tokens_per_s"] for row in levels], color=MEDUSA)
        _levels_axis(axes, levels)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("tokens per second")
        return embed(figure, "throughput", "Throughput", "Tokens per second by load; the table has the values.")


def latency_figure(levels: Sequence[Mapping[str, Any]]) -> str:
    """Median and 99th percentile of the whole answer's time by level."""
    with drawing(2.4) as (figure, axes):
        for name, color, style in (("p50", MEDUSA, "-"), ("p99", MUTED, "--")):
            values = [row["latency_ms"][name] for row in levels]
            _draw(axes, levels, values, color=color, linestyle=style, label=name)
        _levels_axis(axes, levels)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("latency, ms")
        axes.legend(loc="upper left")
        return embed(figure, "latency", "Latency", "Median and 99th percentile by load; the table has the values.")


def _draw(axes: Any, levels: Sequence[Mapping[str, Any]], values: Sequence[float], **style: Any) -> None:
    """A line through the closed loop's levels and one through the open loop's: from one to the other is no way."""
    for open_loop in (False, True):
        places = [i for i, row in enumerate(levels) if (row["rate"] is not None) == open_loop]
        if places:
            axes.plot(places, [values[i] for i in places], marker="o", markersize=4, **style)
            style.pop("label", None)  # once in the legend


def _levels_axis(axes: Any, levels: Sequence[Mapping[str, Any]]) -> None:
    axes.set_xticks(
        range(len(levels)), [f"{row['rate']:g}/s" if row["rate"] else str(row["clients"]) for row in levels]
    )
    axes.set_xlabel("clients, or requests per second")
    axes.set_xlim(-0.3, len(levels) - 0.7)
