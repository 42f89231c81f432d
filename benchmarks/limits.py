"""How close a step comes to what the machine can do: step time against tree size, for models of several sizes.

    python benchmarks/limits.py                        # results/limits.json and docs/figures/limits.svg
    python benchmarks/limits.py --sizes 4M,30M --threads 2
    python benchmarks/limits.py --figure               # the figure alone, from the committed result
    python benchmarks/limits.py --device cuda          # 1B, 8B in bfloat16, with and without CUDA graphs

Weights are random: a step's time does not depend on their values. Steps are timed without heads, because a head's cost
depends on the draft vocabulary that `tune` chooses. docs/peers.md says what the floor is.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from gorgon.artifacts import provenance, write_json
from gorgon.bench.decoders import PLAIN as PLAIN_NAME
from gorgon.bench.decoders import EngineDecoder, TransformersDecoder
from gorgon.bench.measure import measure as measure_decoders
from gorgon.bench.summary import speedup, tokens_per_second
from gorgon.bench.workload import Prompt
from gorgon.core.draft import Draft
from gorgon.core.tree import DraftTree
from gorgon.decode.engine import PLAIN, Engine
from gorgon.decode.inputs import Inputs
from gorgon.models.backbone import Backbone, pick_dtype
from gorgon.models.cache import TreeCache
from gorgon.progress import say

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"cpu": "limits", "cuda": "limits-cuda"}
"""Of result and figure."""
CPU = torch.device("cpu")
NODES = (1, 2, 4, 8, 16, 32, 64)
LINES = {"eager": ("#8a6d3b", "--"), "captured": ("#8a6d3b", ":"), "engine": ("#1f6feb", "-")}
"""How the figure draws each way of running steps."""
CONTEXT = 256
"""Tokens in the cache when a step begins."""
LONGEST = 5
"""Depth of the trees: as many levels as there usually are heads."""
SECONDS, LEAST, MOST = 2.0, 5, 200
"""A point is timed for this long, but for at least and at most so many steps."""
STREAM_BYTES = 1 << 30
"""What is read to measure the memory itself: far more than any cache holds."""
ANSWER, TRIALS = 24, 5
"""Tokens of an answer, and how often each decoder writes it, when plain decoding is set beside `generate`."""
SIZES: dict[str, dict[str, Any]] = {
    "4M": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
           "num_key_value_heads": 4, "vocab_size": 2048},
    "30M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 4, "vocab_size": 8192},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "360M": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
             "num_key_value_heads": 5, "vocab_size": 49152, "tie_word_embeddings": True},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
           "num_key_value_heads": 4, "vocab_size": 32000},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
"""Shapes: the embedded model, one between, SmolLM's two smaller ones, TinyLlama's, Llama 3.1's."""
MEASURED = {"cpu": ["4M", "30M", "135M", "360M", "1B"], "cuda": ["1B", "8B"]}
"""Sizes that are measured unless others are asked for."""


class _Tokenizer:
    """A backbone needs one; no text is made here."""

    eos_token_id, pad_token_id = 1, None

    def decode(self, ids: list[int], **_: bool) -> str:
        return " ".join(map(str, ids))


def random_backbone(size: str, device: torch.device = CPU) -> Backbone:
    """A Llama of this size with random weights, in the dtype of the device."""
    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=1024, **SIZES[size])
    dtype = pick_dtype("auto", device)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    model.generation_config = GenerationConfig(eos_token_id=1)
    return Backbone(size, model, _Tokenizer(), device, dtype)


def tree_of(nodes: int) -> DraftTree:
    """A tree of the usual form: the most promising ranks first, where a rank costs as much as a level."""
    paths: list[tuple[int, ...]] = []
    for total in itertools.count(1):
        if len(paths) >= nodes - 1:
            return DraftTree.of(paths[: nodes - 1])
        for depth in range(1, min(total, LONGEST) + 1):
            for cuts in itertools.combinations(range(1, total), depth - 1):
                edges = (0, *cuts, total)
                paths.append(tuple(b - a - 1 for a, b in itertools.pairwise(edges)))
    raise AssertionError


def step_of(backbone: Backbone, nodes: int) -> Callable[[], None]:
    """One whole step on a context of CONTEXT tokens; the only place that knows how the engine makes one."""
    tree = tree_of(nodes)
    shape = Draft(7)
    for parent in tree.parents[1:]:
        shape.add(9, parent)
    cache = TreeCache(int(backbone.text_config.num_hidden_layers), 1, 2 * CONTEXT)
    engine = Engine(backbone, None, PLAIN)
    stepper = engine.stepper(1)
    stepper.prompt(cache, [i % backbone.vocab_size for i in range(CONTEXT)], 0)
    visible, inputs = backbone.visible(CONTEXT + nodes, cache.capacity), Inputs(backbone.device)

    def step() -> None:
        batch = inputs.drafts([shape], engine.filled(nodes, nodes))
        stepper.step(cache, batch, inputs.lengths([CONTEXT]), visible)

    return step


