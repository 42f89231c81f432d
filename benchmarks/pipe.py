"""A contestant in a process of its own: JSON lines over a pipe, and stopped while it is not its turn.

Only the standard library, because one end may run in another interpreter. A stopped process (SIGSTOP) takes no time
from the others: thread pools go on spinning for a while after an answer, and engines poll for work.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


def take_stdout() -> TextIO:
    """The real stdout, for the protocol; whatever else prints goes to stderr. Call this before heavy imports."""
    if sys.platform == "linux":  # a stopped worker would outlive a killed benchmark for ever
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return out


def serve(out: TextIO, answer: Callable[[dict[str, Any]], dict[str, Any]], facts: dict[str, Any]) -> None:
    """The worker's end: announces `facts`, then answers each line until the input ends."""
    out.write(json.dumps({"ready": facts}) + "\n")
    for line in sys.stdin:
        out.write(json.dumps(answer(json.loads(line))) + "\n")


class WorkerError(RuntimeError):
    """A worker ended or never became ready; the message ends with the last lines that it wrote."""


class Worker:
    """The other end: one process that is stopped except while it starts, answers or ends."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed in `close`
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
                start_new_session=True, env={**os.environ, **environment},
            )  # fmt: skip
        except OSError as error:
            raise WorkerError(f"{name} cannot be started: {error.strerror}") from error
        try:
            self.facts: dict[str, Any] = self._read()["ready"]
        except WorkerError:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request; only meanwhile does the process run.

        Raises: WorkerError when the process has ended.
        """
        self._signal(signal.SIGCONT)
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return self._read()
        except BrokenPipeError as error:
            raise self._failure() from error
        finally:
            self._signal(signal.SIGSTOP)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        loaded: dict[str, Any] = json.loads(line)
        return loaded

    def _failure(self) -> WorkerError:
        self._log.seek(0)
        tail = [line.rstrip() for line in self._log if line.strip()][-12:] or ["it wrote nothing"]
        return WorkerError(f"{self.name} ended early:\n  " + "\n  ".join(tail))

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # ended; the next read says so
            os.killpg(self._process.pid, number)

    def peak_bytes(self) -> int:
        """Largest resident memory of the process and its children so far, added up; 0 where there is no /proc."""
        total = 0
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.getsid(int(folder.name)) != self._process.pid:
                    continue
                status = (folder / "status").read_text()
            except OSError:
                continue  # ended meanwhile
            total += sum(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
        return total

    def close(self) -> None:
        """Ends the process and its children."""
        self._signal(signal.SIGCONT)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._log.close()
