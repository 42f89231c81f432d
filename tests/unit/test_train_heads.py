"""Heads learn what they must: scripted continuations, the limit that theory sets, resuming, bad input."""

from __future__ import annotations

import json

import pytest
import torch

from gorgon import interrupts
from gorgon.config import TrainHeadsConfig
from gorgon.errors import DataError, GorgonError, Interrupted, ModelError
from gorgon.models.directory import load_heads
from gorgon.train import heads as heads_module
from gorgon.train.checkpoint import load_checkpoint, save_checkpoint
from gorgon.train.heads import batch_index, learning_rate, train_heads
from tests.train_support import (
    ScriptedBackbone,
    markov_rows,
    random_cycle,
    tiny_llama,
    tiny_project,
    write_rows,
)

VOCAB, HEADS = 32, 4
CYCLE = random_cycle(VOCAB)


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """A scripted backbone in place of a loaded one; its directory is a real, tiny model."""
    backbone = ScriptedBackbone(tiny_llama(tmp_path / "model"), VOCAB)
    monkeypatch.setattr(heads_module, "load_backbone", lambda *_, **__: backbone)
    return backbone


def settings(tmp_path, **changes):
    values = {
        "model": str(tmp_path / "model"), "data": str(tmp_path / "data"), "heads": HEADS, "epochs": 10.0,
        "learning_rate": 0.02, "batch_tokens": 256, "feature_batch_tokens": 512,
    }  # fmt: skip
    return TrainHeadsConfig(**(values | changes))


def write_markov(tmp_path, stay, train=300, validation=150):
    write_rows(tmp_path / "data", "train", markov_rows(1, train, CYCLE, stay))
    write_rows(tmp_path / "data", "validation", markov_rows(2, validation, CYCLE, stay))


def after(token: int, places: int) -> int:
    """The oracle: where the cycle is so many places on."""
    for _ in range(places):
        token = CYCLE[token]
    return token


def test_every_head_learns_a_known_cycle_the_last_one_too(tmp_path, scripted):
    write_markov(tmp_path, stay=1.0, train=150, validation=30)
    result = train_heads(settings(tmp_path), tmp_path / "out")
    heads = load_heads(tmp_path / "out", hidden_size=VOCAB, vocab_size=VOCAB)
    for token in range(2, VOCAB):
        guesses_K = heads(torch.eye(VOCAB)[token : token + 1])[:, 0].argmax(-1).tolist()
        assert guesses_K == [after(token, k + 2) for k in range(HEADS)], f"after token {token}"
    assert result.manifest["metrics"]["top1"] == [1.0] * HEADS
    assert scripted.seen.total() == 180, "the backbone read every text once, not once per epoch"


def test_accuracy_reaches_and_does_not_exceed_what_theory_allows(tmp_path, scripted):
    """With probability 1 - q a token is drawn uniformly from the S that occur, after which the chain is uniform.

    So the token m places on is the cycle's with probability q^m + (1 - q^m) / S, and any other with (1 - q^m) / S.
    """
    stay, symbols = 0.85, VOCAB - 2
    write_markov(tmp_path, stay, train=600, validation=400)
    train_heads(settings(tmp_path, epochs=6.0, learning_rate=0.01), tmp_path / "out")
    accuracy_KR = json.loads((tmp_path / "out" / "heads.json").read_text())["evaluations"][-1]["accuracy"]
    for k in range(HEADS):
        kept = stay ** (k + 2)
        for ranks in (1, 8):
            best = kept + ranks * (1 - kept) / symbols
            assert accuracy_KR[k][ranks - 1] == pytest.approx(best, abs=0.03), f"head {k}, best {ranks}"


def test_output_is_a_model_directory_with_evaluations_and_curves(tmp_path, scripted):
    write_markov(tmp_path, stay=0.9, train=60, validation=20)
    result = train_heads(settings(tmp_path, evaluations=3, epochs=3.0), tmp_path / "out")
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "medusa_lm_head.safetensors", "base-model", "heads.json", "tensorboard"} <= names
    assert "checkpoints" not in names
    looks = json.loads((out / "heads.json").read_text())["evaluations"]
    steps = [look["step"] for look in looks]
    assert steps[0] == 0 and len(steps) == 4 and steps[-1] == result.manifest["metrics"]["steps"]
    assert all(len(look["accuracy"]) == HEADS and len(look["accuracy"][0]) == 8 for look in looks)
    for look in looks:
        assert all(row == sorted(row) for row in look["accuracy"]), "top-2 is never below top-1"
    assert result.manifest["metrics"]["held_out_loss"] == min(look["loss"] for look in looks)
    assert train_heads(settings(tmp_path, evaluations=3, epochs=3.0), out).reused


def test_the_best_heads_are_kept_not_the_last(tmp_path, scripted):
    """A learning rate far too high ends worse than it began, so the heads of step 0 must come out."""
    write_markov(tmp_path, stay=0.5, train=30, validation=30)
    result = train_heads(settings(tmp_path, learning_rate=50.0, epochs=2.0, warmup_fraction=0.0), tmp_path / "out")
    assert result.manifest["metrics"]["best_step"] == 0
    heads = load_heads(tmp_path / "out", hidden_size=VOCAB, vocab_size=VOCAB)
    hidden_NH = torch.eye(VOCAB)
    for k in range(HEADS):
        torch.testing.assert_close(heads.head(k, hidden_NH), hidden_NH @ scripted.lm_head.weight.T)


