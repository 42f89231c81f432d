"""Step directories: written whole or not at all, resumable, each with a `manifest.json`.

A step works in `OUT.partial` beside its output directory and the finished directory takes its place in one rename,
so a reader never sees half a result. A killed step leaves `OUT.partial`; the same command finds its checkpoint
there. What a step depends on (its configuration and the contents of its inputs) makes its *fingerprint*: an output
with the same fingerprint is reused, one with another is replaced.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from gorgon.config import StepConfig
from gorgon.errors import DataError, GorgonError, Interrupted, StorageError

MANIFEST = "manifest.json"
RESUME = "resume.json"
CHECKPOINTS = "checkpoints"
PACKAGES = ("gorgon-llm", "torch", "transformers", "tokenizers", "trl", "peft", "accelerate", "datasets")


@dataclass
class StepRun:
    """What a step's body gets: the directory to write into, and a place for its metrics and timings."""

    directory: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    timings_s: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go; it survives a killed step and is not part of the finished output."""
        path = self.directory / CHECKPOINTS
        path.mkdir(exist_ok=True)
        return path

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the block's wall time, in seconds, to the manifest under `timings_s`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings_s[phase] = round(self.timings_s.get(phase, 0.0) + time.perf_counter() - start, 3)


@dataclass(frozen=True)
class StepResult:
    """A finished step: its directory, its manifest, and whether an earlier output was reused."""

    directory: Path
    manifest: dict[str, Any]
    reused: bool


def run_step(
    step: str,
    config: StepConfig,
    inputs: Mapping[str, str | Path | None],
    out: Path,
    body: Callable[[StepRun], None],
    *,
    force: bool = False,
    processes: int = 1,
) -> StepResult:
    """Runs `body` in `OUT.partial` and moves the result to `out`, or reuses what is there.

    Args:
        step: the step's name, for the manifest.
        config: its resolved configuration.
        inputs: name -> file, directory, or identifier (a hub id); contents of files and directories are hashed.
        out: the output directory.
        body: writes its files into `run.directory`; it finds its own checkpoints in `run.checkpoints`.
        force: run even when a finished output with the same fingerprint exists.
        processes: how many share the work. Another number starts over instead of resuming, for the batch grows with
            it; a finished output is reused whatever the number, as it is whatever the machine.
    Raises: StorageError when `out` holds files that no step wrote, cannot be written or the disk is full; what the
        body raises. After an error nothing half-written is left, except checkpoints for resuming.
    """
    digests = {name: digest_input(value) for name, value in inputs.items() if value is not None}
    settings = config.model_dump(mode="json", exclude=set(digests))  # an input's contents count, not where it lies
    fingerprint = _sha256_text(json.dumps([step, settings, digests], sort_keys=True))
    done = read_manifest(out) if (out / MANIFEST).is_file() else None
    if done is not None and done.get("fingerprint") == fingerprint and not force:
        return StepResult(out, done, reused=True)
    if done is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StorageError(
            "the output path holds something that no step of ours wrote",
            field="out", value=str(out), hint="choose another directory, or remove it yourself",
        )  # fmt: skip

    partial = out.with_name(out.name + ".partial")
    started, start = datetime.now(UTC), time.perf_counter()
    with storage_errors(out):
        _open_partial(partial, {"fingerprint": fingerprint, "processes": processes}, force=force)
    run = StepRun(partial)
    try:
        with storage_errors(out):
            body(run)
            _finish(run, step, config, inputs, digests, fingerprint, started, time.perf_counter() - start)
            _replace(partial, out)
    except (Interrupted, KeyboardInterrupt):
        if not _has_checkpoint(partial):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    except BaseException:  # anything else: keep a checkpoint if there is one, never a half result
        _keep_only_checkpoints(partial)
        raise
    return StepResult(out, read_manifest(out), reused=False)


def _has_checkpoint(partial: Path) -> bool:
    folder = partial / CHECKPOINTS
    return folder.is_dir() and any(folder.iterdir())


def _keep_only_checkpoints(partial: Path) -> None:
    if not _has_checkpoint(partial):
        shutil.rmtree(partial, ignore_errors=True)
        return
    for path in partial.iterdir():
        if path.name not in (CHECKPOINTS, RESUME):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _open_partial(partial: Path, wanted: dict[str, Any], *, force: bool) -> None:
    marker = partial / RESUME
    if partial.exists():
        try:
            same = {"processes": 1, **json.loads(marker.read_text())} == wanted and not force
        except (OSError, ValueError):
            same = False
        if same:
            _keep_only_checkpoints(partial)
        if not same:
            shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    write_json(marker, wanted)


def _finish(
    run: StepRun,
    step: str,
    config: StepConfig,
    inputs: Mapping[str, str | Path | None],
    digests: Mapping[str, str],
    fingerprint: str,
    started: datetime,
    seconds: float,
) -> None:
    shutil.rmtree(run.directory / CHECKPOINTS, ignore_errors=True)
    (run.directory / RESUME).unlink(missing_ok=True)
    outputs = {str(p.relative_to(run.directory)): digest_file(p) for p in _files(run.directory)}
    write_json(
        run.directory / MANIFEST,
        {
            "format": 1,
            "step": step,
            "fingerprint": fingerprint,
            "argv": sys.argv,
            "config": config.model_dump(mode="json"),
            "inputs": {k: {"path": str(v), "digest": digests[k]} for k, v in inputs.items() if v is not None},
            "outputs": outputs,
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            "timings_s": run.timings_s,
            "metrics": run.metrics,
            "warnings": run.warnings,
            **provenance(),
        },
    )


def _replace(partial: Path, out: Path) -> None:
    """Puts `partial` where `out` is. Between two renames the old output waits under another name, never half gone."""
    old = out.with_name(out.name + ".old")
    if old.exists():
        shutil.rmtree(old)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a finished step.

    Raises: DataError when the directory has none or it is not JSON.
    """
    path = directory / MANIFEST
    try:
        loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            "not the output of a step: no manifest.json", file=directory,
            hint="give the directory that the earlier step wrote with --out",
        ) from error  # fmt: skip
    except ValueError as error:
        raise DataError("the manifest is not valid JSON", file=path, hint="run the step again with --force") from error
    return loaded


