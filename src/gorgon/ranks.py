"""Which of several processes this is. torchrun starts them and tells each its rank in the environment.

Nothing here needs torch: the command line and the container ask too. What the processes do together is in
`train/processes.py`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from gorgon.errors import ConfigError, GorgonError

TOGETHER = ("finetune", "train-heads")
"""Steps whose work several processes share. `prepare` needs no GPU, `tune` and `compare` measure one request on one
GPU, and `distill` decodes in batches that fill one; all of these would do the same work several times."""


@dataclass(frozen=True)
class Rank:
    """One of `count` processes, numbered from 0; `local` is its number on this machine, and so that of its GPU."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """True for the one process that writes and speaks for all."""
        return self.rank == 0


def this() -> Rank:
    """This process, by RANK, WORLD_SIZE and LOCAL_RANK.

    Raises: ConfigError when they are missing, are no numbers or contradict each other, or there are several machines.
    """
    count = _number("WORLD_SIZE", 1)
    if count == 1:
        return Rank()
    rank, local, here = _number("RANK"), _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE", count)
    if not (0 <= local <= rank < count):
        raise ConfigError([f"process {rank} ({local} on this machine) of {count} cannot be"], hint=_HINT)
    if here != count:
        raise ConfigError(
            [f"{count} processes on several machines: the cached hidden states are shared on one machine only"],
            hint="take one machine with more GPUs",
        )
    return Rank(rank, count, local)


_HINT = "start several processes with torchrun --nproc-per-node N"


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, None if default is None else str(default))
    if text is None or not text.isdecimal() or (name == "WORLD_SIZE" and int(text) < 1):
        raise ConfigError(
            [f"WORLD_SIZE says that there are several processes, and {name} is {text!r}, not a number"], hint=_HINT
        )
    return int(text)


def refuse_several(name: str) -> None:
    """Raises ConfigError when several processes were started for a command whose work they cannot share."""
    here = this()
    if here.count > 1 and name not in TOGETHER:
        raise ConfigError(
            [f"'gorgon {name}' runs in one process, and {here.count} were started"],
            hint=f"only {' and '.join(TOGETHER)} share their work among processes",
        )


def tells(error: GorgonError) -> bool:
    """True in the process that shall show an error: the one it happened in, and the first one always."""
    try:
        here = this()
    except ConfigError:
        return True
    return here.first or error.process == here.rank
