"""Checkpoints that are there whole or not at all, and training curves that go on after a resume."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gorgon.errors import ModelError, StorageError


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors, numbers, strings, lists and dicts to a temporary file, syncs it, and renames it into place.

    Raises: OSError or StorageError when the file cannot be written; an earlier checkpoint at `path` then still stands.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:  # torch's zip writer hides the OSError of a full disk in one of these
        temporary.unlink(missing_ok=True)
        raise StorageError(
            f"cannot write the checkpoint: {error}", field="out", value=str(path), hint="is the disk full?"
        ) from error
    temporary.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The checkpoint's contents with tensors on the CPU, or None when there is none. Runs no code from the file.

    Raises: ModelError when the file cannot be read.
    """
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise ModelError(
            "the checkpoint of an earlier run cannot be read", field="checkpoint", value=str(path),
            hint="start over with --force",
        ) from error  # fmt: skip
    return state


class _NoCurves:
    def add_scalar(self, _name: str, _value: float, _step: int) -> None:
        pass


@contextmanager
def curve_writer(folder: Path | None, step: int) -> Iterator[Any]:
    """A TensorBoard writer; points after `step`, which a resumed run draws again, are hidden. None draws nothing."""
    if folder is None:
        yield _NoCurves()
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), purge_step=step or None) as writer:
        yield writer
