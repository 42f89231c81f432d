"""Runs a job on this machine, in a directory laid out like /opt/ml, as the container would."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from gorgon.artifacts import MANIFEST, digest_input
from gorgon.cloud.job import Channel, JobSpec
from gorgon.cloud.layout import Layout
from gorgon.errors import CloudError, DataError, Interrupted
from gorgon.progress import say


def run_local(spec: JobSpec, directory: Path) -> Path:
    """Runs a job here and returns the directory with its result (`model/`).

    The same directory resumes a job that was stopped. A SIGTERM or Ctrl-C is handed on to the job.
    Raises: DataError when an input is missing; CloudError with the job's own reason when it fails; Interrupted.
    """
    layout, fingerprint = Layout(directory), _fingerprint(spec)
    marker = directory / "job.json"
    if (layout.model / MANIFEST).is_file() and marker.is_file() and marker.read_text(encoding="utf-8") == fingerprint:
        say("      unchanged, reused")
        return layout.model
    shutil.rmtree(layout.model, ignore_errors=True)
    layout.create(spec.hyperparameters, [channel.name for channel in spec.channels])
    layout.failure.unlink(missing_ok=True)
    for channel in spec.channels:
        _materialise(channel, layout.channels / channel.name)
    environment = {**os.environ, "TRAINING_JOB_NAME": spec.name, **spec.environment}
    code, stopped = _run(spec.argv(directory), environment)
    if code != 0:
        reason = layout.failure.read_text(encoding="utf-8") if layout.failure.is_file() else f"exit code {code}"
        raise CloudError(f"the job '{spec.name}' failed: {reason}", field="job", value=spec.name)
    if stopped:
        raise Interrupted(f"the job '{spec.name}' was stopped", hint="the same command resumes it")
    marker.write_text(fingerprint, encoding="utf-8")
    return layout.model


def run_chain(specs: Sequence[JobSpec], out: Path) -> dict[str, Path]:
    """Runs jobs in order, each in `out/NAME-OF-STEP`, a later one reading what an earlier one wrote."""
    results: dict[str, Path] = {}
    for number, spec in enumerate(specs, start=1):
        channels = tuple(
            replace(c, source=str(results[c.job]), job=None) if c.job in results else c for c in spec.channels
        )
        say(f"[{number}/{len(specs)}] {spec.step}: {' '.join(spec.argv(out / spec.step))}")
        results[spec.step] = run_local(replace(spec, channels=channels), out / spec.step)
    return results


def _fingerprint(spec: JobSpec) -> str:
    inputs = {c.name: digest_input(c.source) for c in spec.channels}
    return json.dumps([spec.step, spec.hyperparameters, inputs], sort_keys=True)


def _materialise(channel: Channel, folder: Path) -> None:
    source = Path(channel.source)
    if channel.in_s3 or not source.exists():
        raise DataError("this input is not on this machine", field=channel.name, value=channel.source)
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    if source.is_dir():
        if folder.is_dir():
            return  # an earlier run's copy
        folder.symlink_to(source.resolve(), target_is_directory=True)
        return
    folder.mkdir(exist_ok=True)
    (folder / source.name).unlink(missing_ok=True)
    (folder / source.name).symlink_to(source.resolve())


def _run(argv: list[str], environment: dict[str, str]) -> tuple[int, bool]:
    """Exit code, and whether a stop was asked for meanwhile. `gorgon` means the one of this interpreter."""
    command = [sys.executable, "-m", "gorgon.cli", *argv[1:]]
    stopped = False
    process = subprocess.Popen(command, env=environment, start_new_session=True)  # noqa: S603

    def hand_on(number: int, _frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        process.send_signal(number)

    before = {s: signal.signal(s, hand_on) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        return process.wait(), stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
