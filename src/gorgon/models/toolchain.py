"""The C++ compiler of the machine: whether there is one, and a library built with it from our sources."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from gorgon.errors import MissingDependencyError

log = logging.getLogger(__name__)


def cpp_compiler() -> str | None:
    """The compiler that torch's CPU code generator would use, if it is there with Python's headers."""
    from torch._inductor import config

    configured = config.cpp.cxx
    names = [configured] if isinstance(configured, str) else [n for n in configured if n]
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    found = (shutil.which(name) for name in (*names, "g++", "clang++"))
    return next((path for path in found if path), None) if headers.is_file() else None


def can_build(build: Callable[[], object], without: str) -> bool:
    """Whether there is a C++ compiler and `build` works; if it fails to, a warning says what is `without` it."""
    if cpp_compiler() is None:
        return False
    try:
        build()
    except MissingDependencyError as error:
        log.warning("%s: %s", without, error)
        return False
    return True


def build_library(
    name: str, sources: Sequence[Path], headers: Sequence[Path] = (), options: Sequence[str] = ()
) -> Path:
    """Compiles sources for this processor and torch's stable interface, unless that was done before.

    The library lies beside what torch's code generator keeps, under a name that says what it was made of. It appears
    there whole, so processes that build it at the same time do not disturb each other.
    Raises: MissingDependencyError when there is no compiler, or it cannot build it.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    compiler = cpp_compiler()
    if compiler is None:
        raise MissingDependencyError(
            "no C++ compiler with Python's headers is here", hint="install g++ and python3-dev"
        )
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    flags = ["-O3", native, "-std=c++20", "-shared", "-fPIC", "-DTORCH_TARGET_VERSION=0x020a000000000000", *options]
    torch_dir = Path(torch.__file__).parent
    # What the compiler defines names itself, its version and the processor's instructions.
    defined = _run([compiler, native, "-dM", "-E", "-x", "c++", os.devnull])
    made_of = [
        *(path.read_text(encoding="utf-8") for path in (*sources, *headers)),
        *flags,
        torch.__version__,
        str(torch_dir),
        defined,
    ]
    key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    library = Path(cache_dir()) / "gorgon" / f"{name}-{key}.so"
    if not library.is_file():
        library.parent.mkdir(parents=True, exist_ok=True)
        log.info("building our %s with %s", name, compiler)
        with tempfile.TemporaryDirectory(dir=library.parent) as directory:
            made = Path(directory) / library.name
            _run([compiler, *flags, f"-I{torch_dir / 'include'}", *map(str, sources), "-o", str(made),
                  f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-lc10"])  # fmt: skip
            made.replace(library)
    return library


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603 - our own command
    except (OSError, subprocess.CalledProcessError) as error:
        said = str(getattr(error, "stderr", "") or error).strip().splitlines()
        raise MissingDependencyError(
            f"the C++ compiler failed: {said[0] if said else 'it said nothing'}", field="compiler", value=command[0],
            hint="update the compiler, or run steps 'recorded' or 'eager'",
        ) from error  # fmt: skip
