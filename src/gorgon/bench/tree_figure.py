"""Draws a draft tree: where its nodes hang, and how often each was accepted."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.path import Path as Curve

from gorgon.bench import svg

ROW_IN = 0.25


def draft_tree(
    paths: Sequence[Sequence[int]],
    ngram: int,
    parents: Sequence[int],
    observed: Sequence[float],
    expected: Sequence[float | None],
) -> str:
    """The tree from left to right, one column per depth, the likeliest child of a node straight behind it.

    Args: paths, ngram, parents: as in `core.tree.DraftTree`; observed, expected: for each node the share of steps, or
        of calibration positions, in which it was accepted, 0..1; None where nothing was expected (n-gram nodes).
    """
    from matplotlib.patches import PathPatch

    depths = [0, *(len(p) for p in paths), *range(1, ngram + 1)]
    rows = _rows(parents)
    first_chain = 1 + len(paths)
    with svg.drawing(0.75 + ROW_IN * (max(rows) + 1)) as (figure, axes):
        for node in range(1, len(parents)):
            x0, y0, x1, y1 = depths[parents[node]], rows[parents[node]], depths[node], rows[node]
            bend = [(x0, y0), (x0 + 0.5, y0), (x0 + 0.25, y1), (x1, y1)] if y0 != y1 else [(x0, y0), (x1, y1)]
            codes = [Curve.MOVETO, *([Curve.CURVE4] * 3 if y0 != y1 else [Curve.LINETO])]
            axes.add_patch(PathPatch(
                Curve(bend, codes), facecolor="none", edgecolor=svg.NGRAM if node >= first_chain else svg.MEDUSA,
                linewidth=0.6 + 3.2 * observed[node], alpha=0.75, zorder=1, capstyle="round",
            ))  # fmt: skip
        for node in range(len(parents)):
            color = svg.INK if node == 0 else svg.NGRAM if node >= first_chain else svg.MEDUSA
            axes.scatter([depths[node]], [rows[node]], s=8 + 42 * observed[node], color=color, zorder=3, linewidths=0)
            if node:
                axes.annotate(_label(observed[node], expected[node]), (depths[node], rows[node]), xytext=(0, 4.6),
                              textcoords="offset points", ha="center", va="bottom", fontsize=7.4, zorder=4)  # fmt: skip
        axes.annotate("root", (0, 0), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=7.6)
        if ngram:
            axes.annotate("copied from the context", (0.1, rows[first_chain]), xytext=(0, -5), color=svg.MUTED,
                          textcoords="offset points", ha="left", va="top", fontsize=7.4)  # fmt: skip
        axes.set(xlim=(-0.3, max(depths) + 0.4), ylim=(max(rows) + 0.9, -1.1), xticks=range(max(depths) + 1))
        axes.set_xticklabels(["decided", *(f"+{d}" for d in range(1, max(depths) + 1))])
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(length=0)
        return svg.embed(
            figure, "tree", f"The draft tree: {len(parents)} nodes, {ngram} of them an n-gram branch",
            "From the decided token at the left, drafts branch to the right. First choices of the heads: "
            + ", ".join(f"depth {len(p)} accepted in {100 * observed[i + 1]:.0f} % of steps"
                        for i, p in enumerate(paths) if not any(p)) + ".",
        )  # fmt: skip


def _label(observed: float, expected: float | None) -> str:
    seen = f"{100 * observed:.0f}"
    return seen if expected is None else f"{seen} ({100 * expected:.0f})"


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
