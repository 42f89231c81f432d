"""The script that made the embedded backbone, and what it left in the package."""

import contextlib
import importlib.util
import json
import random
import sqlite3
from importlib import resources
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gorgon.data.chat import encode_prompt
from gorgon.data.sample import generate_rows

EMBEDDED = Path(str(resources.files("gorgon.models") / "embedded"))
SCRIPT = Path(__file__).parents[2] / "tools" / "build_backbone.py"


@pytest.fixture(scope="module")
def tool():
    specification = importlib.util.spec_from_file_location("build_backbone", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(str(EMBEDDED), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(EMBEDDED))


def test_prompts_are_those_of_the_chat_template(tool, tokenizer):
    for row in generate_rows(1, 20):
        chat = [{"role": "system", "content": row["context"]}, {"role": "user", "content": row["question"]}]
        assert tokenizer.encode(tool.prompt_text(row), add_special_tokens=False) == encode_prompt(tokenizer, chat)


def test_weights_fall_on_the_answer(tool, tokenizer):
    row = generate_rows(1, 1)[0]
    ((ids, weights),) = tool.batches([row], tokenizer, 0.25, 1, random.Random(0))[0]
    answered = [token for token, weight in zip(ids, weights, strict=True) if weight == 1.0]
    assert tokenizer.decode(answered) == row["answer"] + "<|end|>"
    assert set(weights) == {0.25, 1.0}


def test_loss_equals_the_plain_one(tool, tokenizer, model):
    rows = generate_rows(2, 3)
    batch = tool.batches(rows, tokenizer, 0.0, 10_000, random.Random(0))
    assert batch == []  # an unfilled batch is left for the next epoch
    batch = tool.batches(rows[:1], tokenizer, 0.0, 1, random.Random(0))[0]
    ids, weights = torch.tensor([batch[0][0]]), batch[0][1]
    labels = ids.clone()
    labels[0, : weights.count(0.0)] = -100
    with torch.no_grad():
        expected = model(input_ids=ids, labels=labels).loss
        assert torch.allclose(tool.weighted_loss(model, batch), expected, atol=1e-5)


def test_swapped_values_stay_in_question_and_answer(tool):
    row = {
        "question": "Who is in Oslo?",
        "context": "CREATE TABLE a (b TEXT)",
        "answer": 'SELECT b FROM a WHERE b = "oslo"',
    }
    swapped = [tool.swap_value(row, ["Lima"], random.Random(seed)) for seed in range(20)]
    assert {r["question"] for r in swapped} == {"Who is in Oslo?", "Who is in Lima?"}
    for r in swapped:
        assert ("Lima" in r["question"]) == ('"lima"' in r["answer"])
    same = row | {"answer": "SELECT 1"}
    assert tool.swap_value(same, ["Lima"], random.Random(0)) == same


def test_the_package_holds_a_small_whole_model(model, tokenizer):
    assert (EMBEDDED / "model.safetensors").stat().st_size < 20e6
    assert sum(p.numel() for p in model.parameters()) == 4_262_144
    assert model.dtype == torch.float32
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert model.config.vocab_size == len(tokenizer)
    assert json.loads((EMBEDDED / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id
    assert "CC-BY-4.0" in (EMBEDDED / "README.md").read_text()


def test_the_model_writes_sql(tool, model, tokenizer):
    rows = generate_rows(tool.HELD_OUT_SEED, 8, ["hospital", "library"])
    assert tool.exact_match(model, tokenizer, rows) >= 0.5


def test_made_up_domains_share_no_name_with_the_sample(tool):
    rows = tool.made_up_rows(1, 60, ["alpha", "beta_gamma", "delta"])
    assert rows == tool.made_up_rows(1, 60, ["alpha", "beta_gamma", "delta"])
    ran = 0
    for row in rows:
        with contextlib.closing(sqlite3.connect(":memory:")) as database, contextlib.suppress(sqlite3.Error):
            database.executescript(row["context"])
            database.execute(row["answer"])
            ran += 1
    assert ran >= 57  # a made-up name may be a word of SQL
    assert tool.name_pool([{"context": "CREATE TABLE a (birth_year INTEGER, x_9 VARCHAR, Name VARCHAR)"}]) == [
        "birth_year"
    ]
