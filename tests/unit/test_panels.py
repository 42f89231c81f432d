"""The kernel for products of a few rows: right for every shape, and the same bits for any number of rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gorgon.core.heads import MedusaHeads, PackedHeads, read_heads
from gorgon.models.direct import DirectCalls
from gorgon.models.kernels import DOORS, load_kernels
from gorgon.models.panels import PanelLinear, in_panels, join_products, panel_products, panels_size
from gorgon.models.toolchain import cpp_compiler

pytestmark = pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler")


def layers(inputs: int, outputs: int, bias: bool) -> tuple[nn.Linear, PanelLinear]:
    torch.manual_seed(inputs + outputs)
    layer = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    return layer, in_a_block(layer)[0]


def generated(function, improve=None):
    """The function as generated code that knows our kernels' doors."""
    options = {"cpp_wrapper": True, "aot_inductor.custom_ops_to_c_shims": DOORS}
    return DirectCalls(function, options, lambda guards: [True] * len(guards), improve)


def in_a_block(*alike, before=3):
    """The layers in a block of theirs, behind a gap."""
    sizes = [panels_size(layer.out_features, layer.in_features) for layer in alike]
    block, offsets = torch.empty(before + sum(sizes)), [before + sum(sizes[:i]) for i in range(len(sizes))]
    return [PanelLinear(layer, block, offset) for layer, offset in zip(alike, offsets, strict=True)]


