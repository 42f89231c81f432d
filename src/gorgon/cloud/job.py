"""One job as data: a step's command, its inputs, outputs, environment and machine. Who runs it is decided elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gorgon.cloud.layout import OPT_ML
from gorgon.config import STEPS, ExportConfig, StepConfig

INPUTS = ("model", "data", "train", "validation", "test")
"""Settings that may name files: a job gets them as channels of the same name."""
EXPORT = "export"
JOBS: dict[str, type[StepConfig]] = {**STEPS, EXPORT: ExportConfig}
"""What can run as a job: a recipe's steps, and the export of what they made for an endpoint of vLLM or TGI."""
CODE = "code"
"""Channel with our wheel, the start script and the recipe."""


@dataclass(frozen=True)
class Channel:
    """An input: a local file or directory, an S3 prefix, or the output of an earlier job of the same run.

    Args: job: name of the step whose job writes `source` first; None when it is there already.
    """

    name: str
    source: str
    job: str | None = None

    @property
    def in_s3(self) -> bool:
        """True for an S3 address, False for a local path."""
        return self.source.startswith("s3://")


@dataclass(frozen=True)
class Resources:
    """The machine and how long it may run; times in seconds, the disk in GB."""

    instance_type: str
    instance_count: int = 1
    fallbacks: tuple[str, ...] = ()
    volume_gb: int = 100
    max_runtime_s: int = 86400
    max_wait_s: int | None = None
    spot: bool = False
    keep_alive_s: int = 0


@dataclass(frozen=True)
class JobSpec:
    """A step as a job.

    Args:
        name: unique name of the job.
        step: the step that it runs.
        settings: the step's resolved settings, those that arrive as channels left out.
        channels: its inputs.
        output: S3 prefix or local directory under which the result goes.
        resources: None for a job on this machine.
    """

    name: str
    step: str
    settings: Mapping[str, Any]
    channels: tuple[Channel, ...]
    output: str
    environment: Mapping[str, str] = field(default_factory=dict)
    resources: Resources | None = None

    def argv(self, base_dir: str | Path = OPT_ML) -> list[str]:
        """The command: the same one here and in a container, but for the directory."""
        return ["gorgon", "step", self.step, "--base-dir", str(base_dir)]

    @property
    def hyperparameters(self) -> dict[str, str]:
        """Settings as the service carries them: text, each value in JSON."""
        return {key: json.dumps(value, ensure_ascii=False) for key, value in self.settings.items()}


def split_settings(config: StepConfig, channels: tuple[Channel, ...]) -> dict[str, Any]:
    """A step's settings without those that arrive as channels."""
    names = {channel.name for channel in channels}
    return {key: value for key, value in config.model_dump(mode="json").items() if key not in names}
