"""Fine-tuning: what is learnt from, what is kept, resuming, merging, bad input."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional

from gorgon import interrupts
from gorgon.config import FinetuneConfig
from gorgon.data.chat import encode_prompt
from gorgon.data.examples import read_examples
from gorgon.errors import DataError, GorgonError, Interrupted, MissingDependencyError
from gorgon.models.backbone import load_backbone
from gorgon.train.features import encode_texts
from gorgon.train.finetune import build_trainer, data_order, finetune, latest_checkpoint
from gorgon.train.watch import answer_loss
from tests.train_support import sql_rows, tiny_project, write_rows


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return tiny_project(tmp_path_factory.mktemp("project"))


def settings(project, **changes):
    model, data = project
    values = {
        "model": str(model), "data": str(data), "learning_rate": 0.02, "epochs": 3.0, "eval_steps": 6,
        "lora_alpha": 32.0, "save_steps": 5,
    }  # fmt: skip
    return FinetuneConfig(**(values | changes))


@pytest.fixture(scope="module")
def finished(project, tmp_path_factory):
    out = tmp_path_factory.mktemp("finetune") / "out"
    return out, finetune(settings(project), out)


@pytest.mark.parametrize("pad_is_end", [False, True])
def test_labels_are_the_answer_and_its_end_token_and_nothing_of_the_prompt(project, tmp_path, pad_is_end):
    """Through the trainer's real collator. The usual set-up fails the second case: it ignores every end token."""
    backbone = load_backbone(project[0])
    end = backbone.tokenizer.eos_token_id
    if pad_is_end:
        backbone.tokenizer.pad_token = backbone.tokenizer.eos_token
    examples = read_examples(project[1] / "train.jsonl")
    texts, _ = encode_texts(backbone, examples)
    expected = set()
    for example in examples:  # an oracle that knows nothing of Text
        prompt = encode_prompt(backbone.tokenizer, example.messages)
        answer = [*backbone.tokenizer(example.answer, add_special_tokens=False)["input_ids"], end]
        expected.add((tuple(prompt), tuple(answer)))
    trainer = build_trainer(settings(project), backbone, texts, tmp_path)
    seen, padding = set(), 0
    for batch in trainer.get_train_dataloader():
        for ids_T, labels_T, mask_T in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            learnt_T = labels_T != -100
            assert torch.equal(ids_T[learnt_T], labels_T[learnt_T])
            assert labels_T[learnt_T][-1] == end
            first = int(learnt_T.nonzero()[0])
            length = int(mask_T.sum())
            assert learnt_T[first:length].all() and not learnt_T[length:].any()
            seen.add((tuple(ids_T[:first].tolist()), tuple(labels_T[learnt_T].tolist())))
            padding += len(ids_T) - length
    assert seen == expected
    assert padding < 0.1 * 3 * sum(len(text.ids) for text in texts), "rows of like length share a batch"


@given(st.lists(st.integers(1, 90), min_size=1, max_size=70), st.integers(1, 9), st.integers(1, 4))
def test_every_row_comes_once_per_epoch(lengths, batch_size, epochs):
    order = data_order(lengths, batch_size, float(epochs), 7)
    assert sorted(order) == sorted(list(range(len(lengths))) * epochs)
    assert order == data_order(lengths, batch_size, float(epochs), 7)
    assert len(data_order(lengths, batch_size, 0.5, 7)) == math.ceil(len(lengths) / 2)


def test_answer_loss_equals_a_loop_over_tokens(project):
    backbone = load_backbone(project[0])
    texts, _ = encode_texts(backbone, read_examples(project[1] / "validation.jsonl"))
    nats, count = 0.0, 0
    for text in texts:
        logits_TV = backbone.model(torch.tensor([text.ids])).logits[0]
        for t in range(text.prompt_length, len(text.ids)):
            nats -= float(functional.log_softmax(logits_TV[t - 1], -1)[text.ids[t]])
            count += 1
    assert answer_loss(backbone.model, texts, backbone.device) == pytest.approx(nats / count, rel=1e-4)


