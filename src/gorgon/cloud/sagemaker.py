"""Jobs as SageMaker's requests. Pure functions: a job and its place in, the parameters of an API call out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gorgon.cloud.config import SageMakerConfig
from gorgon.cloud.images import gpu_count, training_image
from gorgon.cloud.job import CODE, Channel, JobSpec
from gorgon.cloud.layout import OPT_ML
from gorgon.cloud.plan import Place
from gorgon.cloud.validate import service_model, validate
from gorgon.errors import CloudError
from gorgon.ranks import TOGETHER

START = f"{OPT_ML}/input/data/{CODE}/start.sh"
METRICS = {
    "loss": r"\bloss ([0-9.]+)",
    "top1": r"top-1 ([0-9.]+)",
    "tokens_per_step": r"([0-9.]+) tokens per step",
    "speedup": r"([0-9.]+) times as fast as plain",
}
"""Numbers that the service reads from our log lines and draws."""


@dataclass(frozen=True)
class Call:
    """An API call: botocore's names for service and operation, and the parameters."""

    service: str
    operation: str
    parameters: dict[str, Any]
    note: str = ""

    def document(self) -> dict[str, Any]:
        """For `--dry-run`."""
        shown = {"service": self.service, "operation": self.operation, "parameters": self.parameters}
        return {**shown, "note": self.note} if self.note else shown

    def checked(self) -> Call:
        """This call, after the service model has been asked about it.

        Raises: CloudError with everything that the service would refuse.
        """
        validate(service_model(self.service), self.operation, self.parameters)
        return self


def tags(cloud: SageMakerConfig, run: str, step: str) -> list[dict[str, str]]:
    """Tags of a resource: ours, by which `gorgon jobs` and `gorgon endpoints` find it, and the recipe's."""
    named = {"gorgon:run": run, "gorgon:step": step, **cloud.tags}
    return [{"Key": key, "Value": value} for key, value in named.items()]


def create_training_job(
    spec: JobSpec, cloud: SageMakerConfig, place: Place, *, run: str, code_uri: str, uploads: dict[str, str]
) -> Call:
    """The request that starts a job.

    Args:
        code_uri: prefix that holds wheel, start script and recipe.
        uploads: local path of an input -> the S3 prefix that it is uploaded to.
    Raises: CloudError when an instance type, image or value is one that the service would refuse.
    """
    machine = spec.resources
    if machine is None:
        raise CloudError("a job without a machine cannot run on SageMaker", field="resources", value=spec.name)
    check_gpus(spec.step, (machine.instance_type, *machine.fallbacks))
    image, extras = training_image(cloud.image, machine.instance_type, place.region)
    environment = {**spec.environment, **({"GORGON_EXTRAS": f"[{extras}]"} if extras else {})}
    if cloud.network_isolation:
        environment["GORGON_PIP_OPTIONS"] = "--no-index"
    code = Channel(CODE, code_uri)
    resource_config: dict[str, Any] = {"VolumeSizeInGB": machine.volume_gb}
    if machine.fallbacks:
        types = (machine.instance_type, *machine.fallbacks)
        resource_config["InstancePreferences"] = [
            {"InstanceType": name, "InstanceCount": machine.instance_count} for name in types
        ]
    else:
        resource_config |= {"InstanceType": machine.instance_type, "InstanceCount": machine.instance_count}
    if cloud.kms_key:
        resource_config["VolumeKmsKeyId"] = cloud.kms_key
    if machine.keep_alive_s:
        resource_config["KeepAlivePeriodInSeconds"] = machine.keep_alive_s
    parameters: dict[str, Any] = {
        "TrainingJobName": spec.name,
        "HyperParameters": spec.hyperparameters,
        "AlgorithmSpecification": {
            "TrainingImage": image,
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ["/bin/bash", START],
            "ContainerArguments": spec.argv(),
            "MetricDefinitions": [{"Name": name, "Regex": regex} for name, regex in METRICS.items()],
        },
        "RoleArn": place.role,
        "InputDataConfig": [_channel(c, uploads) for c in (*spec.channels, code)],
        "OutputDataConfig": {"S3OutputPath": spec.output, "CompressionType": "NONE"},
        "ResourceConfig": resource_config,
        "StoppingCondition": {"MaxRuntimeInSeconds": machine.max_runtime_s},
        "CheckpointConfig": {
            "S3Uri": f"{spec.output}/checkpoints", "LocalPath": f"{OPT_ML}/checkpoints",
        },
        "EnableManagedSpotTraining": machine.spot,
        "EnableNetworkIsolation": cloud.network_isolation,
        "EnableInterContainerTrafficEncryption": cloud.encrypt_traffic,
        "Environment": environment,
        "Tags": tags(cloud, run, spec.step),
    }  # fmt: skip
    if cloud.kms_key:
        parameters["OutputDataConfig"]["KmsKeyId"] = cloud.kms_key
    if machine.spot:
        parameters["StoppingCondition"]["MaxWaitTimeInSeconds"] = machine.max_wait_s
    if cloud.subnets:
        parameters["VpcConfig"] = {"Subnets": cloud.subnets, "SecurityGroupIds": cloud.security_groups}
    if not environment:
        del parameters["Environment"]
    return Call("sagemaker", "CreateTrainingJob", parameters).checked()


def check_gpus(step: str, instance_types: Sequence[str]) -> None:
    """Raises CloudError for a machine whose further GPUs the step would leave idle, at full price.

    A step that uses them all must find as many on every machine that it may get: its batch grows with their number,
    and so a checkpoint of another number is of no use to it.
    """
    counts = {name: max(1, gpu_count(name)) for name in instance_types}
    for name, gpus in counts.items():
        if gpus > 1 and step not in TOGETHER:
            raise CloudError(
                f"the step '{step}' uses one GPU and this machine has {gpus}", field="instance_type", value=name,
                allowed="a machine with one GPU",
                hint=f"give it one of its own: --set sagemaker.instance_types.{step}=ml.g6e.2xlarge (48 GB)",
            )  # fmt: skip
    if len(set(counts.values())) > 1:
        raise CloudError(
            "the machines have different numbers of GPUs, and the batch of a step depends on it",
            field="instance_fallbacks", value=counts, allowed=f"machines with {counts[instance_types[0]]}",
            hint="name machines of one kind, or lower the batch size and take one GPU",
        )  # fmt: skip


def _channel(channel: Channel, uploads: dict[str, str]) -> dict[str, Any]:
    return {
        "ChannelName": channel.name,
        "DataSource": {
            "S3DataSource": {
                "S3DataType": "S3Prefix",
                # the slash at the end keeps `.../data` from also taking `.../data-old`
                "S3Uri": uploads.get(channel.source, channel.source).rstrip("/") + "/",
                "S3DataDistributionType": "FullyReplicated",
            }
        },
        "InputMode": "File",
    }
