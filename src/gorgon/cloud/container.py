"""What runs inside the container: `gorgon step NAME --base-dir /opt/ml`, exec'd as the container's first process.

It reads hyperparameters and channels, runs the step with its checkpoints where the service keeps them, and leaves the
result in model/, or the reason of a failure in output/failure. On an instance with several GPUs a step that can use
them runs in as many processes, each of which comes here; the first one reads and publishes for all.
"""

from __future__ import annotations

import os
import shutil
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from gorgon import ranks
from gorgon.artifacts import MANIFEST, StepResult, link_tree, read_manifest, write_json
from gorgon.cloud.images import gpu_count
from gorgon.cloud.job import INPUTS, JOBS
from gorgon.cloud.layout import FAILURE_CHARACTERS, Layout
from gorgon.config import StepConfig, build, nearest
from gorgon.errors import CloudError, ConfigError, DataError, GorgonError, Interrupted, PeerError
from gorgon.interrupts import graceful
from gorgon.progress import say

RunStep = Callable[[StepConfig, Path], StepResult]
RunProcesses = Callable[[Sequence[str], int], int]


def process_count(step: str, base_dir: Path, given: int | None = None) -> int:
    """How many processes are still to be started for a step: one, when this is one of them already.

    Args: given: wanted number; None takes the instance's GPUs, by SM_NUM_GPUS (which the training toolkit sets) or
        else by the instance type in resourceconfig.json.
    Raises: ConfigError when several are wanted for a step that cannot share its work.
    """
    if ranks.this().count > 1:
        return 1
    if step not in ranks.TOGETHER:
        if given is not None and given > 1:
            raise ConfigError(
                [f"'--processes {given}': the step '{step}' runs in one process"],
                hint=f"only {' and '.join(ranks.TOGETHER)} share their work among processes",
            )
        return 1
    if given is not None:
        return given
    told = os.environ.get("SM_NUM_GPUS", "")
    return max(1, int(told) if told.isdecimal() else gpu_count(Layout(base_dir).read_instance_type()))


def run_in_processes(step: str, base_dir: Path, count: int, run: RunProcesses) -> int:
    """Runs a step in several processes, each by `run_in_container`, and returns the exit code.

    Args: run: starts `gorgon ARGUMENTS` so many times, hands signals on, and returns the exit code.
    """
    layout = Layout(base_dir)
    say(f"{count} processes, one per GPU")
    code = run(["step", step, "--base-dir", str(base_dir)], count)
    if code == Interrupted.exit_code and not layout.failure.is_file():
        return 0
    if code and not layout.failure.is_file():  # killed before it could write
        error = CloudError(
            f"a process ended with exit code {code} and left no word", field="step", value=step,
            hint="137 is mostly too little memory; the job's log may say more",
        )  # fmt: skip
        write_failure(layout, error)
    return code


def run_in_container(step: str, base_dir: Path, run: RunStep) -> None:
    """Runs a step in a directory laid out like /opt/ml.

    A SIGTERM ends it well, with a checkpoint: the service then either starts it again (spot) or was asked to stop it.
    Of several processes the one that fails first writes output/failure, and the first one publishes the result.
    Args: run: runs a configuration into an output directory.
    Raises: what the step raises, after writing it to output/failure.
    """
    layout = Layout(base_dir)
    with graceful():  # around the failure too: when one of several processes fails, the others are sent SIGTERM
        try:
            ranks.refuse_several(step)
            config = read_job(step, layout)
            result = run(config, layout.checkpoints / step)
            if ranks.this().first:
                publish(result, layout)
        except (Interrupted, KeyboardInterrupt) as stop:
            if ranks.this().first:
                say(f"stopped: {stop or 'interrupted twice'}; the checkpoint is in {layout.checkpoints}")
        except PeerError as error:
            if error.process is not None:  # nobody else is left to tell
                write_failure(layout, error)
            raise
        except BaseException as error:
            write_failure(layout, error)
            raise


def read_job(step: str, layout: Layout) -> StepConfig:
    """The step's configuration from hyperparameters.json and the channels.

    Raises: ConfigError for an unknown step, an unknown or wrong setting; DataError for an empty or incomplete channel.
    """
    if step not in JOBS:
        raise ConfigError([f"there is no step '{step}': {nearest(step, list(JOBS))}"])
    if not layout.config.is_dir():
        raise DataError(
            "not laid out like /opt/ml: input/config is missing", file=layout.base,
            hint="SageMaker makes this tree; on this machine `gorgon run RECIPE --on job` does",
        )  # fmt: skip
    kind = JOBS[step]
    values = layout.read_hyperparameters()
    for channel in layout.read_channels():
        if channel in INPUTS and channel in kind.model_fields:
            values[channel] = str(_channel_input(layout.channels / channel, channel))
    return build(kind, values, step=step)


def _channel_input(folder: Path, name: str) -> Path:
    """What a setting gets for its channel: the directory, or for a data file the one file in it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    if not files:
        raise DataError(
            "the channel is empty", file=folder, field=name,
            hint="does the S3 prefix of this channel hold the output of a finished job?",
        )  # fmt: skip
    if (folder / MANIFEST).is_file():
        check_complete(folder)
    if name in ("train", "validation", "test"):
        if len(files) != 1:
            raise DataError(
                f"the channel must hold one file, not {len(files)}", file=folder, field=name,
                value=", ".join(f.name for f in files[:4]),
            )  # fmt: skip
        return files[0]
    return folder


def check_complete(folder: Path) -> None:
    """Raises DataError when a file that the step's manifest lists is not there: a copy was cut short."""
    for name in read_manifest(folder).get("outputs", {}):
        if not (folder / name).is_file():
            raise DataError(
                f"the step's output is incomplete: {name} is missing", file=folder,
                hint="the S3 prefix was only partly written; run the step before this one again",
            )  # fmt: skip


def publish(result: StepResult, layout: Layout) -> None:
    """Moves a finished step to model/, and its manifest and metrics beside it for a quick look."""
    link_tree(result.directory, layout.model)
    write_json(layout.output_data / "metrics.json", result.manifest["metrics"])
    write_json(layout.output_data / MANIFEST, result.manifest)
    shutil.rmtree(result.directory, ignore_errors=True)  # finished work is no checkpoint


def write_failure(layout: Layout, error: BaseException) -> None:
    """Writes the real error, cut to what the service shows: the message first, then the end of the traceback."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, GorgonError):
        text += f"\nhint: {error.hint}" if error.hint else ""
    else:
        trace = "".join(traceback.format_exception(error))
        room = FAILURE_CHARACTERS - len(text) - 1
        text = f"{text}\n{trace[-room:]}" if room > 0 else text
    layout.failure.parent.mkdir(parents=True, exist_ok=True)
    layout.failure.write_text(text[:FAILURE_CHARACTERS], encoding="utf-8")