def write_json(path: Path, document: object, *, indent: int | None = 2) -> None:
    """Writes JSON to a temporary file, syncs it, and renames it into place."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(document, file, indent=indent, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def link_tree(source: Path, target: Path, *, skip: frozenset[str] = frozenset()) -> None:
    """Copies a directory's files, by hard link where the file system allows: model weights are large.

    Args: skip: names at the top of `source` that are left out.
    """
    for path in _files(source):
        relative = path.relative_to(source)
        if relative.parts[0] in skip:
            continue
        place = target / relative
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, place)
        except OSError:
            shutil.copy2(path, place)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns a full disk, a missing permission or a read-only file system into a `StorageError` naming `path`."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up",
            errno.EACCES: "no permission to write", errno.EPERM: "no permission to write",
            errno.EROFS: "the file system is read-only", errno.ENOTDIR: "a part of the path is a file",
            errno.EFBIG: "the file would be larger than allowed",
        }  # fmt: skip
        if error.errno not in reasons:
            raise
        raise StorageError(
            f"cannot write the output: {reasons[error.errno]}", field="out", value=str(path),
            hint="free some space or choose another --out; finished steps are kept and will be reused",
        ) from error  # fmt: skip


def digest_input(value: str | Path) -> str:
    """SHA-256 of a file, of a step directory's outputs, of a plain directory's files; an identifier's own text."""
    path = Path(value)
    if path.is_file():
        return digest_file(path)
    if path.is_dir():
        if (path / MANIFEST).is_file():
            outputs = read_manifest(path).get("outputs", {})
        else:
            outputs = {str(p.relative_to(path)): digest_file(p) for p in _files(path)}
        return _sha256_text(json.dumps(outputs, sort_keys=True))
    return f"id:{value}"


def digest_file(path: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _files(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_file())


def provenance() -> dict[str, Any]:
    """Package versions, commit and machine, for manifests and benchmark results."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "python": platform.python_version(), "commit": _commit(), "machine": machine()}


def machine() -> dict[str, Any]:
    """Processor name, logical cores and operating system."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux: platform's own answer stands
    return {"cpu": name, "cores": os.cpu_count(), "os": f"{platform.system()} {platform.machine()}"}


def _commit() -> str | None:
    """The commit of the source tree this runs from, `-dirty` if changed; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        sha = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None
    return sha + ("-dirty" if dirty.stdout.strip() else "")


def require_step_file(directory: str | Path | None, name: str, *, field: str, step: str) -> Path:
    """Path of a file that an earlier step must have written.

    Raises: GorgonError naming the setting `field`, the directory and the step that makes it.
    """
    if directory is None:
        raise GorgonError(f"no directory given for '{field}'", field=field, hint=f"give the output of `gorgon {step}`")
    path = Path(directory) / name
    if not path.is_file():
        raise DataError(f"there is no {name} here", file=directory, field=field, hint=f"`gorgon {step}` writes it")
    return path
