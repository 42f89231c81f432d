"""Plain decoding against tuned drafts: greedy and sampled, one sequence and several together.

    python benchmarks/decoding.py MODEL --rows sql_test.jsonl --name sql

Every setting is decoded both ways in every trial, in turn, and the tokens are compared before a speed is reported:
greedy and sampled answers (one seed, a stream per prompt) must be those of plain decoding.
Writes results/decoding-NAME.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from gorgon.artifacts import provenance, write_json
from gorgon.core.sampling import Sampling
from gorgon.data.chat import encode_prompt
from gorgon.decode.load import load_engine
from gorgon.progress import bar, say

ROOT = Path(__file__).resolve().parent.parent
TEMPERATURES = (0.0, 0.7)


def prompts_of(rows: Path, tokenizer: Any, count: int) -> list[list[int]]:
    """The first rows as chats: the schema is the system message, the question the user's."""
    lines = rows.read_text(encoding="utf-8").splitlines()[:count]
    read = [json.loads(line) for line in lines]
    return [
        encode_prompt(
            tokenizer,
            [{"role": "system", "content": r["context"]}, {"role": "user", "content": r["question"]}],
        )
        for r in read
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--together", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--max-new-tokens", type=int, default=128)
    options = parser.parse_args()
    engine = load_engine(options.model, dtype="float32", steps="auto")
    plain = engine.plain()
    prompts = prompts_of(options.rows, engine.backbone.tokenizer, options.prompts)
    settings = [(t, n) for t in TEMPERATURES for n in options.together]
    rates: dict[tuple[float, int], list[float]] = {s: [] for s in settings}
    speeds: dict[tuple[float, int], dict[str, list[float]]] = {s: {"plain": [], "tuned": []} for s in settings}
    same: dict[tuple[float, int], float] = dict.fromkeys(settings, 1.0)
    steps: dict[tuple[float, int], float] = {}
    with bar("decoding", (options.trials + 1) * len(settings) * 2) as progress:
        for trial in range(options.trials + 1):
            for temperature, together in settings:
                sampling = Sampling(temperature=temperature, seed=7 if temperature else None)
                seconds, answers = {}, {}
                pair = [("plain", plain), ("tuned", engine)]
                for name, one in pair if trial % 2 else pair[::-1]:
                    start = time.perf_counter()
                    made = one.generate(
                        prompts, max_new_tokens=options.max_new_tokens, together=together, sampling=sampling
                    )
                    seconds[name] = time.perf_counter() - start
                    answers[name] = [g.token_ids for g in made]
                    if name == "tuned":
                        emitted = sum(sum(g.step_tokens) for g in made)
                        steps[temperature, together] = emitted / sum(len(g.step_tokens) for g in made)
                    progress.advance()
                equal = sum(a == b for a, b in zip(answers["plain"], answers["tuned"], strict=True)) / len(prompts)
                same[temperature, together] = min(same[temperature, together], equal)
                if trial:
                    rates[temperature, together].append(seconds["plain"] / seconds["tuned"])
                    for name, spent in seconds.items():
                        speeds[temperature, together][name].append(sum(map(len, answers[name])) / spent)
    rows = [
        {
            "temperature": t, "together": n, "exact_match": round(same[t, n], 4),
            "tokens_per_step": round(steps[t, n], 4),
            "speedup": round(statistics.median(rates[t, n]), 3),
            "speedup_range": [round(min(rates[t, n]), 3), round(max(rates[t, n]), 3)],
            "tokens_per_s": {k: round(statistics.median(v), 1) for k, v in speeds[t, n].items()},
        }
        for t, n in settings
    ]  # fmt: skip
    for row in rows:
        where = f"temperature {row['temperature']}, {row['together']} together"
        say(f"{where}: {row['speedup']}x, {row['exact_match']} equal")
    result = {"name": f"decoding-{options.name}", "prompts": len(prompts), "trials": options.trials, "rows": rows,
              "steps": engine.backbone.steps, "threads": torch.get_num_threads(), **provenance()}  # fmt: skip
    write_json(ROOT / "benchmarks" / "results" / f"decoding-{options.name}.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
