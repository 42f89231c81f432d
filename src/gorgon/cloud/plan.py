"""A recipe as a chain of jobs: names, channels, places in S3. Pure: nothing here talks to AWS."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from gorgon.cloud.config import SageMakerConfig
from gorgon.cloud.job import EXPORT, INPUTS, JOBS, Channel, JobSpec, Resources, split_settings
from gorgon.config import ExportConfig, StepConfig, nearest
from gorgon.errors import CloudError, ConfigError, DataError

NAME_LIMIT = 63
"""Longest name of a training job, model, endpoint configuration or endpoint."""
WITH_HEADS = ("tune", "train-heads")
"""Steps that write a model with heads, the better one first."""


@dataclass(frozen=True)
class Place:
    """Whose account, which region and bucket a run uses."""

    region: str
    account: str
    role: str
    bucket: str
    prefix: str

    def uri(self, *parts: str) -> str:
        """An address below the run's prefix."""
        return "/".join([f"s3://{self.bucket}", self.prefix.strip("/"), *parts])


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket and key of an S3 address."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def resource_name(*parts: str) -> str:
    """A SageMaker name from words: letters, digits and single hyphens.

    Raises: CloudError when it is longer than the service allows; nothing is cut off silently.
    """
    name = re.sub(r"[^a-zA-Z0-9]+", "-", "-".join(parts)).strip("-")
    if len(name) > NAME_LIMIT:
        raise CloudError(
            f"the name is {len(name)} characters long", field="name", value=name, allowed=f"at most {NAME_LIMIT}",
            hint="give the recipe a shorter name",
        )  # fmt: skip
    return name


def plan_jobs(
    steps: Mapping[str, StepConfig],
    out: Path,
    *,
    run: str,
    stamp: str,
    cloud: SageMakerConfig | None = None,
    place: Place | None = None,
) -> list[JobSpec]:
    """One job per step, each reading what earlier jobs write; then one that exports the model, if vLLM or TGI is to
    serve it: what the jobs leave is in S3, and need not come here for that.

    Args:
        steps: resolved configurations, whose inputs lie below `out` when an earlier step writes them.
        run, stamp: name of the run and the moment that makes its names unique.
        cloud, place: None plans for this machine.
    Raises: ConfigError and CloudError for settings that contradict each other.
    """
    if cloud is not None:
        check_settings(cloud, steps)
        steps = _with_export(steps, out, cloud)
    jobs: dict[str, JobSpec] = {}
    for step, config in steps.items():
        name = resource_name(run, step, stamp)
        output = str(out / step) if place is None else place.uri(run, stamp, step)
        channels = tuple(_channels(config, out, jobs))
        jobs[step] = JobSpec(
            name, step, split_settings(config, channels), channels, output,
            environment=cloud.environment if cloud else {}, resources=resources(cloud, step) if cloud else None,
        )  # fmt: skip
    return list(jobs.values())


def s3_inputs(steps: Mapping[str, StepConfig], model: str) -> set[str]:
    """Every S3 address that a recipe reads."""
    named = {str(getattr(config, setting, None)) for config in steps.values() for setting in INPUTS}
    return {uri for uri in (*named, model) if uri.startswith("s3://")}


def exported_for(cloud: SageMakerConfig) -> Literal["vllm", "tgi"] | None:
    """The engine of the recipe's endpoint, if it is one that needs the model exported."""
    engine = "gorgon" if cloud.endpoint is None else cloud.endpoint.engine
    return None if engine == "gorgon" else engine


def _with_export(steps: Mapping[str, StepConfig], out: Path, cloud: SageMakerConfig) -> Mapping[str, StepConfig]:
    made = next((step for step in WITH_HEADS if step in steps), None)
    form = exported_for(cloud)
    if made is None or form is None:
        return steps
    return {**steps, EXPORT: ExportConfig(model=str(out / made), format=form)}


def timestamp() -> str:
    """Now, as a part of names."""
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S")


def final_step(made: Collection[str]) -> str:
    """The step whose result is the chain's model: the tuned one, else the one with heads.

    Raises: CloudError when no step makes a model with heads.
    """
    for step in WITH_HEADS:
        if step in made:
            return step
    raise CloudError("no step of this recipe makes a model to deploy", field="sagemaker.endpoint", allowed="tune")


