"""Layers that read the same input, multiplied as one: how their weights lie, the joining of recorded products, and the
compiled layers that it is for, with torch's recorder in the place of a GPU's code generator."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from gorgon.decode.engine import PLAIN, Engine
from gorgon.models import backbone as backbone_module
from gorgon.models import gpu
from gorgon.models.siblings import SiblingLinear, join_siblings, lay_siblings_together
from tests.parity.support import TREES, Oracle, backbone_of, prompts

JOINED = {
    "llama": (21, 12), "gemma2": (21, 12), "qwen3": (21, 12), "qwen2": (21, 18), "phi3": (12, 12), "gpt-neox": (12, 12),
    "deepseek-v3": (26, 20),
}  # fmt: skip
"""Products of the layers before and behind joining: Qwen2's queries have biases, Phi-3's weights are one already."""


class Gated(nn.Module):
    """Two halves that read the same, one layer that reads something else, and one with a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = nn.Linear(6, 10, bias=False), nn.Linear(6, 8, bias=False)
        self.down, self.last = nn.Linear(18, 6, bias=False), nn.Linear(6, 6)

    def forward(self, x):
        return self.last(self.down(torch.cat((self.gate(x).relu(), self.up(x)), dim=-1)))


class Recording:
    """A backend that joins products, counts them before and behind, and runs the graph as it is then."""

    def __init__(self):
        self.counts = []

    def __call__(self, graph, _examples):
        before = self._count(graph)
        join_siblings(graph)
        self.counts.append((before, self._count(graph)))
        return graph.forward

    @staticmethod
    def _count(graph):
        return len(graph.graph.find_nodes(op="call_function", target=linear))

    def step_function(self, function, backbone, _mode):
        """In the place of `models.compiler.step_function`."""
        compiled = torch.compile(lambda *given: function(backbone, *given), backend=self, dynamic=True)
        return lambda *fixed: lambda *given: compiled(*given, *fixed)


def test_weights_that_lie_together_are_the_same_layers():
    model, x = Gated(), torch.randn(3, 6)
    expected, weights = model(x), [model.gate.weight.clone(), model.up.weight.clone()]
    lay_siblings_together(model)
    assert isinstance(model.gate, SiblingLinear) and model.gate.block is model.up.block
    assert torch.equal(model.gate.block, torch.cat(weights))
    assert type(model.down) is type(model.last) is nn.Linear, "other inputs, and a bias"
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("products", "left"),
    [
        (lambda x, y, w: (linear(x, w[0:3]), linear(x, w[3:8])), 1),
        (lambda x, y, w: (linear(x, w[0:3]), linear(x, w[3:5]), linear(x, w[5:8])), 1),
        (lambda x, y, w: (linear(x, w[0:3]), linear(y, w[3:8])), 2),  # another input
        (lambda x, y, w: (linear(x, w[0:3]), linear(x, w[4:8])), 2),  # a gap
        (lambda x, y, w: (linear(x, w[3:8]), linear(x, w[0:3])), 2),  # the wrong way round
        (lambda x, y, w: (linear(x, w[0:3]), linear(y, w[3:5]), linear(x, w[3:8])), 2),
        (lambda x, y, w: (linear(x, w[0:3], w[0, :3]), linear(x, w[3:8])), 2),  # a bias
        (lambda x, y, w: (linear(x, w), linear(x, w[0:3])), 2),  # no slice
    ],
)
def test_only_neighbours_with_the_same_input_are_joined(products, left):
    torch._dynamo.reset()
    given, recording = (torch.randn(2, 4), torch.randn(2, 4), torch.randn(8, 4)), Recording()
    found = torch.compile(products, backend=recording)(*given)
    for mine, right in zip(found, products(*given), strict=True):
        torch.testing.assert_close(mine, right)
    assert [behind for _, behind in recording.counts] == [left]


def test_what_is_written_in_place_stays():
    def routed(x, w):
        mask = torch.zeros_like(x)
        mask.scatter_(1, torch.tensor([[0], [1]]), 1.0)  # as DeepSeek's router does; nothing reads what it returns
        return linear(x, w[0:3]), linear(x, w[3:8]), mask

    torch._dynamo.reset()
    given, recording = (torch.randn(2, 4), torch.randn(8, 4)), Recording()
    found = torch.compile(routed, backend=recording)(*given)
    for mine, right in zip(found, routed(*given), strict=True):
        torch.testing.assert_close(mine, right)
    assert [behind for _, behind in recording.counts] == [1]


@pytest.mark.parametrize("family", JOINED)
def test_compiled_layers_write_the_same_answers(family, monkeypatch, capsys):
    torch._dynamo.reset()
    backbone, recording = backbone_of(family, own=True), Recording()
    expected = [Engine(backbone, None, PLAIN).answer(p, max_new_tokens=20).token_ids for p in prompts()]
    monkeypatch.setattr(backbone_module, "step_function", recording.step_function)
    backbone.steps = "compiled"
    gpu.compile_layers(backbone)
    engine = Engine(backbone, None, Oracle(TREES["bushy"], list(zip(prompts(), expected, strict=True))))
    monkeypatch.undo()
    assert backbone.layers is not None and backbone.steps == "compiled", capsys.readouterr().err
    found = [engine.answer(p, max_new_tokens=20) for p in prompts()]
    assert [g.token_ids for g in found] == expected and any(any(g.step_nodes) for g in found)
    assert recording.counts[0] == JOINED[family]


def other_results(_function, _backbone, _mode):
    return lambda: lambda tokens_BN, *_given: (torch.ones(*tokens_BN.shape, 32),)


def no_results(_function, _backbone, _mode):
    def fail(*_given):
        raise RuntimeError("the code generator failed\nand more")

    return lambda: fail


@pytest.mark.parametrize(
    ("instead", "why"), [(other_results, "gives other results"), (no_results, "generator failed\n")]
)
def test_layers_that_compile_wrongly_or_not_at_all_stay_as_they_are(instead, why, monkeypatch, capsys):
    backbone = backbone_of("llama", own=True)
    expected = Engine(backbone, None, PLAIN).answer(prompts()[2], max_new_tokens=12).token_ids
    monkeypatch.setattr(backbone_module, "step_function", instead)
    backbone.steps = "compiled"
    gpu.compile_layers(backbone)
    monkeypatch.undo()
    backbone._functions.clear()
    assert backbone.layers is None and backbone.steps == "captured"
    assert "cannot be compiled" in (said := capsys.readouterr().err) and why in said
    assert Engine(backbone, None, PLAIN).answer(prompts()[2], max_new_tokens=12).token_ids == expected