@pytest.mark.parametrize("polls", [2, 9, 14])
def test_stopped_and_resumed_gives_the_heads_of_a_straight_run(tmp_path, scripted, monkeypatch, polls):
    write_markov(tmp_path, stay=0.9, train=60, validation=20)
    config = settings(tmp_path, epochs=4.0)
    train_heads(config, tmp_path / "straight")
    scripted.seen.clear()
    calls = iter(range(10_000))
    monkeypatch.setattr(interrupts, "requested", lambda: next(calls) + 1 == polls)
    with pytest.raises(Interrupted, match="stopped") as caught:
        train_heads(config, tmp_path / "resumed")
    assert caught.value.hint == "the same command resumes"
    assert not (tmp_path / "resumed").exists()
    monkeypatch.setattr(interrupts, "requested", lambda: False)
    train_heads(config, tmp_path / "resumed")
    assert scripted.seen.total() == 80, "no text was read again"
    straight, resumed = (
        load_heads(tmp_path / name, hidden_size=VOCAB, vocab_size=VOCAB).state_dict()
        for name in ("straight", "resumed")
    )
    for key, value in straight.items():
        assert torch.equal(value, resumed[key]), key
    first, second = (
        [(look["step"], look["loss"]) for look in json.loads((tmp_path / n / "heads.json").read_text())["evaluations"]]
        for n in ("straight", "resumed")
    )
    assert first == second


def test_a_real_backbone_from_end_to_end(tmp_path):
    model, data = tiny_project(tmp_path)
    config = TrainHeadsConfig(model=str(model), data=str(data), heads=2, layers=2, epochs=8.0, batch_tokens=64,
                              learning_rate=0.01)  # fmt: skip
    result = train_heads(config, tmp_path / "out")
    losses = [e["loss"] for e in json.loads((tmp_path / "out" / "heads.json").read_text())["evaluations"]]
    assert losses[-1] < losses[0] / 2
    assert result.manifest["metrics"]["train_positions"] > 48
    assert len(load_heads(tmp_path / "out", hidden_size=32, vocab_size=2048)) == 2


def test_long_texts_are_dropped_and_counted(tmp_path, scripted):
    write_markov(tmp_path, stay=1.0, train=20, validation=10)
    rows = markov_rows(5, 20, CYCLE, 1.0) + markov_rows(6, 3, CYCLE, 1.0, length=65)
    write_rows(tmp_path / "data", "train", rows)
    result = train_heads(settings(tmp_path, epochs=1.0), tmp_path / "out")
    assert result.manifest["metrics"]["train_dropped"] == 3
    assert "3 train rows are longer than the backbone's 64 tokens" in result.manifest["warnings"]


def test_every_row_occurs_once_per_epoch_whatever_the_batch_size():
    for size, count in ((7, 20), (20, 20), (3, 10)):
        stream = torch.cat([batch_index(5, step, size, count) for step in range(3 * count)]).tolist()
        epochs = [stream[i * count : (i + 1) * count] for i in range(3)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert epochs[0] != epochs[1]
    assert batch_index(5, 3, 7, 20).tolist() != batch_index(6, 3, 7, 20).tolist()


def test_learning_rate_rises_then_falls_to_zero():
    config = TrainHeadsConfig(learning_rate=1.0, warmup_fraction=0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0 and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3


def test_missing_data_is_named(tmp_path):
    with pytest.raises(GorgonError, match="no directory given for 'data'"):
        train_heads(TrainHeadsConfig(), tmp_path / "out")
    with pytest.raises(DataError, match=r"no train\.jsonl"):
        train_heads(TrainHeadsConfig(data=str(tmp_path)), tmp_path / "out")
    write_rows(tmp_path / "data", "train", markov_rows(1, 2, CYCLE, 1.0))
    with pytest.raises(DataError, match=r"no validation\.jsonl"):
        train_heads(TrainHeadsConfig(data=str(tmp_path / "data")), tmp_path / "out")


def test_unusable_data_leaves_nothing_behind(tmp_path, scripted):
    write_markov(tmp_path, stay=1.0, train=5, validation=5)
    write_rows(tmp_path / "data", "train", [])
    with pytest.raises(DataError):
        train_heads(settings(tmp_path), tmp_path / "out")
    write_rows(tmp_path / "data", "train", markov_rows(1, 3, CYCLE, 1.0, length=65))
    with pytest.raises(DataError, match="every train row is too long"):
        train_heads(settings(tmp_path), tmp_path / "out")
    rows = markov_rows(1, 3, CYCLE, 1.0)
    rows[1]["answer_ids"][2] = VOCAB
    write_rows(tmp_path / "data", "train", rows)
    with pytest.raises(DataError, match="does not know") as caught:
        train_heads(settings(tmp_path), tmp_path / "out")
    assert "distill" in str(caught.value.hint)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "model"]


def test_checkpoints_are_whole_or_absent(tmp_path):
    path = tmp_path / "c.pt"
    assert load_checkpoint(path) is None
    save_checkpoint(path, {"x": torch.arange(3), "step": 7, "list": [{"a": 1.5}]})
    state = load_checkpoint(path)
    assert state is not None and state["step"] == 7 and state["x"].tolist() == [0, 1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ModelError, match="cannot be read") as caught:
        load_checkpoint(path)
    assert "--force" in str(caught.value.hint)
