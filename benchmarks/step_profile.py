"""Where a step's time goes: drafting, the forward over the tree, acceptance and commit, the heads, the rest.

    python benchmarks/step_profile.py MODEL                  # a directory that `tune` wrote
    python benchmarks/step_profile.py MODEL --device cuda    # bfloat16, with and without CUDA graphs

For each way of running steps and several tree sizes, medians over many steps on one context. The parts are timed by
leaving them out: the forward alone, whole steps with and without the heads that `tune` chose, the drafter alone. Writes
results/step-profile.json and docs/figures/step-profile.svg (on a GPU, step-profile-cuda).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from gorgon.artifacts import provenance, write_json
from gorgon.core.draft import Draft
from gorgon.decode.dynamic import DynamicDrafter
from gorgon.decode.inputs import DraftBatch, Inputs
from gorgon.decode.load import engine_on, read_drafters
from gorgon.decode.ngrams import NgramIndex
from gorgon.decode.step import HeadChoices, Stepper, packed_heads
from gorgon.models.backbone import load_backbone
from gorgon.models.cache import TreeCache
from gorgon.models.directory import base_model, read_phrasebook, read_tree_file
from gorgon.progress import say

ROOT = Path(__file__).resolve().parent.parent
MODES = {"cpu": ("eager", "recorded", "compiled"), "cuda": ("eager", "captured", "compiled")}
NODES = (1, 4, 8, 16, 24)
CONTEXT, STEPS = 120, 120
PARTS = ("draft", "forward", "accept and commit", "heads")
COLORS = {"draft": "#c9a227", "forward": "#2f6f73", "accept and commit": "#8fb8a8", "heads": "#b5543f"}


def medians_ms(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Median time of each call, after a few that are not counted; calls take turns, so that a busy moment hits all."""
    samples: list[list[float]] = [[] for _ in calls]
    for i in range(STEPS):
        for call, mine in zip(calls, samples, strict=True):
            start = time.perf_counter()
            call()
            if i >= 10:
                mine.append(1000 * (time.perf_counter() - start))
    return [statistics.median(mine) for mine in samples]


def profile(model: Path, mode: Any, device: str) -> dict[str, dict[str, float]]:
    """Part -> ms by number of nodes, for one way of running steps."""
    backbone, document = load_backbone(base_model(model), device=device), read_tree_file(model)
    engine = engine_on(backbone, model)
    backbone.run_steps(mode)
    drafters = read_drafters(document, read_phrasebook(model, backbone.vocab_size)).values()
    drafter = next((d for d in drafters if isinstance(d, DynamicDrafter)), None)
    assert engine.heads is not None
    count, width = max(1, engine.drafter(1).heads), max(1, engine.drafter(1).width)
    bare = Stepper(backbone, None, 0, None)
    full = Stepper(
        backbone, packed_heads(backbone, engine.heads, count, engine.vocabulary_U), width, engine.vocabulary_U
    )
    cache = TreeCache(int(backbone.text_config.num_hidden_layers), 1, CONTEXT + 128)
    prompt = [5 + i % (backbone.vocab_size - 5) for i in range(CONTEXT)]
    bare.prompt(cache, prompt, 0)
    lengths, context = torch.tensor([CONTEXT], device=backbone.device), NgramIndex(prompt)
    choices = HeadChoices.of([list(range(5, 5 + width))] * count, [[-0.3 - i for i in range(width)]] * count)
    found: dict[str, dict[str, float]] = {}
    for nodes in NODES:
        draft = Draft(7)
        for i in range(nodes - 1):
            draft.add(9, max(0, i - 1))
        batch = Inputs(backbone.device).drafts([draft], engine.filled(nodes, nodes))
        visible = backbone.visible(CONTEXT + nodes, cache.capacity)
        forward, settle, with_heads = _parts(bare, full, cache, batch, lengths, visible)
        drafting = 0.0
        if drafter is not None and nodes > 1:
            grown = DynamicDrafter(drafter.acceptance, drafter.phrasebook, nodes=nodes, threshold=0.001, width=width)
            (drafting,) = medians_ms([lambda: grown.draft(7, choices, context)])  # noqa: B023
        found[str(nodes)] = {
            "draft": round(drafting, 4), "forward": round(forward, 4), "accept and commit": round(settle, 4),
            "heads": round(with_heads - settle, 4),
        }  # fmt: skip
        say(f"{mode}, {nodes} nodes: {found[str(nodes)]}")
    return found


@torch.inference_mode()
def _parts(
    bare: Stepper, full: Stepper, cache: TreeCache, batch: DraftBatch, lengths: torch.Tensor, visible: int
) -> tuple[float, float, float]:
    """Forward, the rest of a step without heads, and with them: a whole step less its forward."""
    pair = bare._captured(cache, batch, lengths, visible, True)

    def forward() -> None:
        if pair is None:
            bare.functions(cache).forward(batch.flat_4BN, batch.rows_Q, lengths, visible)
        else:
            pair.run(0)
        if lengths.device.type == "cuda":
            torch.cuda.synchronize()

    steppers = [bare] if batch.nodes == 1 else [bare, full]
    first, *whole = medians_ms([forward, *(partial(s.step, cache, batch, lengths, visible) for s in steppers)])
    return first, whole[0] - first, whole[-1] - first


def draw(modes: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """One stacked bar per mode and size."""
    figure, axes = plt.subplots(figsize=(7.5, 3.2))
    ticks, labels, at = [], [], 0.0
    for mode, by_nodes in modes.items():
        for nodes, parts in by_nodes.items():
            bottom = 0.0
            for part in PARTS:
                axes.bar(at, max(parts[part], 0), bottom=bottom, color=COLORS[part], width=0.8,
                         label=part if not ticks else None)  # fmt: skip
                bottom += max(parts[part], 0)
            ticks.append(at)
            labels.append(nodes)
            at += 1
        axes.annotate(mode, (at - 1 - (len(by_nodes) - 1) / 2, 0), xytext=(0, -26), textcoords="offset points",
                      ha="center", fontsize=9)  # fmt: skip
        at += 0.7
    axes.set_xticks(ticks, labels, fontsize=8)
    axes.set_ylabel("One step (ms)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.14))
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", choices=list(MODES), default="cpu")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU is here")
    modes = {mode: profile(options.model, mode, options.device) for mode in MODES[options.device]}
    name = "step-profile" if options.device == "cpu" else "step-profile-cuda"
    result = {"name": name, "context": CONTEXT, "steps": STEPS, "threads": torch.get_num_threads(),
              "ms": modes, **provenance()}  # fmt: skip
    write_json(ROOT / "benchmarks" / "results" / f"{name}.json", result)
    (ROOT / "docs" / "figures").mkdir(exist_ok=True)
    draw(modes, ROOT / "docs" / "figures" / f"{name}.svg")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
