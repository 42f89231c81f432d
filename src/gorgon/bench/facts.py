"""What the files of earlier steps tell a report: the heads' accuracy, what was tuned. Read without loading a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gorgon.errors import GorgonError


def single_request(tuned: Mapping[str, Any]) -> dict[str, Any]:
    """The tuned tree for batch size 1.

    Raises: GorgonError when tree.json holds none.
    """
    for entry in tuned["trees"]:
        if entry["batch_size"] == 1:
            return dict(entry)
    raise GorgonError("tree.json has no tree for single requests", field="trees", hint="run `gorgon tune` again")


def head_facts(heads: Mapping[str, Any]) -> dict[str, Any]:
    """The heads' accuracy at the evaluation that was kept, the best and not the last, and how they got there."""
    evaluations = heads.get("evaluations") or []
    best: dict[str, Any] = min(evaluations, key=lambda e: e["loss"], default={"accuracy": []})
    return {"top1": [row[0] for row in best["accuracy"]], "accuracy": best["accuracy"], "evaluations": evaluations}


def tuned_facts(tuned: Mapping[str, Any]) -> dict[str, Any]:
    """What tuning chose for single requests, and the costs that chose it."""
    chosen = single_request(tuned)
    return {
        **{key: chosen[key] for key in ("kind", "nodes", "mean_nodes")},
        "ngram": chosen.get("ngram", 0),
        "cost_curve": tuned["cost_curves"]["1"],
        "candidates": tuned["candidates"],
    }
