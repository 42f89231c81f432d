"""The peers benchmark: workers that stop while others run, prompts as `prepare` makes them, and the README's table."""

# ruff: noqa: E402 - the benchmarks are scripts beside the package, found by their folder
import argparse
import json
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import limits
import peers
import pipe
import record
import step_profile

from gorgon.config import PrepareConfig
from gorgon.core.draft import Draft
from gorgon.core.tree import DraftTree
from gorgon.data.chat import encode_prompt
from gorgon.data.examples import read_examples
from gorgon.data.prepare import prepare
from gorgon.decode.inputs import Inputs
from gorgon.decode.step import Stepper
from gorgon.errors import GorgonError
from gorgon.models.backbone import load_tokenizer
from gorgon.models.cache import TreeCache
from gorgon.models.graphs import Graphs
from tests.parity.support import Recorder

ECHO = """
import sys, threading, time
sys.path.insert(0, {folder!r})
import pipe
out = pipe.take_stdout()
print("noise on stdout")
spins = [0]
def spin():
    while True:
        spins[0] += 1
        time.sleep(0.001)
threading.Thread(target=spin, daemon=True).start()
def answer(request):
    if request.get("fail"):
        raise ValueError("no such luck")
    return {{"echo": request, "spins": spins[0]}}
pipe.serve(out, answer, {{"version": 1}})
"""


@pytest.fixture
def worker():
    made = pipe.Worker("echo", [sys.executable, "-c", ECHO.format(folder=str(ROOT / "benchmarks"))], {})
    yield made
    made.close()


def test_a_worker_answers_and_stands_still_in_between(worker):
    assert worker.facts == {"version": 1}
    first = worker.ask({"a": [1, 2]})
    assert first["echo"] == {"a": [1, 2]}
    time.sleep(0.3)  # its thread would count to hundreds
    assert worker.ask({})["spins"] - first["spins"] < 50
    assert worker.peak_bytes() > 1 << 20


def test_a_worker_that_ends_says_why(worker):
    with pytest.raises(pipe.WorkerError, match="no such luck"):
        worker.ask({"fail": True})
    with pytest.raises(pipe.WorkerError, match="echo ended early"):
        pipe.Worker("echo", [sys.executable, "-c", "raise SystemExit('missing package')"], {})
    with pytest.raises(pipe.WorkerError, match="cannot be started: No such file"):
        pipe.Worker("echo", ["/nowhere/python"], {})


def test_reasons_name_no_directory_of_this_machine():
    error = pipe.WorkerError("vllm ended early:\n  Traceback\n  OSError: cannot open /srv/x9/vllm/config.json")
    assert peers.reason(error) == "OSError: cannot open config.json"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--trials", "0"], "above 0"),
        (["--prompts", "-1"], "above 0"),
        (["--only", "plain,tgi"], "unknown contestant 'tgi'"),
    ],
)
def test_options_that_make_no_sense(monkeypatch, capsys, arguments, word):
    monkeypatch.setattr(sys, "argv", ["peers.py", "model", "--rows", "r", "--name", "n", *arguments])
    with pytest.raises(SystemExit) as stop:
        peers.main()
    assert stop.value.code == 2 and word in capsys.readouterr().err


def test_a_model_that_is_not_there(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["peers.py", str(tmp_path), "--rows", "r", "--name", "n"])
    with pytest.raises(SystemExit) as stop:
        peers.main()
    assert stop.value.code == 2 and "config.json is missing" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def _options(path, **changes):
    return argparse.Namespace(**{"rows": path, "max_new_tokens": 16, "prompts": None, "seed": 0, **changes})


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    made = [{"question": f"How many {n}?", "context": f"CREATE TABLE t{n} (a INTEGER)", "answer": "SELECT 1"}
            for n in range(12)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in [*made, made[0]]))
    return path


