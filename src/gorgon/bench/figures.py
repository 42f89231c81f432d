"""The report's figures. Each takes plain numbers and returns an `<svg>` element."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gorgon.bench import svg
from gorgon.bench.decoders import MEDUSA, PLAIN, TRANSFORMERS


@dataclass(frozen=True)
class Style:
    """How one side of a comparison is named and drawn; `key` is its colour's name in the page's CSS."""

    label: str
    color: str
    dashes: Any
    key: str


_THREE = ((svg.MEDUSA, "-", "medusa"), (svg.PLAIN, (0, (5, 1.6)), "plain"),
          (svg.TRANSFORMERS, (0, (1.2, 1.6)), "transformers"))  # fmt: skip
Sides = dict[str, Style]
"""Three sides by name, in this order: with heads, the same model without, and a third one."""


def sides(labels: Mapping[str, str]) -> Sides:
    """Three labels by name as sides."""
    return {name: Style(label, *drawn) for (name, label), drawn in zip(labels.items(), _THREE, strict=True)}


DECODERS = sides(
    {MEDUSA: "Gorgon, Medusa heads", PLAIN: "Gorgon, plain decoding", TRANSFORMERS: "transformers.generate"}
)
_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.0f} %")


def latency(medians_ms: Mapping[str, Sequence[float]], shown: Sides = DECODERS) -> str:
    """Cumulative distribution of the latencies: side -> one latency per prompt, in ms."""
    with svg.drawing(3.1) as (figure, axes):
        for name in reversed(shown):
            style, ordered = shown[name], sorted(medians_ms[name])
            shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
            axes.step([ordered[0], *ordered], [0, *shares], where="post", color=style.color, linestyle=style.dashes,
                      label=style.label)  # fmt: skip
        axes.set(xlabel="Latency of one answer (ms)", ylim=(0, 1.02), xlim=(0, None))
        axes.yaxis.set_major_formatter(_PERCENT)
        axes.axhline(0.5, color=svg.MUTED, linewidth=0.6, linestyle=(0, (2, 2)), zorder=0)
        _legend(axes)
        medians = ", ".join(f"{shown[n].label} {statistics.median(medians_ms[n]):.1f} ms" for n in shown)
        return svg.embed(
            figure, "latency", "Share of prompts answered within a time",
            f"Three rising curves; further left is faster. Median prompt: {medians}.",
        )  # fmt: skip


def paired(
    plain_ms: Sequence[float], medusa_ms: Sequence[float], words: tuple[str, str] = ("Plain decoding", "Medusa heads")
) -> str:
    """Each prompt's plain latency against its Medusa latency, with lines of equal speed-up."""
    with svg.drawing(3.1) as (figure, axes):
        right, top = 1.05 * max(plain_ms), 1.08 * max(*medusa_ms, max(plain_ms) / 2)
        for factor in (1, 2, 3, 4, 6):
            axes.plot([0, right], [0, right / factor], color=svg.RULE, linewidth=0.8, zorder=0)
            at = min(right, top * factor)
            axes.annotate(f"{factor}×", (at, at / factor), color=svg.MUTED, fontsize=7.5, xytext=(-2, 1),
                          textcoords="offset points", ha="right", va="bottom")  # fmt: skip
        axes.scatter(
            plain_ms, medusa_ms, s=11 if len(plain_ms) > 60 else 18, color=svg.MEDUSA, alpha=0.55, linewidths=0
        )
        axes.set(xlim=(0, right), ylim=(0, top), xlabel=f"{words[0]} (ms)", ylabel=f"{words[1]} (ms)")
        axes.grid(visible=False)
        faster = sum(m < p for p, m in zip(plain_ms, medusa_ms, strict=True))
        return svg.embed(
            figure, "paired", "Latency of each prompt, plain against Medusa",
            f"One dot per prompt; {faster} of {len(plain_ms)} lie below the line of equal speed, so they got faster.",
        )  # fmt: skip


def accepted(histogram: Mapping[str, int]) -> str:
    """Steps by the number of tokens that they emitted."""
    total = sum(histogram.values()) or 1
    tokens, shares = [int(k) for k in histogram], [v / total for v in histogram.values()]
    with svg.drawing(2.7) as (figure, axes):
        bars = axes.bar(tokens, shares, color=svg.MEDUSA, width=0.72)
        for rectangle, share in zip(bars, shares, strict=True):
            axes.annotate(_share(share), (rectangle.get_x() + rectangle.get_width() / 2, share), xytext=(0, 2),
                          textcoords="offset points", ha="center", va="bottom", fontsize=8)  # fmt: skip
        axes.set(xlabel="Tokens emitted by one step", xticks=tokens)
        axes.set_ylabel("Share of steps")
        axes.yaxis.set_major_formatter(_PERCENT)
        axes.margins(y=0.12)
        return svg.embed(
            figure, "accepted", "Steps by the number of tokens they emitted",
            "; ".join(f"{t} tokens: {_share(s)} of steps" for t, s in zip(tokens, shares, strict=True)) + ".",
        )  # fmt: skip


