"""Typed errors: what was wrong, what was given, what is allowed, and what to do next.

Every error a user can cause is a `GorgonError`. The command line prints it without a traceback and exits with
its `exit_code`. `assert` is kept for faults of our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class GorgonError(Exception):
    """Base of every error that is the input's or the environment's fault, not ours.

    Args:
        problem: one plain sentence without a final period.
        field: name of the setting, column, tensor or option at fault.
        value: what was given; shown with `repr`.
        allowed: what would have been accepted, in words.
        hint: the next thing to try.
    """

    exit_code = 2
    process: int | None = None
    """Rank of the process in which it happened first, when several work together (`train/processes.py`)."""

    def __init__(
        self,
        problem: str,
        *,
        field: str | None = None,
        value: object = None,
        allowed: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.problem, self.field, self.value, self.allowed, self.hint = problem, field, value, allowed, hint
        super().__init__(str(self))

    def __str__(self) -> str:
        """The whole message, hint excluded: problem, then field, value and what is allowed."""
        details = []
        if self.field is not None:
            details.append(f"field: {self.field}")
        if self.value is not None:
            shown = repr(self.value)
            details.append(f"given: {shown if len(shown) <= 200 else shown[:197] + '...'}")
        if self.allowed is not None:
            details.append(f"allowed: {self.allowed}")
        return self.problem + (f" ({'; '.join(details)})" if details else "")


class ConfigError(GorgonError):
    """A recipe, a `--set` or a config file is wrong. Carries every problem found, not only the first."""

    def __init__(self, problems: Sequence[str], *, hint: str | None = None) -> None:
        self.problems = list(problems)
        head = self.problems[0] if len(self.problems) == 1 else f"{len(self.problems)} problems in the configuration"
        rest = "" if len(self.problems) == 1 else "".join(f"\n  - {p}" for p in self.problems)
        super().__init__(head + rest, hint=hint)


class DataError(GorgonError):
    """A dataset is missing, empty or malformed; names file, line and field where they are known."""

    def __init__(
        self,
        problem: str,
        *,
        file: Path | str | None = None,
        line: int | None = None,
        field: str | None = None,
        value: object = None,
        allowed: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.file, self.line = file, line
        where = "" if file is None else f"{file}{'' if line is None else f', line {line}'}: "
        super().__init__(where + problem, field=field, value=value, allowed=allowed, hint=hint)


class ModelError(GorgonError):
    """A model directory, checkpoint or tokenizer cannot be used as it is."""


class ShapeError(GorgonError):
    """A tensor or tree does not have the form that an equation needs."""


class LimitError(GorgonError):
    """A request asks for more than the model or the machine holds (context length, tokens, memory)."""


class SamplingError(GorgonError):
    """A sampling option is out of range, or contradicts another one."""


class GrammarError(GorgonError):
    """A schema or pattern cannot be expressed as a grammar, or an answer cannot be held to it."""


class StorageError(GorgonError):
    """A directory cannot be written: full disk, no permission, or files that are not ours in the way."""


class MissingDependencyError(GorgonError):
    """An optional package or a device that a setting asks for is not there."""


class RefusedError(GorgonError):
    """A server that is under load answered, but with an error."""

    def __init__(self, status: int, text: str, *, retry_after_s: float = 0.0, hint: str | None = None) -> None:
        self.status, self.retry_after_s = status, retry_after_s
        super().__init__(f"the server answered {status}: {text[:300]}", field="status", value=status, hint=hint)


class PeerError(GorgonError):
    """Another of several processes that work together failed, or is gone.

    Args: exit_code: the other's, so that all of them end alike.
    """

    def __init__(self, problem: str, *, hint: str | None = None, exit_code: int = 2) -> None:
        super().__init__(problem, hint=hint)
        self.exit_code = exit_code


class CloudError(GorgonError):
    """AWS refused a request, lacks something, or a job or endpoint there failed."""


class BudgetError(CloudError):
    """What was asked for costs more than the recipe's limit."""


class Interrupted(GorgonError):  # noqa: N818 - a request to stop, not a fault
    """SIGTERM or SIGINT was received; what was finished is kept where the message says.

    Exit code 143, the shell's code for SIGTERM: the work is not done, and the same command resumes it.
    """

    exit_code = 143
