"""The kernel for products of a few rows: right for every shape, and the same bits for any number of rows."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gorgon.errors import MissingDependencyError
from gorgon.models import panels, toolchain
from gorgon.models.direct import DirectCalls
from gorgon.models.panels import DOORS, PanelLinear, load_kernel
from gorgon.models.toolchain import build_library, cpp_compiler

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
    load_kernel()
    for weight in (torch.zeros(4), torch.zeros(4, 4, dtype=torch.bfloat16), torch.zeros(4, 8).t()):
        with pytest.raises(RuntimeError):
            torch.ops.gorgon.pack_panels(weight)


def test_a_library_is_built_once_and_anew_for_another_source(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    source = tmp_path / "probe.cpp"
    source.write_text('extern "C" int probe() { return 1; }')
    first = build_library(source)
    made = first.stat().st_mtime_ns
    assert build_library(source) == first and first.stat().st_mtime_ns == made
    source.write_text('extern "C" int probe() { return 2; }')
    assert build_library(source) != first
    assert [p.suffix for p in first.parent.iterdir()] == [".so", ".so"], "nothing half-made is left"


def test_a_source_that_does_not_compile_is_an_error_that_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    source = tmp_path / "broken.cpp"
    source.write_text("int broken( {")
    with pytest.raises(MissingDependencyError, match=r"broken\.cpp"):
        build_library(source)
    assert not list((tmp_path / "gorgon").iterdir())


def test_without_a_working_compiler_a_warning_says_so_and_steps_go_on(monkeypatch, caplog):
    def fails(source):
        raise MissingDependencyError("the C++ compiler failed: no such header")

    panels.panels_work.cache_clear()
    panels.load_kernel.cache_clear()
    monkeypatch.setattr(panels, "build_library", fails)
    try:
        assert panels.panels_work() is False
        assert "no such header" in caplog.text
    finally:
        panels.panels_work.cache_clear()
        panels.load_kernel.cache_clear()
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    assert cpp_compiler() is None


def test_processes_that_build_at_the_same_time_do_not_disturb_each_other(tmp_path):
    code = "import torch; from gorgon.models import panels; panels.load_kernel(); print(torch.ops.gorgon.panel_linear)"
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in running:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and "panel_linear" in said
