"""Cached hidden states: the right ones, computed once, in a file that survives an interruption."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gorgon import interrupts
from gorgon.core.loss import IGNORE
from gorgon.errors import DataError, Interrupted
from gorgon.models.backbone import load_backbone
from gorgon.train.features import Text, cache_features, length_batches
from tests.train_support import ScriptedBackbone, tiny_llama


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return load_backbone(tiny_llama(tmp_path_factory.mktemp("llama")))


def some_texts(vocab: int, count: int = 9) -> list[Text]:
    generator = torch.Generator().manual_seed(1)
    texts = []
    for i in range(count):
        length, prompt = 6 + 5 * i % 23, 2 + i % 3
        texts.append(Text(torch.randint(2, vocab, (length,), generator=generator).tolist(), prompt))
    return texts


def check_states(backbone, texts, features, atol):
    row = 0
    for text in texts:
        alone_TH = backbone.hidden(torch.tensor([text.ids]).to(backbone.device))[0]
        for t in range(text.prompt_length - 1, len(text.ids) - 2):
            torch.testing.assert_close(features.hidden_NH[row], alone_TH[t].cpu(), atol=atol, rtol=atol)
            row += 1
    assert row == len(features)


def test_states_equal_those_of_each_text_alone(backbone, tmp_path):
    texts = some_texts(backbone.vocab_size)
    features = cache_features(backbone, texts, tmp_path, batch_tokens=64, title="t")
    check_states(backbone, texts, features, 1e-4)


def test_bfloat16_states_are_kept_as_bfloat16(tmp_path, tmp_path_factory):
    backbone = load_backbone(tiny_llama(tmp_path_factory.mktemp("llama")), dtype="bfloat16")
    texts = some_texts(backbone.vocab_size)
    features = cache_features(backbone, texts, tmp_path, batch_tokens=64, title="t")
    assert features.hidden_NH.dtype == torch.bfloat16
    assert (tmp_path / "hidden.bin").stat().st_size == 2 * features.hidden_NH.numel()
    check_states(backbone, texts, features, 0.1)


def test_labels_of_a_batch_are_the_tokens_two_and_more_places_on(tmp_path):
    backbone = ScriptedBackbone(tmp_path)
    texts = [Text([5, 6, 7, 8, 9, 10], 2), Text([11, 12], 1), Text([13, 14, 15], 1)]
    features = cache_features(backbone, texts, tmp_path / "f", batch_tokens=16, title="t")
    hidden_NH, labels_KN = features.batch(torch.tensor([3, 0, 2]), 3, torch.device("cpu"))
    assert hidden_NH.argmax(1).tolist() == [13, 6, 8], "positions: the prompt's last token to the third from the end"
    assert labels_KN.tolist() == [[15, 8, 10], [IGNORE, 9, IGNORE], [IGNORE, 10, IGNORE]]


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_no_text_is_read_twice_even_after_an_interruption(tmp_path, monkeypatch, stop_after):
    backbone = ScriptedBackbone(tmp_path)
    texts = some_texts(32)
    calls = iter(range(1000))
    monkeypatch.setattr(interrupts, "requested", lambda: next(calls) + 1 == stop_after)
    with pytest.raises(Interrupted):
        cache_features(backbone, texts, tmp_path / "f", batch_tokens=40, title="t")
    assert 0 < len(backbone.seen) < len(texts)
    monkeypatch.setattr(interrupts, "requested", lambda: False)
    features = cache_features(backbone, texts, tmp_path / "f", batch_tokens=40, title="t")
    cache_features(backbone, texts, tmp_path / "f", batch_tokens=40, title="t")
    assert set(backbone.seen.values()) == {1}
    assert len(backbone.seen) == len(texts)
    check_states(backbone, texts, features, 0)


def test_a_cache_of_another_model_is_not_reused(tmp_path):
    texts = some_texts(20)
    cache_features(ScriptedBackbone(tmp_path, vocab=32), texts, tmp_path / "f", batch_tokens=40, title="t")
    other = ScriptedBackbone(tmp_path, vocab=40)
    check_states(other, texts, cache_features(other, texts, tmp_path / "f", batch_tokens=40, title="t"), 0)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(16, 200))
def test_batches_hold_every_text_once_within_the_limit(lengths, limit):
    batches = length_batches(lengths, limit)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= limit


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not know") as caught:
        cache_features(ScriptedBackbone(tmp_path), [Text([3, 99], 1)], tmp_path / "f", batch_tokens=40, title="t")
    assert caught.value.value == 99


def test_answers_too_short_for_any_head_are_refused(tmp_path):
    with pytest.raises(DataError, match="no answer is long enough"):
        cache_features(ScriptedBackbone(tmp_path), [Text([3, 4, 5], 2)], tmp_path / "f", batch_tokens=40, title="t")