def head_accuracy(accuracy: Sequence[Sequence[float]]) -> str:
    """accuracy[head][k - 1]: share of held-out positions whose token is among the head's k most likely."""
    with svg.drawing(3.0) as (figure, axes):
        for head, row in enumerate(accuracy):
            ks = range(1, len(row) + 1)
            axes.plot(ks, row, color=svg.MEDUSA, alpha=_fade(head, len(accuracy)), marker="o", markersize=2.6)
        axes.set(xlabel="Among the head's k most likely tokens", ylim=(0, 1), xticks=range(1, len(accuracy[0]) + 1))
        _label_lines(axes, [row[-1] for row in accuracy], len(accuracy[0]) + 0.15)
        axes.yaxis.set_major_formatter(_PERCENT)
        firsts = ", ".join(f"head {i} {_share(row[0])}" for i, row in enumerate(accuracy))
        return svg.embed(
            figure, "heads", "Accuracy of each head, top 1 to top 8",
            f"One rising curve per head, the nearest head highest. Top 1: {firsts}.",
        )  # fmt: skip


def learning(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Top-1 accuracy of each head at each evaluation of the training."""
    steps = [e["step"] for e in evaluations]
    heads = len(evaluations[0]["accuracy"])
    with svg.drawing(3.0) as (figure, axes):
        for head in range(heads):
            axes.plot(steps, [e["accuracy"][head][0] for e in evaluations], color=svg.MEDUSA,
                      alpha=_fade(head, heads), marker="o", markersize=2.6)  # fmt: skip
        span = max(steps) - min(steps) or 1
        axes.set(xlabel="Optimizer step", ylim=(0, None))
        _label_lines(axes, [row[0] for row in evaluations[-1]["accuracy"]], max(steps) + 0.025 * span)
        axes.yaxis.set_major_formatter(_PERCENT)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return svg.embed(
            figure, "learning", "Top-1 accuracy of each head during training",
            f"{heads} curves over {len(evaluations)} evaluations, the last at step {steps[-1]}.",
        )  # fmt: skip


def step_cost(curve: Sequence[Mapping[str, float]], chosen: int) -> str:
    """Measured time of one step against the number of nodes it verifies."""
    ordered = sorted(curve, key=lambda c: c["nodes"])
    nodes, times = [c["nodes"] for c in ordered], [c["step_ms"] for c in ordered]
    with svg.drawing(2.7) as (figure, axes):
        axes.plot(nodes, times, color=svg.PLAIN, marker="o", markersize=2.8)
        _mark(axes, chosen, _interpolate(nodes, times, chosen), f"chosen: {chosen} nodes on average")
        axes.set(xlabel="Nodes of the tree, root included", ylabel="One step (ms)", ylim=(0, 1.2 * max(times)))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return svg.embed(
            figure, "cost", "Time of a step against the size of its tree",
            f"From {times[0]:.2f} ms at {nodes[0]} nodes to {times[-1]:.2f} ms at {nodes[-1]}.",
        )  # fmt: skip


def candidate_rates(candidates: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]) -> str:
    """Tokens per second that the calibration predicts for each drafter considered, by the mean size of its drafts.

    One line per length of a static tree's n-gram branch, and a dot per dynamic tree.
    Args: chosen: kind, nodes and mean_nodes of the one that tuning took.
    """
    with svg.drawing(2.7) as (figure, axes):
        static = [c for c in candidates if c["kind"] == "static"]
        dynamic = [c for c in candidates if c["kind"] == "dynamic"]
        best = max(candidates, key=lambda c: c["tokens_per_s"])
        ends = []
        for length in sorted({int(c["ngram"]) for c in static}):
            points = sorted((c["mean_nodes"], c["tokens_per_s"]) for c in static if c["ngram"] == length)
            axes.plot(*zip(*points, strict=True), color=svg.NGRAM if length else svg.PLAIN, marker="o", markersize=2.2,
                      linewidth=1.1, alpha=0.6)  # fmt: skip
            ends.append((points[-1], f"n-gram {length}" if length else "heads only"))
        if dynamic:
            axes.scatter([c["mean_nodes"] for c in dynamic], [c["tokens_per_s"] for c in dynamic], s=9,
                         color=svg.MEDUSA, alpha=0.7, linewidths=0, zorder=3, label="dynamic trees")  # fmt: skip
            axes.legend(loc="upper right", frameon=False, fontsize=7.5)
        right = max(c["mean_nodes"] for c in candidates)
        labels = _spread([e[0][1] for e in ends], 0.075 * 1.15 * best["tokens_per_s"])
        for ((x, _), text), y in zip(ends, labels, strict=True):
            axes.text(max(x, right) + 0.02 * right, y, text, fontsize=7.5, va="center", color=svg.MUTED)
        here = [
            c["tokens_per_s"] for c in candidates
            if c["kind"] == chosen["kind"] and c["nodes"] == chosen["nodes"] and c["mean_nodes"] == chosen["mean_nodes"]
        ]  # fmt: skip
        if here:
            _mark(axes, chosen["mean_nodes"], here[0], f"chosen: {chosen['kind']}, {chosen['mean_nodes']:.1f} nodes")
        axes.set(xlabel="Nodes of a draft on average, root included", ylabel="Predicted tokens/s",
                 ylim=(0, 1.2 * best["tokens_per_s"]))  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return svg.embed(
            figure, "candidates", "Predicted tokens per second of each drafter considered",
            f"{len(static)} static and {len(dynamic)} dynamic trees; the best is {best['kind']}, verifies "
            f"{best['mean_nodes']:.1f} nodes on average and gives {best['tokens_per_s']:.0f} tokens per second.",
        )  # fmt: skip


def costs(usd_per_million: Mapping[str, float], shown: Sides) -> str:
    """USD per million tokens of each side whose price is known."""
    names = [name for name in reversed(shown) if name in usd_per_million]
    with svg.drawing(0.9 + 0.42 * len(names)) as (figure, axes):
        values = [usd_per_million[name] for name in names]
        axes.barh(range(len(names)), values, color=[shown[name].color for name in names], height=0.62)
        for place, value in enumerate(values):
            axes.annotate(f"{value:#.3g}", (value, place), xytext=(4, 0), textcoords="offset points", va="center",
                          fontsize=8)  # fmt: skip
        axes.set_yticks(range(len(names)), [shown[name].label for name in names])
        axes.set(xlabel="USD per million tokens, one request at a time", xlim=(0, 1.15 * max(values)))
        axes.grid(visible=False)
        return svg.embed(
            figure, "usd", "Cost of a million tokens",
            "; ".join(f"{shown[n].label}: {usd_per_million[n]:#.3g} USD" for n in reversed(names)) + ".",
        )  # fmt: skip


def _share(value: float) -> str:
    return f"{100 * value:.0f} %" if value >= 0.01 or value == 0 else "<1 %"


def _fade(index: int, count: int) -> float:
    return 1 - 0.65 * index / max(count - 1, 1)


def _label_lines(axes: Axes, ends: Sequence[float], x: float) -> None:  # call it once the limits are set
    """Names the heads at the right end of their lines, moved apart where they would overlap."""
    for head, y in enumerate(_spread(ends, 0.055 * axes.get_ylim()[1])):
        axes.text(x, y, f"head {head}", fontsize=7.5, va="center", color=svg.MUTED)


def _spread(values: Sequence[float], gap: float) -> list[float]:
    """The values, each moved down as little as keeps them `gap` apart, from the highest down."""
    placed = [0.0] * len(values)
    last = float("inf")
    for index in sorted(range(len(values)), key=lambda i: -values[i]):
        last = min(values[index], last - gap)
        placed[index] = last
    return placed


def _interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    for (x0, y0), (x1, y1) in zip(zip(xs, ys, strict=True), zip(xs[1:], ys[1:], strict=True), strict=False):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return ys[0] if x < xs[0] else ys[-1]


def _mark(axes: Axes, x: float, y: float, text: str) -> None:
    """A ring at the chosen point, and its name at the foot of the plot, where no line runs."""
    axes.plot([x, x], [0, y], color=svg.MUTED, linewidth=0.7, linestyle=(0, (2, 2)), zorder=0)
    axes.plot([x], [y], marker="o", markersize=8, markerfacecolor="none", markeredgecolor=svg.INK, markeredgewidth=1.2)
    axes.annotate(text, (x, 0), xytext=(4, 5), textcoords="offset points", ha="left", va="bottom", fontsize=8)


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="best", handlelength=2.2)
