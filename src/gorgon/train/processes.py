"""What several training processes do together: sums, agreements, and one end for all of them.

One process per GPU, started by torchrun (`train/launch.py`), all on one machine: they share the output directory, and
only the first one writes results into it. Tensors on a GPU travel through NCCL, those on the CPU through gloo.

A process that fails says so in the store that torchrun keeps, and exits. The others notice when their next collective
call loses the connection, or when torchrun stops them, and read there what happened. Nobody answers a failure with a
collective call of its own: it would meet another process's call of another kind.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gorgon import ranks
from gorgon.artifacts import StepResult, StepRun, run_step, storage_errors
from gorgon.config import StepConfig
from gorgon.errors import ConfigError, GorgonError, Interrupted, PeerError
from gorgon.progress import console

WAIT = datetime.timedelta(hours=6)
"""How long a process waits for the others, who may merge weights or write a large model meanwhile. A process that is
gone is noticed at once."""
FAILURE = "gorgon failure"
LOST = ("connection closed", "connection reset", "broken pipe", "timed out", "nccl")
"""What the backends write when another process is gone."""


@dataclass(frozen=True)
class Processes:
    """This process among `count`. With one process every method returns at once what it was given."""

    rank: int = 0
    count: int = 1
    store: Any = None

    @property
    def first(self) -> bool:
        """True for the one that writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Returns when every process has come here."""
        self.any(False)

    def any(self, flag: bool) -> bool:
        """True in every process when it is true in one."""
        return bool(self.sum(torch.tensor(int(flag)))) if self.count > 1 else flag

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def begin_sum(self, tensors: Iterable[Tensor]) -> list[Any]:
        """Starts the sums of several tensors, in place; each is there once `wait()` of its entry has returned."""
        return [dist.all_reduce(tensor, async_op=True) for tensor in tensors] if self.count > 1 else []

    def share(self, value: Any = None) -> Any:
        """The first process's `value`, in every process."""
        if self.count > 1:
            holder = [value]
            dist.broadcast_object_list(holder, src=0, device=torch.device("cpu"))
            value = holder[0]
        return value

    def cause(self, error: BaseException) -> BaseException:
        """What this process ends with: its own error if it is the first to fail, else word of what failed before."""
        if self.count == 1 or isinstance(error, PeerError):
            return error
        if isinstance(error, RuntimeError) and any(word in str(error).lower() for word in LOST):
            error = PeerError(
                "another process is gone and left no word: it crashed, was killed, or ran out of memory",
                hint="the same command resumes from the last checkpoint; the machine's log may say more",
            )  # fmt: skip
        known = isinstance(error, GorgonError)
        ours = {
            "process": self.rank, "exit_code": getattr(error, "exit_code", 1), "hint": getattr(error, "hint", None),
            "text": str(error) if known else f"{type(error).__name__}: {error}",
        }  # fmt: skip
        try:
            told = json.loads(self.store.compare_set(FAILURE, "", json.dumps(ours)))
        except (RuntimeError, ValueError):  # the store went with the process that kept it
            return error
        if told["process"] == self.rank:
            if isinstance(error, GorgonError):
                error.process = self.rank
            return error
        if told["exit_code"] == Interrupted.exit_code:
            return Interrupted(told["text"], hint=told["hint"])
        return PeerError(
            f"process {told['process']} failed: {told['text']}", hint=told["hint"], exit_code=told["exit_code"]
        )

    @contextmanager
    def telling(self) -> Iterator[None]:
        """An error of the block is told to the others; what is raised is what came first among all."""
        try:
            yield
        except BaseException as error:
            cause = self.cause(error)
            if cause is error:
                raise
            raise cause from error


ALONE = Processes()
"""One process, as without torchrun."""


@contextmanager
def together() -> Iterator[Processes]:
    """This process and those that were started with it; `ALONE` when there are none.

    Within the block only the first process shows its progress.
    Raises: ConfigError when the environment of several processes is incomplete or there are too few GPUs; an error of
        the block, or the error of another process that came first.
    """
    here = ranks.this()
    if here.count == 1:
        yield ALONE
        return
    processes = _connect(here)
    quiet, console.quiet = console.quiet, console.quiet or not here.first
    try:
        with processes.telling():
            yield processes
    finally:
        console.quiet = quiet
    dist.destroy_process_group()  # not after a failure: it could wait for those who are gone


def _connect(here: ranks.Rank) -> Processes:
    from torch.distributed.rendezvous import rendezvous

    backend = "gloo"
    if torch.cuda.is_available():
        if here.local >= torch.cuda.device_count():
            raise ConfigError(
                [f"process {here.local} has no GPU: this machine has {torch.cuda.device_count()}"],
                hint="start one process per GPU",
            )
        torch.cuda.set_device(here.local)
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, rank, count = next(iter(rendezvous("env://", timeout=WAIT)))
    except ValueError as error:
        raise ConfigError(
            [f"the processes cannot find each other: {error}"], hint="start them with torchrun --nproc-per-node N"
        ) from error
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=WAIT)
    return Processes(rank, count, store)


def run_step_together(
    processes: Processes,
    step: str,
    config: StepConfig,
    inputs: Mapping[str, str | Path | None],
    out: Path,
    body: Callable[[StepRun], None],
    *,
    force: bool = False,
) -> StepResult:
    """`artifacts.run_step`, whose `body` runs in every process, in the first one's directory.

    The first process decides whether there is anything to do, and moves the finished result to its place. What the
    others note in their `StepRun` is lost.
    Raises: what `run_step` and the body raise.
    """

    def watched(run: StepRun) -> None:
        processes.share(str(run.directory))
        with processes.telling(), storage_errors(out):  # before anything is tidied up: the others might stumble over it
            body(run)

    if processes.first:
        result = run_step(step, config, inputs, out, watched, force=force, processes=processes.count)
        if result.reused:
            processes.share(None)
        processes.share(result.manifest)
        return result
    directory = processes.share()
    if directory is not None:
        with storage_errors(out):
            body(StepRun(Path(directory)))
    return StepResult(out, processes.share(), reused=directory is None)
