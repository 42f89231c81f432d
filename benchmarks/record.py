"""Keeps a finished run as a committed result, and renders the README's table from all committed results.

    python benchmarks/record.py runs/text-to-sql-cpu    # writes results/text-to-sql-cpu.json and the README's table
    python benchmarks/record.py                         # the tables alone

`benchmarks/peers.py` writes results of its own, peers-NAME.json, which make the README's second table. A result
holds the run's whole summary, each step's settings, times and metrics, and the versions, commit and machine it was
measured with. Runs are read where they are; paths outside the project are reduced to their names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
OTHERS = ("peers-", "limits", "decoding-", "step-profile", "serve")
"""Results that other benchmarks write; they are no recipe's run."""


def result_of(run: Path) -> dict[str, Any]:
    """Everything of a finished recipe run that a reader needs to judge or repeat it."""
    summary = json.loads((run / "compare" / "summary.json").read_text(encoding="utf-8"))
    manifests = {p.parent.name: json.loads(p.read_text(encoding="utf-8")) for p in run.glob("*/manifest.json")}
    order = sorted(manifests, key=lambda step: manifests[step]["started"])
    steps = {
        step: {key: manifests[step][key] for key in ("config", "seconds", "timings_s", "metrics", "warnings")}
        for step in order
    }
    recorded = manifests["compare"]["started"]
    return _portable({"name": run.name, "recorded": recorded, "steps": steps, "summary": summary})


def _portable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_portable(item) for item in value]
    if isinstance(value, str) and (value.startswith(("/", "../", "~"))):
        return Path(value).name
    return value


def table(results: list[dict[str, Any]]) -> str:
    """The README's rows: one per result, tokens per step beside every speed-up."""
    lines = [
        "| run | model, machine | exact match | tokens per step | vs plain | vs `transformers` | mean latency |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        s = result["summary"]
        speed, latency = s["speedup"], s["latency_ms"]
        plain, hf = speed["vs_plain_range"], speed["vs_transformers_range"]
        device, threads = s["model"]["device"], s["model"]["threads"]
        where = f"{threads} CPU threads" if device == "cpu" else device
        cells = [
            f"`{result['name']}`",
            f"{s['model']['parameters'] / 1e6:.1f}M, {s['model']['dtype']}, {where}",
            f"{s['exact_match']:.3f} of {s['prompts']}",
            f"{s['tokens_per_step']:.2f} ({s['tree']['nodes']} nodes)",
            f"**{speed['vs_plain']:.2f}x** ({plain[0]:.2f} to {plain[1]:.2f})",
            f"**{speed['vs_transformers']:.2f}x** ({hf[0]:.2f} to {hf[1]:.2f})",
            f"{latency['plain']['mean']:.1f} to {latency['medusa']['mean']:.1f} ms",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def peers_table(result: dict[str, Any]) -> str:
    """One row per contestant, slowest peer or not; ratios are total time over that of our tuned tree."""
    lines = [
        "| decoder | exact match | tokens per step | mean, p50, p90 (ms) | tokens/s | peak memory | time over ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in result["contestants"].values():
        latency, low_high = entry["latency_ms"], entry["time_over_ours_range"]
        per_step = entry["tokens_per_step"]
        cells = [
            entry["label"] + settings_text(entry["settings"]),
            f"{entry['exact_match']:.3f}",
            "-" if per_step is None else f"{per_step:.2f}",
            f"{latency['mean']:.1f}, {latency['p50']:.1f}, {latency['p90']:.1f}",
            f"{entry['tokens_per_s']:.0f}",
            f"{entry['peak_mb']} MiB",
            f"**{entry['time_over_ours']:.2f}x** ({low_high[0]:.2f} to {low_high[1]:.2f})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def settings_text(settings: dict[str, Any]) -> str:
    """What of a contestant was tuned or chosen, in brackets."""
    given = {**settings.get("generate", {}), **settings.get("speculative", {})}
    tokens = given.get("prompt_lookup_num_tokens", given.get("num_speculative_tokens"))
    words = []
    if tokens is not None:
        words.append(f"{tokens} tokens")
    if "nodes" in settings:
        words.append(f"{settings['nodes']} nodes")
    if "enforce_eager" in settings:
        words.append("eager" if settings["enforce_eager"] else "compiled")
    return f" ({', '.join(words)})" if words else ""


def peers_section(results: list[dict[str, Any]]) -> str:
    """Every committed peers result: what was measured, in one line, and its table."""
    parts = []
    for r in results:
        model, data = r["model"], r["data"]
        head = (
            f"`{r['name']}`: {model['parameters'] / 1e6:.1f}M parameters, {model['dtype']}, {r['threads']} threads, "
            f"{data['prompts']} prompts, {r['trials']} interleaved trials."
        )
        parts.append(f"{head}\n\n{peers_table(r)}")
    return "\n\n".join(parts)


def between(text: str, mark: str, body: str) -> str:
    """`text` with `body` between its marks `<!-- MARK: begin -->` and `end`; unchanged where it has none."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    if begin not in text:
        return text
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n{body}\n{end}{tail}"


def render() -> str:
    """The README with its tables made from the committed results."""
    loaded = {p.name: json.loads(p.read_text(encoding="utf-8")) for p in sorted(RESULTS.glob("*.json"))}
    text = README.read_text(encoding="utf-8")
    text = between(text, "results", table([r for name, r in loaded.items() if not name.startswith(OTHERS)]))
    return between(text, "peers", peers_section([r for name, r in loaded.items() if name.startswith("peers-")]))


def main() -> None:
    """Command line."""
    for name in sys.argv[1:]:
        run = Path(name)
        path = RESULTS / f"{run.name}.json"
        path.write_text(json.dumps(result_of(run), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(path.relative_to(ROOT))
    README.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
