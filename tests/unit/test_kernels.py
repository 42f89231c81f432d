"""Our own kernels are built once for what they are made of, and without a compiler everything goes on."""

import subprocess
import sys

import pytest

from gorgon.errors import MissingDependencyError
from gorgon.models import kernels, toolchain
from gorgon.models.toolchain import build_library, cpp_compiler

pytestmark = pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler")


def test_a_library_is_built_once_and_anew_for_another_source(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    source, header = tmp_path / "probe.cpp", tmp_path / "probe.h"
    header.write_text("constexpr int ONE = 1;")
    source.write_text('#include "probe.h"\nextern "C" int probe() { return ONE; }')
    first = build_library("probe", [source], [header])
    made = first.stat().st_mtime_ns
    assert build_library("probe", [source], [header]) == first and first.stat().st_mtime_ns == made
    source.write_text('#include "probe.h"\nextern "C" int probe() { return ONE + 1; }')
    second = build_library("probe", [source], [header])
    header.write_text("constexpr int ONE = 10;")
    third = build_library("probe", [source], [header])
    assert len({first, second, third}) == 3
    assert [p.suffix for p in first.parent.iterdir()] == [".so"] * 3, "nothing half-made is left"


def test_a_source_that_does_not_compile_is_an_error_that_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    source = tmp_path / "broken.cpp"
    source.write_text("int broken( {")
    with pytest.raises(MissingDependencyError, match=r"broken\.cpp"):
        build_library("broken", [source])
    assert not list((tmp_path / "gorgon").iterdir())


def test_without_a_working_compiler_a_warning_says_so_and_steps_go_on(monkeypatch, caplog):
    def fails(*_):
        raise MissingDependencyError("the C++ compiler failed: no such header")

    kernels.kernels_work.cache_clear()
    kernels.load_kernels.cache_clear()
    monkeypatch.setattr(kernels, "build_library", fails)
    try:
        assert kernels.kernels_work() is False
        assert "no such header" in caplog.text
    finally:
        kernels.kernels_work.cache_clear()
        kernels.load_kernels.cache_clear()
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    assert cpp_compiler() is None


def test_processes_that_build_at_the_same_time_do_not_disturb_each_other(tmp_path):
    code = (
        "import torch; from gorgon.models import kernels; kernels.load_kernels(); print(torch.ops.gorgon.panel_linear)"
    )
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in running:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and "panel_linear" in said
