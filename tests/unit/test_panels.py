"""The kernel for products of a few rows: right for every shape, and the same bits for any number of rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gorgon.core.heads import MedusaHeads, PackedHeads, read_heads
from gorgon.models.direct import DirectCalls
from gorgon.models.kernels import DOORS, load_kernels
from gorgon.models.panels import PanelLinear, in_panels, panel_products
from gorgon.models.toolchain import cpp_compiler

pytestmark = pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler")


def layers(inputs: int, outputs: int, bias: bool) -> tuple[nn.Linear, PanelLinear]:
    torch.manual_seed(inputs + outputs)
    layer = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    return layer, PanelLinear(layer)


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

    direct = DirectCalls(function, {"cpp_wrapper": True, "aot_inductor.custom_ops_to_c_shims": DOORS}, every_guard)
    with torch.inference_mode():
        for rows in (5, 9, 5):
            x = torch.randn(rows, 48)
            torch.testing.assert_close(direct(x)[0], other(layer(x).relu()))
    assert len(direct._versions) == 1


def every_guard(guards):
    return [True] * len(guards)


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
        torch.ops.gorgon.panel_linear(x, own.panels, bias, outputs)


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
    alone = [torch.ops.gorgon.panel_linear(x[k], pack(weight[k]), bias[k], outputs) for k in range(count)]
    assert torch.equal(found, torch.stack(alone))
    torch.testing.assert_close(found, x @ weight.mT + bias[:, None], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("vocabulary", [None, torch.tensor([3, 5, 64])])
def test_heads_in_panels_say_the_same(vocabulary):
    torch.manual_seed(0)
    heads, hidden = MedusaHeads(4, 2, 48, 70).requires_grad_(False), torch.randn(3, 48)
    for parameter in heads.parameters():
        parameter.normal_()
    packed = PackedHeads.of(heads, 4, vocabulary)
    for count in (1, 3, 4):
        some = in_panels(packed).first(count)
        found = read_heads(hidden, some.layers, panel_products)
        torch.testing.assert_close(found, read_heads(hidden, packed.layers)[:count], rtol=1e-4, atol=1e-3)
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