def test_the_model_learns_and_the_merged_weights_have_the_loss_that_is_reported(project, finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, result = finished
    metrics = result.manifest["metrics"]
    assert metrics["loss_after"] < 0.7 * metrics["loss_before"]
    assert metrics["loss_after"] == pytest.approx(metrics["best_loss"], rel=1e-3)
    assert metrics["best_loss"] == min(entry["loss"] for entry in metrics["evaluations"])
    assert metrics["evaluations"][0]["step"] == 0 and metrics["evaluations"][-1]["step"] == metrics["steps"] == 18
    model = AutoModelForCausalLM.from_pretrained(out)
    AutoTokenizer.from_pretrained(out)
    texts, _ = encode_texts(load_backbone(out), read_examples(project[1] / "validation.jsonl"))
    assert answer_loss(model, texts, torch.device("cpu")) == pytest.approx(metrics["loss_after"], rel=1e-3)
    assert not any("lora" in name for name in load_file(out / "model.safetensors"))


def test_the_output_is_a_plain_model_directory(finished):
    out, _ = finished
    names = {path.name for path in out.iterdir()}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tensorboard"}
    assert wanted | {"chat_template.jinja", "manifest.json"} <= names
    assert "checkpoints" not in names
    assert load_backbone(out).end_ids == {load_backbone(out).tokenizer.eos_token_id}


def test_a_learning_rate_that_ruins_the_model_gives_the_model_back(project, tmp_path):
    config = settings(project, learning_rate=30.0, max_steps=4, warmup_fraction=0.0, scheduler="constant")
    metrics = finetune(config, tmp_path / "out").manifest["metrics"]
    assert metrics["best_step"] == 0
    assert metrics["loss_after"] == pytest.approx(metrics["loss_before"], rel=1e-5)


def test_stopped_and_resumed_gives_the_weights_of_a_straight_run(project, finished, tmp_path, monkeypatch):
    straight, _ = finished
    calls = iter(range(1000))
    monkeypatch.setattr(interrupts, "requested", lambda: next(calls) + 1 == 8)
    with pytest.raises(Interrupted, match="stopped at step 8 of 18"):
        finetune(settings(project), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert latest_checkpoint(tmp_path / "out.partial" / "checkpoints" / "trainer").name == "checkpoint-8"
    monkeypatch.setattr(interrupts, "requested", lambda: False)
    result = finetune(settings(project), tmp_path / "out")
    assert [e["step"] for e in result.manifest["metrics"]["evaluations"]] == [0, 6, 12, 18]
    first, second = (load_file(folder / "model.safetensors") for folder in (straight, tmp_path / "out"))
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], atol=1e-5, rtol=1e-4)


def test_half_a_checkpoint_is_not_resumed_from(tmp_path):
    files = ("trainer_state.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
    for step, names in ((5, files), (10, files[1:]), (15, files)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in names:
            (folder / name).write_text(json.dumps({"global_step": step}) if step < 15 else "{")
    assert latest_checkpoint(tmp_path).name == "checkpoint-5"
    assert latest_checkpoint(tmp_path / "none") is None
    (tmp_path / "checkpoint-5" / "rng_state_0.pth").touch()
    assert latest_checkpoint(tmp_path, 2) is None, "the second process has not written its part"
    (tmp_path / "checkpoint-5" / "rng_state_1.pth").touch()
    assert latest_checkpoint(tmp_path, 2).name == "checkpoint-5"


def test_gradient_accumulation_and_schedules_run(project, tmp_path):
    config = settings(project, gradient_accumulation=2, batch_size=4, scheduler="constant_with_warmup", epochs=1.0,
                      gradient_checkpointing=True, eval_rows=3, eval_steps=50)  # fmt: skip
    metrics = finetune(config, tmp_path / "out").manifest["metrics"]
    assert metrics["steps"] == 6 and metrics["evaluated_rows"] == 3
    assert math.isfinite(metrics["loss_after"])


def test_nf4_without_cuda_is_refused_before_anything_is_loaded(project, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingDependencyError, match="CUDA") as caught:
        finetune(settings(project, quantization="nf4", model="no/such-model"), tmp_path / "out")
    assert caught.value.field == "finetune.quantization"
    assert list(tmp_path.iterdir()) == []


def test_bad_data_is_named_and_leaves_nothing_behind(project, tmp_path):
    with pytest.raises(GorgonError, match="no directory given for 'data'"):
        finetune(FinetuneConfig(), tmp_path / "out")
    write_rows(tmp_path / "data", "validation", sql_rows(1, 3))
    with pytest.raises(DataError, match=r"no train\.jsonl"):
        finetune(settings((project[0], tmp_path / "data")), tmp_path / "out")
    rows = sql_rows(1, 3)
    for row in rows:
        row["answer"] = "SELECT " * 300
    write_rows(tmp_path / "data", "train", rows)
    with pytest.raises(DataError, match="every train row is too long"):
        finetune(settings((project[0], tmp_path / "data")), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_long_rows_are_dropped_and_counted(project, tmp_path):
    rows = sql_rows(1, 9)
    rows[4]["answer"] = "SELECT " * 300
    write_rows(tmp_path / "data", "train", rows)
    write_rows(tmp_path / "data", "validation", sql_rows(2, 4))
    result = finetune(settings((project[0], tmp_path / "data"), max_steps=1), tmp_path / "out")
    assert result.manifest["metrics"]["train_dropped"] == 1
    assert any("longer than" in warning for warning in result.manifest["warnings"])