@given(
    rows=st.integers(1, 150), inputs=st.integers(1, 600), outputs=st.integers(1, 100), bias=st.booleans(),
    leading=st.sampled_from([(), (1,), (2, 3)]),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_products_are_those_of_the_layer(rows, inputs, outputs, bias, leading):
    layer, own = layers(inputs, outputs, bias)
    x = torch.randn(*leading, rows, inputs)
    torch.testing.assert_close(own(x), layer(x), rtol=1e-4, atol=1e-4)


@given(rows=st.integers(1, 150), inputs=st.integers(1, 600), outputs=st.integers(1, 100), bias=st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_row_is_the_same_bits_in_any_company(rows, inputs, outputs, bias):
    _, own = layers(inputs, outputs, bias)
    x = torch.randn(rows, inputs)
    assert torch.equal(own(x), torch.cat([own(x[row : row + 1]) for row in range(rows)]))


def test_generated_code_calls_the_kernel_with_and_without_a_bias():
    (layer, own), (other, bare) = layers(48, 40, bias=True), layers(40, 33, bias=False)

    def function(*arguments):
        return (bare(own(arguments[0]).relu()),)

    direct = generated(function)
    with torch.inference_mode():
        for rows in (5, 9, 5):
            x = torch.randn(rows, 48)
            torch.testing.assert_close(direct(x)[0], other(layer(x).relu()))
    assert len(direct._versions) == 1


def test_rows_that_do_not_lie_in_order_are_copied():
    layer, own = layers(96, 40, bias=True)
    x = torch.randn(96, 7).t()
    assert not x.is_contiguous()
    torch.testing.assert_close(own(x), layer(x))
    assert own(x[:0]).shape == (0, 40)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_number_of_threads_changes_no_bit(count):
    _, own = layers(256, 700, bias=False)
    x, threads = torch.randn(9, 256), torch.get_num_threads()
    expected = own(x)
    torch.set_num_threads(count)
    try:
        assert torch.equal(own(x), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("x", "outputs", "bias"),
    [
        (torch.zeros(2, 5), 40, None),
        (torch.zeros(2, 0), 40, None),
        (torch.zeros(2, 97), 40, None),
        (torch.zeros(2, 96, dtype=torch.float64), 40, None),
        (torch.tensor(1.0), 40, None),
        (torch.zeros(2, 96), 400, None),
        (torch.zeros(2, 96), 40, torch.zeros(39)),
        (torch.zeros(*[1] * 8, 96), 40, None),
    ],
)
def test_what_does_not_fit_is_refused(x, outputs, bias):
    _, own = layers(96, 40, bias=False)
    with pytest.raises(RuntimeError):
        torch.ops.gorgon.panel_linear(x, own.block, own.offset, own.in_features, bias, outputs)


def test_a_weight_that_is_no_float32_matrix_is_refused():
    load_kernels()
    for weight in (torch.zeros(4), torch.zeros(4, 4, dtype=torch.bfloat16), torch.zeros(4, 8).t(), torch.zeros(0, 4)):
        with pytest.raises(RuntimeError):
            torch.ops.gorgon.pack_panels(weight)


@given(
    count=st.integers(1, 5), rows=st.integers(1, 20), inputs=st.integers(1, 300), outputs=st.integers(1, 100)
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_several_weights_at_once_are_each_as_alone(count, rows, inputs, outputs):
    load_kernels()
    torch.manual_seed(count + rows)
    weight, bias, x = torch.randn(count, outputs, inputs), torch.randn(count, outputs), torch.randn(count, rows, inputs)
    pack = torch.ops.gorgon.pack_panels
    found = panel_products(x, pack(weight), bias)
    alone = [torch.ops.gorgon.panel_linear(x[k], pack(weight[k]), 0, inputs, bias[k], outputs) for k in range(count)]
    assert torch.equal(found, torch.stack(alone))
    torch.testing.assert_close(found, x @ weight.mT + bias[:, None], rtol=1e-4, atol=1e-4)
    halves = torch.ops.gorgon.pair_halves(pack(weight).bfloat16())
    rounded = panel_products(x, pack(weight.bfloat16().float()), bias)
    assert torch.equal(panel_products(x, halves, bias), rounded), "half the bytes are the upper half of the whole"


@pytest.mark.parametrize("vocabulary", [None, torch.tensor([3, 5, 64])])
def test_heads_in_panels_say_the_same_with_half_their_bytes(vocabulary):
    torch.manual_seed(0)
    heads, hidden = MedusaHeads(4, 2, 48, 70).requires_grad_(False), torch.randn(3, 48)
    for parameter in heads.parameters():
        parameter.normal_()
    packed = PackedHeads.of(heads, 4, vocabulary)
    rounded = [(weight.bfloat16().float(), bias) for weight, bias in packed.layers]
    for count in (1, 3, 4):
        some = in_panels(packed).first(count)
        found = read_heads(hidden, some.layers, panel_products)
        torch.testing.assert_close(found, read_heads(hidden, rounded)[:count], rtol=1e-4, atol=1e-3)
        assert some.layers[0][0].data_ptr() == some.first(1).layers[0][0].data_ptr(), "weights are not copied"
    assert not packed.first(0).layers


@pytest.mark.parametrize(
    ("x", "bias"),
    [
        (torch.zeros(3, 2, 96), torch.zeros(2, 40)),
        (torch.zeros(2, 2, 95), torch.zeros(2, 40)),
        (torch.zeros(2, 96), torch.zeros(2, 40)),
        (torch.zeros(2, 2, 96), torch.zeros(2, 400)),
        (torch.zeros(2, 2, 96), torch.zeros(80)),
    ],
)
def test_several_weights_refuse_what_does_not_fit(x, bias):
    load_kernels()
    panels = torch.ops.gorgon.pack_panels(torch.zeros(2, 40, 96))
    with pytest.raises(RuntimeError):
        panel_products(x, panels, bias)


@pytest.mark.parametrize("panels", [torch.zeros(2, 3, 96, 32), torch.zeros(2, 3, 96, 7).bfloat16(), torch.zeros(64)])
def test_only_panels_in_bfloat16_are_paired(panels):
    load_kernels()
    with pytest.raises(RuntimeError, match="panels"):
        torch.ops.gorgon.pair_halves(panels)


@pytest.mark.parametrize(("offset", "outputs"), [(-1, 40), (4, 40), (0, 0), (1 << 40, 40)])
def test_a_place_outside_the_block_is_refused(offset, outputs):
    load_kernels()
    with pytest.raises(RuntimeError, match="block"):
        torch.ops.gorgon.panel_linear(torch.zeros(2, 8), torch.zeros(panels_size(40, 8) + 3), offset, 8, None, outputs)


class Gated(nn.Module):
    """Products that can be joined, and such that cannot: of other rows, with a bias, not side by side, not whole."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        shapes = [(64, 96), (64, 32), (64, 40), (64, 64), (64, 64), (64, 64), (96, 64)]
        biases = [False, False, False, False, True, False, False]
        self.alike = [nn.Linear(*s, bias=b).requires_grad_(False) for s, b in zip(shapes, biases, strict=True)]
        self.own = in_a_block(*self.alike)

    def sums(self, x, layers):
        a, b, c, d, e, f, g = layers
        wide = a(x)  # with b, and with c, which does not fill its panels
        rows = torch.cat((b(x), c(x)[..., :32]), dim=-1)
        return (wide.view(*x.shape[:-1], 3, 32).transpose(0, 1), d(x) * e(x), f(x).relu() + d(rows), g(wide))

    def forward(self, *arguments):
        return tuple(found.contiguous() for found in self.sums(arguments[0], self.own))


def test_products_side_by_side_are_joined_and_stay_the_same():
    module, counts = Gated(), []

    def improve(graph):
        target = torch.ops.gorgon.panel_linear
        before = len(graph.graph.find_nodes(op="call_function", target=target))
        join_products(graph)
        joined = graph.graph.find_nodes(op="call_function", target=target)
        counts.append((before, len(joined), max(n.args[-1] for n in joined)))

    def function(*arguments):
        return module(*arguments)

    direct = generated(function, improve)
    with torch.inference_mode():
        for rows in (5, 9):
            x = torch.randn(rows, 64)
            for one, own, layers in zip(direct(x), module(x), module.sums(x, module.alike), strict=True):
                torch.testing.assert_close(one, layers, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(one, own, rtol=1e-6, atol=1e-6)
    assert counts == [(8, 6, 96 + 32 + 40)]