def as_stored(_backbone: Backbone) -> None:
    """transformers' modules as they are loaded."""


def as_captured(backbone: Backbone) -> None:
    """The same kernels as CUDA graphs, but for attention's."""
    backbone.run_steps("captured")


def as_engine(backbone: Backbone) -> None:
    """What `load_engine(..., steps="auto")` does to a backbone."""
    backbone.run_steps("auto")


PATHS: dict[str, dict[str, Callable[[Backbone], None]]] = {
    "cpu": {"eager": as_stored, "engine": as_engine},
    "cuda": {"eager": as_stored, "captured": as_captured, "engine": as_engine},
}


def wait(device: torch.device) -> None:
    """Until the device has done what it was given; a step ends with its own wait."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_ms(call: Callable[[], object], seconds: float, device: torch.device = CPU) -> dict[str, float]:
    """Median and lowest time of a call, in ms, after two that are not counted."""
    for _ in range(2):
        call()
    wait(device)
    samples: list[float] = []
    while len(samples) < LEAST or (sum(samples) < seconds and len(samples) < MOST):
        start = time.perf_counter()
        call()
        wait(device)
        samples.append(time.perf_counter() - start)
    return summary_ms(samples)


def summary_ms(samples: list[float]) -> dict[str, float]:
    """Median and lowest of times in seconds, in ms."""
    return {"median": round(1000 * statistics.median(samples), 4), "lowest": round(1000 * min(samples), 4)}


def step_times(backbone: Backbone, seconds: float) -> dict[str, dict[str, float]]:
    """Step time per tree size; sizes take turns, so that a busy moment hits all alike."""
    steps = {nodes: step_of(backbone, nodes) for nodes in NODES}
    samples: dict[int, list[float]] = {nodes: [] for nodes in NODES}
    for step in steps.values():
        step()
        step()
    begun = time.perf_counter()
    for turn in range(MOST):
        if turn >= LEAST and time.perf_counter() - begun > seconds * len(NODES):
            break
        for nodes, step in steps.items():
            start = time.perf_counter()
            step()
            samples[nodes].append(time.perf_counter() - start)
    return {str(nodes): summary_ms(taken) for nodes, taken in samples.items()}


def beside_generate(backbone: Backbone, as_loaded: Backbone) -> dict[str, Any]:
    """Plain decoding against `transformers.generate` on the weights as loaded: ms per token, and if tokens agree."""
    prompt = Prompt("numbers", "", None, "", [i % backbone.vocab_size for i in range(2, CONTEXT // 2)])
    decoders = [EngineDecoder(PLAIN_NAME, Engine(backbone, None, PLAIN)), TransformersDecoder(as_loaded)]
    ours, theirs = measure_decoders(
        decoders, [prompt], max_new_tokens=ANSWER, stop=(), trials=TRIALS, warmup_prompts=1
    ).values()
    rates = {"generate": tokens_per_second(theirs), "engine": tokens_per_second(ours)}
    median, lowest_highest = speedup(ours, theirs)
    return {
        "ms_per_token": {name: round(1000 / rate, 3) for name, (rate, _) in rates.items()},
        "speedup": [median, *lowest_highest],
        "equal": theirs.exact_match == 1.0,
    }


@torch.inference_mode()
def bandwidth(size_bytes: int, device: torch.device = CPU, seconds: float = 1.0) -> float:
    """Bytes per second of reading a buffer of this size over and over: the faster of a sum and a matrix-vector product.

    A buffer that fits the caches is read faster than memory, as the weights of a small model are.
    """
    columns = 1024
    rows = max(1, size_bytes // 4 // columns)
    buffer_RC, vector_C = torch.ones(rows, columns, device=device), torch.ones(columns, device=device)
    calls = (buffer_RC.sum, lambda: torch.mv(buffer_RC, vector_C))
    fastest = min(timed_ms(call, seconds, device)["lowest"] for call in calls)
    return rows * columns * 4 / fastest * 1000


@torch.inference_mode()
def matrix_rate(device: torch.device = CPU, seconds: float = 2.0) -> float:
    """Floating-point operations per second of a large matrix product in the dtype of the device."""
    size = 2048 if device.type == "cpu" else 8192
    left, right = torch.ones(2, size, size, dtype=pick_dtype("auto", device), device=device)
    return 2 * size**3 / timed_ms(lambda: left @ right, seconds, device)["lowest"] * 1000


def costs(backbone: Backbone) -> dict[str, int]:
    """What a step cannot avoid: bytes of weights and of cached keys and values, and operations per node."""
    config = backbone.text_config
    linear = [m for m in backbone.model.modules() if isinstance(m, torch.nn.Linear)]
    weights = sum(m.weight.numel() for m in linear)
    head_size = config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * CONTEXT * config.num_key_value_heads * head_size
    attention = 4 * config.num_hidden_layers * CONTEXT * config.hidden_size
    size = backbone.dtype.itemsize
    return {"weight_bytes": size * weights, "cache_bytes": size * cached, "flops_per_node": 2 * weights + attention}


def measure(size: str, rate: float, memory: float, seconds: float, device: torch.device) -> dict[str, Any]:
    backbone = random_backbone(size, device)
    parameters, cost = backbone.parameters, costs(backbone)
    as_loaded = Backbone(size, copy.deepcopy(backbone.model), backbone.tokenizer, device, backbone.dtype)
    total = cost["weight_bytes"] + cost["cache_bytes"]
    reached = max(memory, bandwidth(min(total, STREAM_BYTES), device))
    steps: dict[str, Any] = {}
    for path, prepare in PATHS[device.type].items():
        prepare(backbone)
        steps[path] = step_times(backbone, seconds) | ({"run": backbone.steps} if device.type == "cuda" else {})
        curve = ", ".join(f"{n}: {steps[path][str(n)]['median']:.2f}" for n in NODES)
        say(f"{size} {path}: {curve} ms")
    plain = beside_generate(backbone, as_loaded)
    say(f"{size} plain decoding beside generate: {plain}")
    floor = {str(n): round(1000 * max(total / reached, n * cost["flops_per_node"] / rate), 4) for n in NODES}
    return {"parameters": parameters, "shape": SIZES[size], **cost, "bandwidth_gb_s": round(reached / 1e9, 2),
            "floor_ms": floor, "step_ms": steps, "plain": plain}  # fmt: skip


def run(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    memory, rate = bandwidth(STREAM_BYTES, device), matrix_rate(device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{options.threads} threads"
    say(f"memory {memory / 1e9:.1f} GB/s, matrix products {rate / 1e9:.0f} GFLOP/s on {where}")
    models = {}
    for size in options.sizes:
        models[size] = measure(size, rate, memory, options.seconds, device)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {
        "format": 1,
        "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
        "weights": "random",
        "heads": "left out",
        "dtype": str(pick_dtype("auto", device)).removeprefix("torch."),
        "device": where,
        "threads": options.threads,
        "context": CONTEXT,
        "memory_gb_s": round(memory / 1e9, 2),
        "matrix_gflop_s": round(rate / 1e9, 1),
        "models": models,
        **provenance(),
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """One panel per model: step time of both paths and the floor, over the number of nodes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": "limits", "font.size": 9, "axes.spines.top": False,
             "axes.spines.right": False, "legend.frameon": False, "figure.constrained_layout.use": True}  # fmt: skip
    models = result["models"]
    with mpl.rc_context(style):
        figure = Figure(figsize=(2.6 * len(models) + 0.6, 2.9), facecolor="white")
        panels = figure.subplots(1, len(models), squeeze=False)[0]
        for axes, (size, model) in zip(panels, models.items(), strict=True):
            nodes = [int(n) for n in model["floor_ms"]]
            axes.fill_between(nodes, list(model["floor_ms"].values()), color="#d8dde3", label="floor", linewidth=0)
            for name, (color, dash) in LINES.items():
                if name not in model["step_ms"]:
                    continue
                times = [model["step_ms"][name][str(n)]["median"] for n in nodes]
                axes.plot(nodes, times, dash, color=color, marker="o", markersize=3, label=name)
            axes.set_xscale("log", base=2)
            axes.set_xticks(nodes, [str(n) for n in nodes])
            axes.set(title=f"{size} parameters", xlabel="nodes in the tree", ylim=(0, None))
        panels[0].set_ylabel("step time (ms)")
        panels[0].legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=lambda text: text.split(","), help=", ".join(SIZES))
    parser.add_argument("--device", choices=list(NAMES), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time per point")
    parser.add_argument("--figure", action="store_true", help="draw the committed result and measure nothing")
    parser.add_argument("--out", type=Path, help="benchmarks/results/limits.json, or limits-cuda.json")
    parser.add_argument("--figure-out", type=Path, help="docs/figures/limits.svg, or limits-cuda.svg")
    options = parser.parse_args()
    name = NAMES[options.device]
    options.sizes = options.sizes or MEASURED[options.device]
    options.out = options.out or ROOT / "benchmarks" / "results" / f"{name}.json"
    options.figure_out = options.figure_out or ROOT / "docs" / "figures" / f"{name}.svg"
    if options.device == "cuda" and not torch.cuda.is_available() and not options.figure:
        parser.error("no CUDA GPU is here")
    unknown = [size for size in options.sizes if size not in SIZES]
    if unknown:
        parser.error(f"unknown size {unknown[0]!r}; known: {', '.join(SIZES)}")
    if not options.figure:
        write_json(options.out, run(options))
    draw(json.loads(options.out.read_text(encoding="utf-8")), options.figure_out)
    print(options.figure_out)


if __name__ == "__main__":
    main()
