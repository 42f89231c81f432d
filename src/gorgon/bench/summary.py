"""Statistics of a comparison: pure functions from the measured series to the numbers of summary.json."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from gorgon.bench.decoders import Answer
from gorgon.bench.measure import Series

PERCENTILES = (50, 90, 99)


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile, 0 <= q <= 100, with linear interpolation between the two nearest values."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def prompt_medians(values: Sequence[Sequence[float]]) -> list[float]:
    """values[trial][prompt] -> for each prompt its median over the trials."""
    return [statistics.median(column) for column in zip(*values, strict=True)]


def distribution_ms(values_s: Sequence[Sequence[float]]) -> dict[str, float]:
    """Mean and percentiles over the prompts, each prompt with its median over the trials; seconds in, ms out."""
    medians = [1000 * v for v in prompt_medians(values_s)]
    result = {"mean": round(statistics.fmean(medians), 4)}
    return result | {f"p{q}": round(percentile(medians, q), 4) for q in PERCENTILES}


def with_range(values: Sequence[float], digits: int) -> tuple[float, list[float]]:
    """Median over the trials, and [lowest, highest]."""
    return round(statistics.median(values), digits), [round(min(values), digits), round(max(values), digits)]


def speedup(ours: Series, other: Series) -> tuple[float, list[float]]:
    """Total seconds of the other over ours, both within the same trial: median over the trials, [lowest, highest]."""
    return with_range([sum(o) / sum(u) for o, u in zip(other.seconds, ours.seconds, strict=True)], 3)


def tokens_per_second(series: Series) -> tuple[float, list[float]]:
    """Answer tokens over total seconds, of each trial: median over the trials, [lowest, highest]."""
    return with_range([sum(t) / sum(s) for t, s in zip(series.tokens, series.seconds, strict=True)], 1)


def tokens_per_step(answers: Sequence[Answer]) -> float:
    """Tokens that the steps emitted over the number of steps; the prefill's first token counts in neither.

    Returns: 1.0, as for plain decoding, when there were no steps.
    """
    steps = sum(len(a.step_tokens) for a in answers)
    return round(sum(sum(a.step_tokens) for a in answers) / steps, 4) if steps else 1.0


def accepted_histogram(answers: Sequence[Answer]) -> dict[str, int]:
    """Tokens emitted by a step -> number of steps that emitted so many; 1 is the backbone's own token alone."""
    counts = Counter(tokens for a in answers for tokens in a.step_tokens)
    return {str(tokens): counts[tokens] for tokens in range(1, max(counts, default=0) + 1)}


def accepted_nodes(answers: Sequence[Answer], parents: Sequence[int]) -> list[int]:
    """For each node, in how many steps it was accepted: it, or a node below it, was the deepest accepted one.

    Args: parents: parent index of each node, a parent before its children; the root, node 0, has any value below 0
        or its own index.
    """
    counts = [0] * len(parents)
    for answer in answers:
        for node in answer.step_nodes:
            counts[node] += 1
    for node in range(len(parents) - 1, 0, -1):
        counts[parents[node]] += counts[node]
    return counts


def timing_summary(series: dict[str, Series]) -> dict[str, Any]:
    """The numbers that every decoder has: latency_ms, first_token_ms, tokens_per_s with its range, tokens."""
    rates: dict[str, Any] = {}
    for name, one in series.items():
        rates[name], rates[f"{name}_range"] = tokens_per_second(one)
    return {
        "latency_ms": {name: distribution_ms(one.seconds) for name, one in series.items()},
        "first_token_ms": {name: distribution_ms(one.first_token_s) for name, one in series.items()},
        "tokens_per_s": rates,
        "answer_tokens": {name: sum(len(a.token_ids) for a in one.answers) for name, one in series.items()},
    }