def result_uri(spec: JobSpec) -> str:
    """Where the service puts what a job left in model/, uncompressed."""
    return f"{spec.output}/{spec.name}/output/model"


def _channels(config: StepConfig, out: Path, jobs: Mapping[str, JobSpec]) -> list[Channel]:
    channels = []
    for setting in INPUTS:
        value = getattr(config, setting, None)
        if value is None:
            continue
        step = Path(value).name if Path(value).parent == out else ""
        if step in jobs:
            spec = jobs[step]
            source = result_uri(spec) if spec.resources is not None else str(Path(spec.output) / "model")
            channels.append(Channel(setting, source, job=step))
        elif value.startswith("s3://") or Path(value).exists():
            channels.append(Channel(setting, value))
        elif setting != "model":
            raise DataError(
                "no such file or directory, and no step of this recipe writes it", file=value, field=setting,
                hint="add the step that makes it, or give a local path or an s3:// address",
            )  # fmt: skip
    return channels  # a model that is none of these is a hub id, which the job fetches itself


def resources(cloud: SageMakerConfig, step: str) -> Resources:
    """The machine of a step."""
    wait = cloud.max_wait_s if cloud.max_wait_s is not None else 2 * cloud.max_runtime_s
    return Resources(
        instance_type=cloud.instance_types.get(step, cloud.instance_type),
        fallbacks=tuple(cloud.instance_fallbacks) if step not in cloud.instance_types else (),
        volume_gb=cloud.volume_gb, max_runtime_s=cloud.max_runtime_s, spot=cloud.spot,
        max_wait_s=wait if cloud.spot else None, keep_alive_s=cloud.keep_alive_s,
    )  # fmt: skip


def check_settings(cloud: SageMakerConfig, steps: Mapping[str, StepConfig]) -> None:
    """Raises ConfigError with all settings that the service would accept and then fail on, or bill for nothing."""
    problems = [
        f"'sagemaker.instance_types.{step}': {nearest(step, list(JOBS))}"
        for step in cloud.instance_types if step not in JOBS
    ]  # fmt: skip
    if cloud.spot and cloud.keep_alive_s:
        problems.append("'sagemaker.spot' and 'sagemaker.keep_alive_s' cannot be combined: no warm pools on spot")
    if cloud.spot and cloud.max_wait_s is not None and cloud.max_wait_s < cloud.max_runtime_s:
        problems.append(f"'sagemaker.max_wait_s' must be at least max_runtime_s ({cloud.max_runtime_s}), for spot")
    if not cloud.spot and cloud.max_wait_s is not None:
        problems.append("'sagemaker.max_wait_s' is for spot machines only")
    if bool(cloud.subnets) != bool(cloud.security_groups):
        problems.append("'sagemaker.subnets' and 'sagemaker.security_groups' go together")
    if len(cloud.instance_fallbacks) > 4:
        problems.append(f"'sagemaker.instance_fallbacks': {len(cloud.instance_fallbacks)} machines, at most 4")
    if cloud.network_isolation:
        problems += _isolated(cloud, steps)
    for key, value in cloud.environment.items():
        if len(value) > 512:
            problems.append(f"'sagemaker.environment.{key}': {len(value)} characters, at most 512 in a training job")
        if re.search(r"TOKEN|SECRET|PASSWORD|API_?KEY", key, re.IGNORECASE):
            problems.append(
                f"'sagemaker.environment.{key}' looks like a secret: everybody who may describe the job reads it; "
                "stage gated weights in S3 and give their s3:// address as the model"
            )
    if problems:
        raise ConfigError(problems, hint="docs/sagemaker.md lists the settings of the 'sagemaker' section")


def _isolated(cloud: SageMakerConfig, steps: Mapping[str, StepConfig]) -> list[str]:
    problems = []
    if cloud.image is None:
        problems.append("'sagemaker.network_isolation' needs an image of your own (see Dockerfile): pip has no network")
    hub = {
        str(value) for config in steps.values()
        if (value := getattr(config, "model", None)) and "/" in value and not value.startswith("s3://")
        and not Path(value).exists() and Path(value).name not in steps
    }  # fmt: skip
    problems += [f"'{name}' cannot be fetched under 'sagemaker.network_isolation'; stage it in S3" for name in hub]
    return problems
