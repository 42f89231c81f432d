"""Generated code that is called directly: only where torch says that it holds, and with the same results."""

import pytest
import torch

from gorgon.models import direct as direct_module
from gorgon.models.compiler import _own_code
from gorgon.models.direct import DirectCalls
from gorgon.models.toolchain import cpp_compiler

pytestmark = pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler")
OPTIONS = {"cpp_wrapper": True}


def every(guards):
    return [True] * len(guards)


WEIGHT = torch.arange(12.0).view(3, 4)
PAIR = (torch.ones(2), torch.full((2,), 2.0))


def counted_product():
    """A function, of code of its own, with two results; rows of a buffer are counted up in place."""
    weight = WEIGHT

    def function(*arguments):
        x_NI, rows, buffer_M, pair = arguments
        buffer_M[:rows] += 1
        return x_NI @ weight * rows, pair[0] + pair[1]

    return _own_code(function)


def test_generated_code_is_called_where_it_holds():
    def expected(x_NI, rows):
        return x_NI @ WEIGHT * rows, torch.tensor([3.0, 3.0])

    direct, asked = DirectCalls(counted_product(), OPTIONS, every), []
    compiled = direct._compiled
    direct._compiled = lambda *arguments: (asked.append(len(arguments[0])), compiled(*arguments))[1]
    with torch.inference_mode():
        for turn in range(2):
            for rows in (5, 7, 1, 6):
                x_NI, buffer_M = torch.randn(rows, 3), torch.zeros(9)
                found = direct(x_NI, rows, buffer_M, PAIR)
                assert isinstance(found, tuple)
                for one, other in zip(found, expected(x_NI, rows), strict=True):
                    torch.testing.assert_close(one, other)
                assert buffer_M.tolist() == [1.0] * rows + [0.0] * (9 - rows)
            if not turn:
                assert asked == [5, 1]  # one row and several are two versions
    assert asked == [5, 1], "both versions are known"
    with torch.inference_mode(), pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="reduction dim"):
        direct(torch.randn(5, 2), 5, torch.zeros(9), PAIR)  # torch is asked, and refuses


def returns_an_argument(*arguments):
    return arguments[0], arguments[0] + 1


def returns_the_same_twice(*arguments):
    result = arguments[0] + 1
    return result, result


def in_two_pieces(*arguments):
    result = arguments[0] + 1
    torch._dynamo.graph_break()
    return result, result * arguments[1]


@pytest.mark.parametrize("function", [returns_an_argument, returns_the_same_twice, in_two_pieces])
def test_what_is_no_single_piece_is_left_to_torch(function):
    direct = DirectCalls(function, OPTIONS, every)
    with torch.inference_mode():
        for size in (4, 5):
            x = torch.randn(size)
            for one, other in zip(direct(x, 3), function(x, 3), strict=True):
                torch.testing.assert_close(one, other)
    assert not direct._versions


def test_bound_calls_ask_torch_once_for_every_shape():
    buffer_M = torch.zeros(9)
    direct, asked = DirectCalls(counted_product(), OPTIONS, every), []
    bound, version = direct.bind(buffer_M, PAIR), direct.version
    direct.version = lambda known: (asked.append(len(known["arguments"][0])), version(known))[1]
    with torch.inference_mode():
        for turn in range(3):
            for rows in (5, 7, 1):
                buffer_M.zero_()
                x_NI = torch.randn(rows, 3)
                product, total = bound(x_NI, rows)
                torch.testing.assert_close(product, x_NI @ WEIGHT * rows)
                assert total.tolist() == [3.0, 3.0] and buffer_M.tolist() == [1.0] * rows + [0.0] * (9 - rows)
            if turn == 1:
                asked.clear()
        assert not asked, "all shapes are known"
        x_NI = torch.randn(3, 5).t()
        torch.testing.assert_close(bound(x_NI, 5)[0], x_NI @ WEIGHT * 5)
        assert asked, "other strides are another shape"
        with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="reduction dim"):
            bound(torch.randn(5, 2), 5)
        other_M = torch.zeros(9)
        torch.testing.assert_close(direct.bind(other_M, PAIR)(x_NI, 5)[0], x_NI @ WEIGHT * 5)
        assert other_M.tolist() == [1.0] * 5 + [0.0] * 4, "other fixed arguments are other inputs"


def test_many_shapes_are_forgotten(monkeypatch):
    monkeypatch.setattr(direct_module, "MOST_SHAPES", 2)
    bound = DirectCalls(lambda *arguments: (arguments[0] + 1,), OPTIONS, every).bind()
    with torch.inference_mode():
        for size in (2, 3, 4, 5, 2, 3):
            for _ in range(2):
                assert bound(torch.zeros(size))[0].tolist() == [1.0] * size
    assert len(bound._ready) <= 2
