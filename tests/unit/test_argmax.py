"""The kernel that takes a row's largest number says what torch says, among equals and where numbers are none."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon.models.kernels import load_kernels
from gorgon.models.toolchain import cpp_compiler

pytestmark = pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler")
NUMBERS = st.sampled_from([-1.5, 0.0, 2.0, 3.0, float("inf"), -float("inf"), float("nan")])


def first_max(x):
    load_kernels()
    return torch.ops.gorgon.first_max(x)


@settings(max_examples=200)
@given(st.integers(1, 70).flatmap(lambda size: st.lists(NUMBERS, min_size=size, max_size=size)))
def test_a_row_of_few_numbers_has_torchs_argmax(row):
    x = torch.tensor(row)
    literal = next((i for i, number in enumerate(row) if number != number), row.index(max(row)))
    assert first_max(x) == x.max(-1).indices == literal


@pytest.mark.parametrize("shape", [(1, 8, 2048), (3, 4, 2, 17), (5, 1), (2, 9, 40_000)])
def test_many_rows_are_each_as_alone(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first_max(x), x.max(-1).indices)
    assert torch.equal(first_max(x.transpose(0, 1)), x.transpose(0, 1).max(-1).indices)


@pytest.mark.parametrize("x", [torch.zeros(2, 0), torch.tensor(1.0), torch.zeros(3).double()])
def test_what_has_no_largest_number_is_refused(x):
    with pytest.raises(RuntimeError, match="x:"):
        first_max(x)
