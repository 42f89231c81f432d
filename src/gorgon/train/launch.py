"""Starts this program in several processes, with torchrun, and ends as they end."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from types import FrameType

from gorgon.errors import Interrupted

GRACE_SECONDS = 110
"""From SIGTERM to SIGKILL: a checkpoint must be written in it. SageMaker gives a container 120 s. torch before 2.12
does not read it and kills after 30 s."""


def run_processes(arguments: Sequence[str], count: int) -> int:
    """Runs `gorgon ARGUMENTS` in `count` processes of this machine and returns their exit code.

    torchrun runs inside this process: it numbers the processes, hands SIGTERM and SIGINT on to them, and stops the
    others when one of them fails.
    Returns: 0 when all ended well; the exit code of the process that failed first, 128 + N if signal N ended it; 143
        after SIGTERM or SIGINT.
    """
    before = {s: signal.signal(s, _stop) for s in (signal.SIGTERM, signal.SIGINT)}  # until torchrun puts its own
    try:
        from torch.distributed import run as torchrun
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE_SECONDS))
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        options = ["--standalone", "--nproc-per-node", str(count)]
        options += ["--local-addr", "127.0.0.1"]  # a container's own host name may lead nowhere
        try:
            torchrun.run(torchrun.parse_args([*options, "--module", "gorgon.cli", *arguments]))  # type: ignore[no-untyped-call]
        except SignalException:
            return Interrupted.exit_code
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            code = int(failure.exitcode)
            return code if code >= 0 else 128 - code
        return 0
    except Interrupted:
        return Interrupted.exit_code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise Interrupted("stopped before the processes began", hint="the same command starts again")
