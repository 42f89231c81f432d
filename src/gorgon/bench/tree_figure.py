"""Draws draft trees: a static one with how often each node was accepted, or the one that a step grew."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from matplotlib.path import Path as Curve

from gorgon.bench import svg

ROW_IN = 0.25


def static_tree(tree: Mapping[str, Any]) -> str:
    """A static tree with the share of steps that accepted each node, and in brackets the share that was expected.

    Args: tree: `tree` of summary.json, of kind 'static'.
    """
    labels = ["root"]
    for observed, expected in zip(tree["observed"][1:], tree["expected"][1:], strict=True):
        seen = f"{100 * observed:.0f}"
        labels.append(seen if expected is None else f"{seen} ({100 * expected:.0f})")
    first_chain = 1 + len(tree["paths"])
    firsts = ", ".join(
        f"depth {len(p)} accepted in {100 * tree['observed'][i + 1]:.0f} % of steps"
        for i, p in enumerate(tree["paths"]) if not any(p)
    )  # fmt: skip
    return _draw(
        tree["parents"], tree["observed"], labels, copied=range(first_chain, len(tree["parents"])),
        title=f"The draft tree: {len(tree['parents'])} nodes, {tree['ngram']} of them an n-gram branch",
        description="From the decided token at the left, drafts branch to the right. First choices of the heads: "
        + firsts + ".",
    )  # fmt: skip


def step_tree(example: Mapping[str, Any]) -> str:
    """The tree that one step verified, with its tokens; accepted ones are drawn strong.

    Args: example: `tree.example` of summary.json: parents, texts and accepted by node.
    """
    accepted = [1.0 if yes else 0.0 for yes in example["accepted"]]
    right = [text for text, yes in zip(example["texts"], example["accepted"], strict=True) if yes]
    return _draw(
        example["parents"], accepted, [_visible(text) for text in example["texts"]], copied=(),
        title=f"The draft tree of one step: {len(accepted)} nodes",
        description="Accepted, from the root: " + " ".join(map(_visible, right)) + ".",
    )  # fmt: skip


def _visible(text: str) -> str:
    """A token's text with its white space shown, short enough for a figure."""
    shown = text.replace("\n", "↵").replace(" ", "·").replace("$", r"\$")
    return shown if len(shown) <= 12 else shown[:11] + "…"


def _draw(
    parents: Sequence[int],
    weight: Sequence[float],
    labels: Sequence[str],
    *,
    copied: Container[int],
    title: str,
    description: str,
) -> str:
    """The tree from left to right, one column per depth, a node's first child straight behind it."""
    from matplotlib.patches import PathPatch

    depths = [0] * len(parents)
    for node in range(1, len(parents)):
        depths[node] = depths[parents[node]] + 1
    rows = _rows(parents)
    with svg.drawing(0.75 + ROW_IN * (max(rows) + 1)) as (figure, axes):
        for node in range(1, len(parents)):
            x0, y0, x1, y1 = depths[parents[node]], rows[parents[node]], depths[node], rows[node]
            bend = [(x0, y0), (x0 + 0.5, y0), (x0 + 0.25, y1), (x1, y1)] if y0 != y1 else [(x0, y0), (x1, y1)]
            codes = [Curve.MOVETO, *([Curve.CURVE4] * 3 if y0 != y1 else [Curve.LINETO])]
            axes.add_patch(PathPatch(
                Curve(bend, codes), facecolor="none", edgecolor=svg.NGRAM if node in copied else svg.MEDUSA,
                linewidth=0.6 + 3.2 * weight[node], alpha=0.75, zorder=1, capstyle="round",
            ))  # fmt: skip
        for node, label in enumerate(labels):
            color = svg.INK if node == 0 else svg.NGRAM if node in copied else svg.MEDUSA
            axes.scatter([depths[node]], [rows[node]], s=8 + 42 * weight[node], color=color, zorder=3, linewidths=0)
            axes.annotate(label, (depths[node], rows[node]), xytext=(0, 4.6), textcoords="offset points",
                          ha="center", va="bottom", fontsize=7.4, zorder=4)  # fmt: skip
        chain = [node for node in range(len(parents)) if node in copied]
        if chain:
            axes.annotate("copied from the context", (0.1, rows[chain[0]]), xytext=(0, -5), color=svg.MUTED,
                          textcoords="offset points", ha="left", va="top", fontsize=7.4)  # fmt: skip
        axes.set(xlim=(-0.3, max(depths) + 0.4), ylim=(max(rows) + 0.9, -1.1), xticks=range(max(depths) + 1))
        axes.set_xticklabels(["decided", *(f"+{d}" for d in range(1, max(depths) + 1))])
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(length=0)
        return svg.embed(figure, "tree", title, description)


def _rows(parents: Sequence[int]) -> list[int]:
    """A row for each node: its first child shares the node's own, every further one opens a new row."""
    children: list[list[int]] = [[] for _ in parents]
    for node in range(1, len(parents)):
        children[parents[node]].append(node)
    rows, used = [0] * len(parents), 0

    stack = [(0, True)]
    while stack:
        node, is_first = stack.pop()
        if not is_first:
            used += 1
        rows[node] = used
        stack.extend((child, index == 0) for index, child in reversed(list(enumerate(children[node]))))
    return rows
