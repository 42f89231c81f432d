"""Our own package as a wheel, made from what is installed: jobs run the code that submitted them, changes included."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
DISTRIBUTION = "gorgon-llm"
EPOCH = (1980, 1, 1, 0, 0, 0)
"""One date for all files, so that the same code is the same wheel."""


def build_wheel(folder: Path) -> Path:
    """Writes the wheel into `folder` and returns its path. Needs no network and no build tool.

    Its version names its contents, so that pip replaces a Gorgon of the same release that an image already has.
    Source: PyPA specification "Binary distribution format".
    """
    installed = metadata.distribution(DISTRIBUTION)
    files = _package()
    release = installed.version.partition("+")[0]
    version = f"{release}+g{_contents(files)[:12]}"
    stem = f"{DISTRIBUTION.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    about = (installed.read_text("METADATA") or "").replace(
        f"\nVersion: {installed.version}\n", f"\nVersion: {version}\n"
    )
    files[f"{info}/METADATA"] = about.encode()
    files[f"{info}/entry_points.txt"] = b"[console_scripts]\ngorgon = gorgon.cli:main\n"
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: gorgon\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = "".join(f"{name},sha256={_digest(content)},{len(content)}\n" for name, content in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, EPOCH)
            packed = zipfile.ZIP_STORED if name.endswith(".safetensors") else zipfile.ZIP_DEFLATED
            entry.compress_type, entry.external_attr = packed, 0o644 << 16
            archive.writestr(entry, content)
    return path


def package_digest() -> str:
    """Names the package by its contents; the handler for the DJL container is a part of it."""
    return _contents(_package())[:16]


def _package() -> dict[str, bytes]:
    return {
        f"gorgon/{path.relative_to(PACKAGE).as_posix()}": path.read_bytes()
        for path in sorted(PACKAGE.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def _contents(files: Mapping[str, bytes]) -> str:
    return hashlib.sha256("".join(f"{name} {_digest(body)}\n" for name, body in files.items()).encode()).hexdigest()


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
