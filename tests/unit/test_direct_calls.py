"""Generated code that is called directly: only where torch says that it holds, and with the same results."""

import pytest
import torch

from gorgon.models.direct import DirectCalls
from gorgon.models.toolchain import cpp_compiler

pytestmark = pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler")
OPTIONS = {"cpp_wrapper": True}


def every(guards):
    return [True] * len(guards)


def test_generated_code_is_called_where_it_holds():
    weight = torch.arange(12.0).view(3, 4)

    def function(*arguments):
        x_NI, buffer_M, rows, pair = arguments
        buffer_M[:rows] += 1
        return x_NI @ weight * rows, pair[0] + pair[1]

    def expected(x_NI, rows):
        return x_NI @ weight * rows, torch.tensor([3.0, 3.0])

    pair = (torch.ones(2), torch.full((2,), 2.0))
    direct, asked = DirectCalls(function, OPTIONS, every), []
    compiled = direct._compiled
    direct._compiled = lambda *arguments: (asked.append(len(arguments[0])), compiled(*arguments))[1]
    with torch.inference_mode():
        for turn in range(2):
            for rows in (5, 7, 1, 6):
                x_NI, buffer_M = torch.randn(rows, 3), torch.zeros(9)
                found = direct(x_NI, buffer_M, rows, pair)
                assert isinstance(found, tuple)
                for one, other in zip(found, expected(x_NI, rows), strict=True):
                    torch.testing.assert_close(one, other)
                assert buffer_M.tolist() == [1.0] * rows + [0.0] * (9 - rows)
            if not turn:
                assert asked == [5, 1]  # one row and several are two versions
    assert asked == [5, 1], "both versions are known"
    with torch.inference_mode(), pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="reduction dim"):
        direct(torch.randn(5, 2), torch.zeros(9), 5, pair)  # torch is asked, and refuses


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
