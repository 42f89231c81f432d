"""A prompt that is read for its last row alone: the row and the cache are what they were, in every family."""

import pytest
import torch
from torch import nn

from gorgon.models.cache import TreeCache
from gorgon.models.toolchain import cpp_compiler
from tests.parity.support import FAMILIES, backbone_of, prompts

WHOLE = {"falcon", "gpt2", "opt"}
"""Families whose feed-forward parts have other names, or none of their own."""


def read(backbone, prompt):
    layers = int(backbone.text_config.num_hidden_layers)
    cache = TreeCache(layers, 1, len(prompt))
    with torch.inference_mode():
        hidden_1TH = backbone.forward_prompt(cache, torch.tensor([prompt]), torch.tensor([0]), len(prompt))
    return hidden_1TH[0], [*cache.keys, *cache.values]


@pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_row_and_the_cache_are_the_same(family):
    backbone, prompt = backbone_of(family, own=True), prompts((30,))[0]
    backbone.run_steps("eager")
    whole_TH, rows = read(backbone, prompt)
    with backbone.last_row.wanted():
        short_TH, same = read(backbone, prompt)
    assert torch.allclose(short_TH[-1], whole_TH[-1], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(rows, same, strict=True))
    assert torch.equal(short_TH, whole_TH) == (family in WHOLE), "less is computed, or this test shows nothing"
    assert torch.equal(read(backbone, prompt)[0], whole_TH), "otherwise all rows are there"


def test_a_layer_that_needs_all_rows_is_left_alone():
    backbone, prompt = backbone_of("llama", own=True), prompts((9,))[0]

    class Shifted(nn.Module):
        """Reads the row before each row."""

        def __init__(self, part):
            super().__init__()
            self.part = part

        def forward(self, x):
            return self.part(x.roll(1, dims=1))

    layer = backbone.decoder.layers[-1]
    layer.mlp = Shifted(layer.mlp)
    backbone.run_steps("eager")
    whole_TH, _ = read(backbone, prompt)
    with backbone.last_row.wanted():
        assert torch.equal(read(backbone, prompt)[0], whole_TH)
