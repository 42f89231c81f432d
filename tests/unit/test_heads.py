"""Heads: identity at the start, separate layers, packing."""

import pytest
import torch

from gorgon.core.heads import MedusaHeads, PackedHeads, read_heads
from gorgon.errors import ShapeError


def test_untrained_heads_repeat_the_backbones_output_layer():
    torch.manual_seed(0)
    lm_head, hidden = torch.randn(11, 6), torch.randn(3, 6)
    heads = MedusaHeads(4, 2, 6, 11)
    heads.start_from(lm_head)
    for k in range(4):
        torch.testing.assert_close(heads.head(k, hidden), hidden @ lm_head.T)


def test_layers_of_a_head_are_separate_modules():
    heads = MedusaHeads(2, 3, 4, 5)
    pointers = {p.data_ptr() for p in heads.parameters()}
    assert len(pointers) == len(list(heads.parameters())) == 2 * (3 * 2 + 1)


def test_published_tensor_names():
    assert set(MedusaHeads(2, 1, 4, 5).state_dict()) == {
        f"{k}.{name}" for k in (0, 1) for name in ("0.linear.weight", "0.linear.bias", "1.weight")
    }


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("count", [1, 3])
def test_packed_heads_equal_the_modules(layers, count):
    torch.manual_seed(1)
    heads = MedusaHeads(3, layers, 8, 13)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    heads.requires_grad_(False)
    for batch in (1, 3):
        hidden = torch.randn(batch, 8)
        torch.testing.assert_close(read_heads(hidden, PackedHeads.of(heads, count).layers), heads(hidden)[:count])


def test_wrong_sizes_are_refused():
    with pytest.raises(ShapeError, match="does not fit"):
        MedusaHeads(1, 1, 4, 5).start_from(torch.zeros(5, 3))
    with pytest.raises(ShapeError, match="at least 1"):
        MedusaHeads(0, 1, 4, 5)
    with pytest.raises(ShapeError, match="deeper"):
        PackedHeads.of(MedusaHeads(2, 1, 4, 5), 3)
