"""Our engine, or transformers, as a contestant in a process of its own.

    python benchmarks/peer_worker.py '{"kind": "ours", "model": "DIR", "tree": "tree", "nodes": 16}'
    python benchmarks/peer_worker.py '{"kind": "transformers", "model": "DIR", "generate": {}, "count": false}'

Requests are {"prompt": [ids], "max_new_tokens": n}. `count` counts the forwards of `generate`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipe

from gorgon.bench.compare import best_tree, read_document
from gorgon.bench.decoders import EngineDecoder, TransformersDecoder
from gorgon.config import Dtype
from gorgon.core.phrasebook import Phrasebook
from gorgon.core.tree import DraftTree
from gorgon.decode.candidates import drafter_of
from gorgon.decode.engine import Engine
from gorgon.decode.load import load_engine
from gorgon.models.backbone import load_backbone
from gorgon.models.directory import base_model

OURS = ("plain", "chain", "tree", "ngram", "tuned")
"""What `our_engine` can draft: nothing, first choices, a tree of the heads alone, the best static tree with an n-gram
branch, and what `tune` chose."""


def our_engine(model: str, tree: str, nodes: int, dtype: Dtype = "float32") -> Engine:
    """The only place that knows how our engine is made; `tree` is one of OURS, `nodes` the size of 'tree'."""
    engine = load_engine(model, dtype=dtype, steps="auto")
    if tree == "plain":
        return engine.plain()
    if tree == "chain":
        return engine.with_tree(DraftTree.chain(len(engine.heads or ())))
    if tree == "tree":
        tuned = read_document(Path(model) / "tree.json", "trees", "tune")
        return engine.with_tree(best_tree(tuned, nodes))
    if tree == "ngram":
        tuned = read_document(Path(model) / "tree.json", "best_static", "tune")
        return engine.with_drafter(drafter_of(tuned["best_static"], Phrasebook()))
    assert tree == "tuned"
    return engine


def ours(settings: dict[str, Any]) -> tuple[Callable[[dict[str, Any]], dict[str, Any]], dict[str, Any]]:
    engine = our_engine(settings["model"], settings["tree"], settings["nodes"], settings["dtype"])
    decoder = EngineDecoder(settings["tree"], engine)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        made = decoder.answer(request["prompt"], request["max_new_tokens"], ())
        seconds = time.perf_counter() - start
        return {"token_ids": made.token_ids, "text": made.text, "seconds": seconds, "steps": len(made.step_tokens)}

    return answer, {"nodes": engine.drafter(1).nodes, "drafter": type(engine.drafter(1)).__name__}


def transformers(settings: dict[str, Any]) -> tuple[Callable[[dict[str, Any]], dict[str, Any]], dict[str, Any]]:
    import torch

    backbone = load_backbone(base_model(settings["model"]), dtype=settings["dtype"])
    TransformersDecoder(backbone)  # sets the greedy generation configuration
    arguments = _arguments(settings["generate"])
    steps = 0
    if settings["count"]:  # a wrapper would be in the way of torch.compile

        def counted(module: Any, *_: Any) -> None:
            nonlocal steps
            steps += 1

        backbone.model.register_forward_pre_hook(counted)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal steps
        steps, start = 0, time.perf_counter()
        ids = torch.tensor([request["prompt"]], device=backbone.device)
        made = backbone.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=request["max_new_tokens"], **arguments
        )
        token_ids = made[0, ids.shape[1] :].tolist()
        text = backbone.tokenizer.decode(token_ids, skip_special_tokens=True)
        seconds = time.perf_counter() - start
        return {"token_ids": token_ids, "text": text, "seconds": seconds, "steps": max(steps - 1, 0) or None}

    return answer, {}


def _arguments(generate: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate`; {"compile": true} becomes transformers' own compiled decoding, on a CPU too."""
    from transformers import CompileConfig

    arguments = dict(generate)
    if arguments.pop("compile", False):
        compiled = CompileConfig(fullgraph=False, mode="default")
        compiled._compile_all_devices = True  # otherwise transformers compiles on accelerators only
        arguments |= {"compile_config": compiled}
    return arguments


def main() -> None:
    out = pipe.take_stdout()
    import torch

    settings = json.loads(sys.argv[1])
    made = {"ours": ours, "transformers": transformers}[settings["kind"]]
    answer, facts = made(settings)
    pipe.serve(out, answer, {**facts, "threads": torch.get_num_threads()})


if __name__ == "__main__":
    main()
