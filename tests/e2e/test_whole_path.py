"""The whole path through the command line, on real weights: data to report, then generate and inspect."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gorgon.core.tree import DraftTree
from gorgon.data.chat import encode_prompt
from gorgon.data.examples import read_examples
from gorgon.decode.load import load_engine
from tests.e2e.conftest import gorgon

pytestmark = pytest.mark.xdist_group("trained")


def test_every_step_leaves_a_manifest_and_the_summary_has_its_numbers(trained):
    for step in ("prepare", "finetune", "distill", "train-heads", "tune", "compare"):
        manifest = json.loads((trained.out / step / "manifest.json").read_text())
        assert manifest["step"] == step and manifest["outputs"] and manifest["seconds"] > 0
    summary = json.loads((trained.out / "compare" / "summary.json").read_text())
    assert trained.document["summary"] == summary
    assert summary["exact_match"] == 1.0
    assert summary["speedup"]["vs_plain"] > 0 and summary["speedup"]["vs_transformers"] > 0
    for decoder in ("plain", "medusa", "transformers"):
        row = summary["latency_ms"][decoder]
        assert 0 < row["p50"] <= row["p90"] <= row["p99"] and row["mean"] > 0
    assert summary["tokens_per_step"] >= 1.0
    assert len(summary["heads"]["top1"]) == 3
    assert summary["tree"]["nodes"] >= 1


def test_the_report_stands_alone(trained):
    page = (trained.out / "compare" / "report.html").read_text()
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert "<script src" not in page and "<link" not in page


def test_heads_learn_the_models_own_words(trained):
    first, *_, last = json.loads((trained.out / "train-heads" / "heads.json").read_text())["evaluations"]
    assert last["accuracy"][0][0] > first["accuracy"][0][0] + 0.1


def test_a_second_run_reuses_everything(trained):
    done = gorgon("run", "quickstart", *trained.settings, "--out", trained.out, "--json")
    assert done.returncode == 0
    assert all(step["reused"] for step in json.loads(done.stdout)["steps"].values())


def test_every_tree_gives_the_text_of_transformers_generate(trained):
    engine = load_engine(trained.out / "tune", dtype="float32")
    model = engine.backbone.model
    examples = read_examples(trained.out / "prepare" / "test.jsonl")[:20]
    trees = [
        DraftTree(), DraftTree.chain(3), DraftTree.of([], ngram=6),
        DraftTree.of([(0,), (1,), (2,), (3,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (0, 1, 0)], ngram=4),
    ]  # fmt: skip
    engines = [engine, *(engine.with_tree(tree) for tree in trees)]
    accepted = 0
    for example in examples:
        prompt = encode_prompt(engine.backbone.tokenizer, example.messages)
        ids = torch.tensor([prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60)
        for sibling in engines:
            generation = sibling.answer(prompt, max_new_tokens=60)
            assert generation.token_ids == expected[0, len(prompt) :].tolist()
            accepted += sum(node > 0 for node in generation.step_nodes)
    assert accepted > 100, "drafts must be accepted, or this test shows nothing"


def test_generate_streams_the_same_text_with_and_without_drafts(trained):
    example = read_examples(trained.out / "prepare" / "test.jsonl")[0]
    system, user = (message["content"] for message in example.messages)
    arguments = ("generate", trained.out / "tune", user, "--system", system)
    fast, plain = gorgon(*arguments), gorgon(*arguments, "--plain")
    assert fast.returncode == plain.returncode == 0
    assert fast.stdout == plain.stdout and fast.stdout.strip()
    assert "tokens per step" in fast.stderr and "1.00 tokens per step" in plain.stderr


def test_generate_answers_files_and_stops(trained, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("How many farms are there?\n\nList the name of all authors.\n")
    done = gorgon("generate", trained.out / "tune", "--file", prompts, "--json", "--max-new-tokens", 20)
    answers = json.loads(done.stdout)
    assert len(answers) == 2 and all(0 < a["tokens"] <= 20 for a in answers)
    text = answers[0]["text"]
    stop = text[len(text) // 2 :][:2]
    done = gorgon("generate", trained.out / "tune", "How many farms are there?", "--json", "--stop", stop)
    (answer,) = json.loads(done.stdout)
    assert answer["text"] == text[: text.index(stop)] and answer["finish"] == "stop"
    done = gorgon("generate", trained.out / "tune", "-", "--max-new-tokens", 5, input="How many farms are there?")
    assert done.returncode == 0 and done.stdout.strip()


def test_inspect_shows_heads_and_tree(trained):
    facts = json.loads(gorgon("inspect", trained.out / "tune", "--json").stdout)
    assert facts["heads"]["count"] == 3 and facts["tree"]["drafters"][0]["nodes"] >= 1
    assert "heads" in gorgon("inspect", "embedded").stdout


def test_sigterm_leaves_a_checkpoint_that_the_same_command_resumes(trained, tmp_path):
    out = tmp_path / "heads"
    command = [
        str(Path(sys.executable).with_name("gorgon")), "train-heads", "--model", str(trained.out / "finetune"),
        "--data", str(trained.out / "distill"), "--out", str(out), "--heads", "2", "--epochs", "400",
    ]  # fmt: skip
    said = ""
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in process.stderr:
            said += line
            if line.startswith("step") or "resuming" in line:  # training has begun: the first evaluation is told
                break
        time.sleep(2)
        process.send_signal(signal.SIGTERM)
        said += process.communicate(timeout=120)[1]
        assert process.returncode == 143, said
        assert not out.exists() and any((tmp_path / "heads.partial" / "checkpoints").iterdir())
    assert "the same command resumes" in said and "resuming at step" in said and "Traceback" not in said
