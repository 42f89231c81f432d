"""The directory tree that a SageMaker training container sees under /opt/ml, and that a local run is given too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gorgon.artifacts import write_json
from gorgon.errors import DataError

OPT_ML = "/opt/ml"
FAILURE_CHARACTERS = 1024
"""SageMaker shows this much of output/failure as the job's FailureReason."""


@dataclass(frozen=True)
class Layout:
    """Paths below the base directory. Source: SageMaker developer guide, "How training jobs provide training info"."""

    base: Path

    @property
    def config(self) -> Path:
        """hyperparameters.json, inputdataconfig.json, resourceconfig.json."""
        return self.base / "input" / "config"

    @property
    def channels(self) -> Path:
        """One directory per input channel."""
        return self.base / "input" / "data"

    @property
    def model(self) -> Path:
        """What the job leaves here goes to S3 when it ends well."""
        return self.base / "model"

    @property
    def checkpoints(self) -> Path:
        """Copied to S3 while the job runs, and back when a spot job starts again."""
        return self.base / "checkpoints"

    @property
    def output_data(self) -> Path:
        """Small results beside the model."""
        return self.base / "output" / "data"

    @property
    def failure(self) -> Path:
        """The reason of a failure, in words."""
        return self.base / "output" / "failure"

    def create(
        self, hyperparameters: Mapping[str, str], channels: Sequence[str], *, hosts: Sequence[str] = ("algo-1",)
    ) -> None:
        """Makes the tree and writes the three configuration files, as the service does before it starts a container."""
        for folder in (self.config, self.channels, self.model, self.checkpoints, self.output_data):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(self.config / "hyperparameters.json", dict(hyperparameters))
        mode = {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated", "RecordWrapperType": "None"}
        write_json(self.config / "inputdataconfig.json", dict.fromkeys(channels, mode))
        write_json(
            self.config / "resourceconfig.json",
            {"current_host": hosts[0], "hosts": list(hosts), "network_interface_name": "eth0"},
        )

    def read_hyperparameters(self) -> dict[str, Any]:
        """Settings by name. The service hands over text; ours is JSON, and what is not JSON stays text.

        The toolkit's own keys (`sagemaker_program` and so on) are left out.
        Raises: DataError when the file is not a JSON object.
        """
        given = self._read("hyperparameters.json")
        return {key: _decoded(value) for key, value in given.items() if not key.startswith("sagemaker_")}

    def read_instance_type(self) -> str:
        """The machine's type as the service writes it, such as ml.g5.12xlarge; empty where nothing says."""
        return str(self._read("resourceconfig.json").get("current_instance_type", ""))

    def read_channels(self) -> list[str]:
        """Names of the channels that the job was given.

        Raises: DataError when one that the service announced is not there.
        """
        announced = list(self._read("inputdataconfig.json"))
        for name in announced:
            if not (self.channels / name).is_dir():
                raise DataError("the channel's directory is missing", file=self.channels / name, field=name)
        present = [p.name for p in self.channels.iterdir() if p.is_dir()] if self.channels.is_dir() else []
        return sorted({*announced, *present})

    def _read(self, name: str) -> dict[str, Any]:
        path = self.config / name
        if not path.is_file():
            return {}
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError("not valid JSON", file=path) from error
        if not isinstance(loaded, dict):
            raise DataError("must be a JSON object", file=path, value=loaded)
        return loaded


def _decoded(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
