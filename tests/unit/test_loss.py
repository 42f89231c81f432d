"""Labels and losses of the heads against literal loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon.core.heads import MedusaHeads
from gorgon.core.loss import (
    IGNORE,
    RANKS,
    backward_heads,
    head_labels,
    head_loss,
    head_statistics,
    label_ranks,
    loss_weights,
)
from gorgon.errors import ShapeError


def random_heads(heads: int = 3, hidden: int = 6, vocab: int = 11, layers: int = 2) -> MedusaHeads:
    torch.manual_seed(0)
    model = MedusaHeads(heads, layers, hidden, vocab)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7), min_size=1, max_size=4), st.integers(1, 5))
def test_labels_equal_a_loop_over_texts(texts: list[list[int]], heads: int) -> None:
    expected: list[list[int]] = [[] for _ in range(heads)]
    flat: list[int] = []
    positions, ends = [], []
    for text in texts:
        for t in range(len(text)):
            positions.append(len(flat) + t)
            ends.append(len(flat) + len(text))
            for k in range(heads):
                expected[k].append(text[t + k + 2] if t + k + 2 < len(text) else IGNORE)
        flat += text
    labels_KN = head_labels(torch.tensor(flat, dtype=torch.int32), torch.tensor(positions), torch.tensor(ends), heads)
    assert labels_KN.tolist() == expected
    assert labels_KN.dtype == torch.int64


def test_parts_of_a_batch_add_up_to_its_gradient_and_losses() -> None:
    """As several processes compute them: unequal parts, a part without a label for some head, and an empty one."""
    torch.manual_seed(1)
    hidden_NH, labels_KN = torch.randn(7, 6), torch.randint(0, 11, (3, 7))
    labels_KN[1, :5], labels_KN[2, 4:] = IGNORE, IGNORE
    whole, shared = random_heads(), random_heads()
    wanted_K = backward_heads(whole, hidden_NH, labels_KN, 0.7)
    counts_K = (labels_KN != IGNORE).sum(1)
    found_K, finished = torch.zeros(3), []
    for part in (slice(0, 4), slice(4, 7), slice(7, 7)):
        found_K += backward_heads(shared, hidden_NH[part], labels_KN[:, part], 0.7, counts_K, finished.append)
    assert finished == [0, 1, 2] * 3
    torch.testing.assert_close(found_K, wanted_K)
    for one, other in zip(whole.parameters(), shared.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad)


def test_gradient_and_losses_equal_an_element_wise_loop() -> None:
    heads, decay = random_heads(), 0.7
    hidden_NH = torch.randn(5, 6)
    labels_KN = torch.tensor([[1, 2, 3, 4, IGNORE], [2, 3, 4, IGNORE, IGNORE], [IGNORE] * 5])
    total = torch.zeros(())
    losses = []
    for k in range(3):
        terms = []
        for n in range(5):
            label = int(labels_KN[k, n])
            if label == IGNORE:
                continue
            logits_V = heads(hidden_NH)[k, n]
            terms.append(logits_V.exp().sum().log() - logits_V[label])
        mean = sum(terms) / len(terms) if terms else torch.zeros(())
        losses.append(float(mean.detach()))
        total = total + decay**k * mean
    expected = torch.autograd.grad(total, list(heads.parameters()), allow_unused=True)
    got_K = backward_heads(heads, hidden_NH, labels_KN, decay)
    assert got_K.tolist() == pytest.approx(losses, abs=1e-6)
    assert got_K[2] == 0, "a head without a label contributes nothing, not NaN"
    for parameter, gradient in zip(heads.parameters(), expected, strict=True):
        wanted = torch.zeros_like(parameter) if gradient is None else gradient
        torch.testing.assert_close(parameter.grad, wanted, atol=1e-6, rtol=1e-5)


def test_weights_are_powers_of_the_decay() -> None:
    assert loss_weights(4, 0.5) == [1, 0.5, 0.25, 0.125]
    assert loss_weights(3, 1.0) == [1, 1, 1]


def test_loss_of_uniform_logits_is_log_vocabulary() -> None:
    assert float(head_loss(torch.zeros(4, 50), torch.tensor([1, 2, IGNORE, 3]))) == pytest.approx(math.log(50))


def test_statistics_equal_sorting_by_hand() -> None:
    heads = random_heads(vocab=20)
    hidden_NH = torch.randn(40, 6)
    labels_KN = torch.randint(0, 20, (3, 40))
    labels_KN[1, ::3] = IGNORE
    loss_K, hits_KR, count_K = head_statistics(heads, hidden_NH, labels_KN)
    logits_KNV = heads(hidden_NH)
    for k in range(3):
        hits, nats, count = [0] * RANKS, 0.0, 0
        for n in range(40):
            label = int(labels_KN[k, n])
            if label == IGNORE:
                continue
            count += 1
            nats -= float(logits_KNV[k, n].log_softmax(-1)[label])
            order = sorted(range(20), key=lambda v: (-float(logits_KNV[k, n, v]), v))
            for r in range(RANKS):
                hits[r] += label in order[: r + 1]
        assert hits_KR[k].tolist() == hits
        assert count_K[k] == count
        assert float(loss_K[k]) == pytest.approx(nats, rel=1e-5)


def test_equal_logits_rank_by_token_id_as_argmax_does() -> None:
    logits_NV = torch.zeros(3, 4)
    assert label_ranks(logits_NV, torch.tensor([0, 2, 3])).tolist() == [0, 2, 3]
    assert int(logits_NV[0].argmax()) == 0


def test_wrong_shapes_are_refused() -> None:
    heads = random_heads()
    with pytest.raises(ShapeError, match="labels do not fit"):
        backward_heads(heads, torch.randn(5, 6), torch.zeros(2, 5, dtype=torch.int64), 0.8)
    with pytest.raises(ShapeError, match="labels do not fit"):
        head_statistics(heads, torch.randn(5, 6), torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(ShapeError, match="end of its text"):
        head_labels(torch.arange(5), torch.arange(3), torch.arange(2), 2)