def test_prompts_are_those_of_prepare(tmp_path, rows):
    tokenizer, scratch = load_tokenizer("embedded"), tmp_path / "scratch"
    scratch.mkdir()
    made = peers.read_prompts(_options(rows), tokenizer, 1024, scratch)
    train = tmp_path / "train.jsonl"
    train.write_text(json.dumps({"question": "q", "context": "c", "answer": "a"}) + "\n" + json.dumps(
        {"question": "q2", "context": "c2", "answer": "a"}) + "\n")  # fmt: skip
    config = PrepareConfig(train=str(train), test=str(rows), validation_fraction=0.5)
    examples = read_examples(prepare(config, tmp_path / "out", tokenizer=tokenizer).directory / "test.jsonl")
    assert {p.id: p.token_ids for p in made} == {e.id: encode_prompt(tokenizer, e.messages) for e in examples}
    few = peers.read_prompts(_options(rows, prompts=5), tokenizer, 1024, scratch)
    assert len(few) == 5 and few == peers.read_prompts(_options(rows, prompts=5), tokenizer, 1024, scratch)
    with pytest.raises(GorgonError, match="no row fits"):
        peers.read_prompts(_options(rows), tokenizer, 20, scratch)


def test_settings_are_shown_without_paths():
    chain = {"method": "medusa", "model": "/secret/heads", "num_speculative_tokens": 3}
    settings = {"kind": "vllm", "enforce_eager": False, "model": "/secret", "speculative": chain}
    shown = peers.public(settings)
    assert shown == {"speculative": {"method": "medusa", "num_speculative_tokens": 3}, "enforce_eager": False}
    assert record.settings_text(shown) == " (3 tokens, compiled)"


def test_the_table():
    entry = {"label": "vLLM", "exact_match": 1.0, "tokens_per_step": None, "tokens_per_s": 210.4, "peak_mb": 900,
             "latency_ms": {"mean": 1, "p50": 2, "p90": 3}, "time_over_ours": 3.456, "time_over_ours_range": [3, 4],
             "settings": {}}  # fmt: skip
    result = {"contestants": {"vllm": entry}, "model": {"parameters": 4.3e6, "dtype": "float32"}, "name": "sql",
              "data": {"prompts": 100}, "threads": 2, "trials": 5}  # fmt: skip
    text = record.peers_section([result])
    assert "| vLLM | 1.000 | - | 1.0, 2.0, 3.0 | 210 | 900 MiB | **3.46x** (3.00 to 4.00) |" in text
    assert record.between("a\n<!-- x: begin -->old<!-- x: end -->b", "x", "new").endswith(
        "begin -->\nnew\n<!-- x: end -->b"
    )
    assert record.between("nothing marked", "x", "new") == "nothing marked"


@pytest.mark.parametrize("nodes", limits.NODES)
def test_trees_of_the_limits_benchmark(nodes):
    tree = limits.tree_of(nodes)
    assert tree.nodes == nodes and tree.heads <= limits.LONGEST
    assert nodes != 4 or tree == DraftTree.of([(0,), (1,), (0, 0)])


@pytest.mark.parametrize("captured", [False, True])
def test_a_step_of_the_limits_benchmark_with_and_without_graphs(captured):
    backbone, recorder = limits.random_backbone("4M"), Recorder()
    backbone.graphs = Graphs(recorder) if captured else None
    step = limits.step_of(backbone, 8)
    step()
    step()
    assert recorder.captured == (2 if captured else 0), "the prompt and the step"


@pytest.mark.parametrize("captured", [False, True])
def test_the_parts_of_a_step_with_and_without_graphs(captured, monkeypatch):
    monkeypatch.setattr(step_profile, "STEPS", 12)
    backbone, recorder = limits.random_backbone("4M"), Recorder()
    backbone.graphs = Graphs(recorder) if captured else None
    stepper, cache = Stepper(backbone, None, 0, None), TreeCache(4, 1, 64)
    stepper.prompt(cache, [5, 6, 7], 0)
    batch = Inputs(backbone.device).drafts([Draft(7)], 4)
    parts = step_profile._parts(stepper, stepper, cache, batch, torch.tensor([3]), 7)
    assert parts[0] > 0 and len(parts) == 3 and recorder.captured == (1 + 3 if captured else 0)
