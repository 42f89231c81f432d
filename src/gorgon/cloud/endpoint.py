"""Endpoints as SageMaker's requests: model, configuration, endpoint and scaling. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from gorgon.cloud.config import EndpointConfig, SageMakerConfig
from gorgon.cloud.images import gpu_count, serving_image
from gorgon.cloud.plan import Place, resource_name
from gorgon.cloud.sagemaker import Call, tags
from gorgon.errors import CloudError

MODEL_DIR = "/opt/ml/model"
ADDITIONAL = "/opt/ml/additional-model-data-sources"
VARIANT = "main"
INFERENCE_ENVIRONMENT = 1024
"""Longest value of a model's environment variable; a training job's is half of that."""


@dataclass(frozen=True)
class EndpointSpec:
    """What is deployed.

    Args:
        name: of endpoint, configuration and model alike.
        model: S3 prefix of the model directory, or a hub id for a plain backbone.
        engine, image, ami: who serves it.
        artifact: S3 prefix of what belongs beside the model: the handler and wheel, or the exported heads.
        heads: number of heads, for engines that must be told.
        plain: decode without drafts, to compare.
    """

    name: str
    model: str
    settings: EndpointConfig
    image: str
    ami: str | None
    artifact: str | None = None
    heads: int | None = None
    plain: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def through_djl(self) -> bool:
        """True when our engine runs inside AWS's DJL container, which the artifact's handler needs."""
        return self.settings.engine == "gorgon" and "djl-inference" in self.image

    @property
    def model_in_s3(self) -> bool:
        """False for a hub id."""
        return self.model.startswith("s3://")


def endpoint_spec(
    name: str, model: str, settings: EndpointConfig, region: str, *, artifact: str | None = None,
    heads: int | None = None, plain: bool = False,
) -> EndpointSpec:  # fmt: skip
    """Checks an endpoint's settings against each other and picks its image.

    Raises: CloudError for an image that cannot serve the heads, several GPUs, or limits that contradict each other.
    """
    resource_name(name)
    image, ami = serving_image(settings.engine, settings.image, region)
    gpus = gpu_count(settings.instance_type)
    if gpus == 0 and settings.engine != "gorgon":
        raise CloudError(
            f"{settings.engine}'s container needs a GPU", field="endpoint.instance_type", value=settings.instance_type
        )
    if gpus > 1:
        raise CloudError(
            f"one engine uses one GPU and this machine has {gpus}", field="endpoint.instance_type",
            value=settings.instance_type, allowed="a machine with one GPU",
        )  # fmt: skip
    if settings.max_instances is not None and settings.max_instances < settings.instance_count:
        raise CloudError(
            "fewer machines at most than at the start", field="endpoint.max_instances", value=settings.max_instances,
            allowed=f"at least {settings.instance_count}",
        )  # fmt: skip
    if settings.max_input_tokens >= settings.max_total_tokens:
        raise CloudError(
            "a prompt of the longest kind leaves no room for an answer", field="endpoint.max_input_tokens",
            value=settings.max_input_tokens, allowed=f"below max_total_tokens ({settings.max_total_tokens})",
        )  # fmt: skip
    return EndpointSpec(name, model, settings, image, ami, artifact, heads, plain)


def environment(spec: EndpointSpec) -> dict[str, str]:
    """The container's variables for each engine.

    Raises: CloudError for a value that is too long.
    """
    settings = spec.settings
    local = MODEL_DIR if spec.artifact is None or not spec.through_djl else f"{ADDITIONAL}/model"
    model = local if spec.model_in_s3 else spec.model
    match settings.engine:
        case "gorgon":
            made = {"GORGON_MODEL": model, **({"GORGON_DRAFTS": "none"} if spec.plain else {})}
        case "vllm":
            made = {
                "SM_VLLM_MODEL": f"{MODEL_DIR}/base-model" if spec.model_in_s3 else spec.model,
                "SM_VLLM_MAX_MODEL_LEN": str(settings.max_total_tokens),
            }
            if not spec.plain:
                # one column of drafts per head: vLLM's proposer returns as many as there are heads
                made["SM_VLLM_SPECULATIVE_CONFIG"] = json.dumps(
                    {"method": "medusa", "model": f"{ADDITIONAL}/heads", "num_speculative_tokens": spec.heads}
                )
        case "tgi":
            made = {
                "HF_MODEL_ID": model + ("/base-model" if spec.plain and spec.model_in_s3 else ""), "SM_NUM_GPUS": "1",
                "MAX_INPUT_TOKENS": str(settings.max_input_tokens), "MAX_TOTAL_TOKENS": str(settings.max_total_tokens),
            }  # fmt: skip
    made |= settings.environment
    for key, value in made.items():
        if len(value) > INFERENCE_ENVIRONMENT:
            raise CloudError(
                f"the variable is {len(value)} characters long", field=f"endpoint.environment.{key}",
                allowed=f"at most {INFERENCE_ENVIRONMENT}",
            )  # fmt: skip
    return made


def create_calls(spec: EndpointSpec, cloud: SageMakerConfig, place: Place, *, run: str) -> list[Call]:
    """CreateModel, CreateEndpointConfig, CreateEndpoint, and scaling if it is wanted, in this order."""
    settings, labels = spec.settings, [{"Key": k, "Value": v} for k, v in spec.labels.items()]
    labels = [*tags(cloud, run, "endpoint"), *labels]
    container: dict[str, object] = {"Image": spec.image, "Environment": environment(spec)}
    sources = []
    if spec.through_djl and spec.artifact:
        container["ModelDataSource"] = {"S3DataSource": _prefix(spec.artifact)}
        if spec.model_in_s3:
            sources.append({"ChannelName": "model", "S3DataSource": _prefix(spec.model)})
    elif spec.model_in_s3:
        container["ModelDataSource"] = {"S3DataSource": _prefix(spec.model)}
        if spec.artifact:
            sources.append({"ChannelName": "heads", "S3DataSource": _prefix(spec.artifact)})
    if sources:
        container["AdditionalModelDataSources"] = sources
    model: dict[str, object] = {
        "ModelName": spec.name, "ExecutionRoleArn": place.role, "PrimaryContainer": container, "Tags": labels,
        "EnableNetworkIsolation": cloud.network_isolation,
    }  # fmt: skip
    if cloud.subnets:
        model["VpcConfig"] = {"Subnets": cloud.subnets, "SecurityGroupIds": cloud.security_groups}
    variant: dict[str, object] = {
        "VariantName": VARIANT, "ModelName": spec.name, "InitialInstanceCount": settings.instance_count,
        "ContainerStartupHealthCheckTimeoutInSeconds": settings.health_check_s,
        "ModelDataDownloadTimeoutInSeconds": settings.download_s,
        "RoutingConfig": {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"},
    }  # fmt: skip
    if settings.instance_fallbacks:
        machines = [settings.instance_type, *settings.instance_fallbacks]
        variant["InstancePools"] = [{"InstanceType": m, "Priority": n} for n, m in enumerate(machines, start=1)]
    else:
        variant["InstanceType"] = settings.instance_type
    if spec.ami and gpu_count(settings.instance_type):
        variant["InferenceAmiVersion"] = spec.ami
    config: dict[str, object] = {"EndpointConfigName": spec.name, "ProductionVariants": [variant], "Tags": labels}
    if cloud.kms_key:
        config["KmsKeyId"] = cloud.kms_key
    if settings.data_capture:
        config["DataCaptureConfig"] = {
            "EnableCapture": True, "InitialSamplingPercentage": 100,
            "DestinationS3Uri": place.uri(run, "data-capture"),
            "CaptureOptions": [{"CaptureMode": "Input"}, {"CaptureMode": "Output"}],
        }  # fmt: skip
    calls = [
        Call("sagemaker", "CreateModel", model),
        Call("sagemaker", "CreateEndpointConfig", config),
        Call(
            "sagemaker", "CreateEndpoint", {"EndpointName": spec.name, "EndpointConfigName": spec.name, "Tags": labels}
        ),
    ]
    return [call.checked() for call in (*calls, *scaling_calls(spec))]


def scaling_calls(spec: EndpointSpec) -> list[Call]:
    """Scaling on concurrent requests, which is what fills an engine; none unless `max_instances` asks for it."""
    settings = spec.settings
    if settings.max_instances is None or settings.max_instances == settings.instance_count:
        return []
    target = scalable_target(spec.name)
    metric = {"PredefinedMetricType": "SageMakerVariantConcurrentRequestsPerModelHighResolution"}
    return [
        Call(
            "application-autoscaling", "RegisterScalableTarget",
            {**target, "MinCapacity": settings.instance_count, "MaxCapacity": settings.max_instances},
        ),
        Call(
            "application-autoscaling", "PutScalingPolicy",
            {
                "PolicyName": spec.name, **target, "PolicyType": "TargetTrackingScaling",
                "TargetTrackingScalingPolicyConfiguration": {
                    "TargetValue": float(settings.requests_per_instance), "PredefinedMetricSpecification": metric,
                    "ScaleInCooldown": 300, "ScaleOutCooldown": 60,
                },
            },
        ),
    ]  # fmt: skip


def scalable_target(name: str) -> dict[str, str]:
    """An endpoint's variant as application autoscaling names it."""
    return {
        "ServiceNamespace": "sagemaker", "ResourceId": f"endpoint/{name}/variant/{VARIANT}",
        "ScalableDimension": "sagemaker:variant:DesiredInstanceCount",
    }  # fmt: skip


def delete_calls(name: str, *, scaled: bool = False) -> list[Call]:
    """What takes an endpoint away, all of it: scaling, endpoint, configuration, model."""
    calls = [Call("application-autoscaling", "DeregisterScalableTarget", {**scalable_target(name)})] if scaled else []
    calls += [
        Call("sagemaker", "DeleteEndpoint", {"EndpointName": name}),
        Call("sagemaker", "DeleteEndpointConfig", {"EndpointConfigName": name}),
        Call("sagemaker", "DeleteModel", {"ModelName": name}),
    ]
    return [call.checked() for call in calls]


def dry_calls(
    cloud: SageMakerConfig, place: Place, *, run: str, stamp: str, model_uri: str, base: str
) -> list[Call]:  # fmt: skip
    """The calls that deploy a recipe's endpoint, or the three that are compared, watch, use and delete them."""
    settings = cloud.endpoint
    if settings is None:
        return []
    wanted = {resource_name("gorgon", run, stamp): (model_uri, False)}
    if settings.compare:
        wanted = {
            f"base-{stamp}": (base, True),
            f"sft-{stamp}": (model_uri, True),
            f"medusa-{stamp}": (model_uri, False),
        }
    calls, gone = [], []
    for name, (model, plain) in wanted.items():
        artifact = None if settings.engine == "tgi" else place.uri("deploy", name, "serving")
        spec = endpoint_spec(name, model, settings, place.region, heads=1, artifact=artifact, plain=plain)
        calls += create_calls(spec, cloud, place, run=run)
        calls.append(Call("sagemaker", "DescribeEndpoint", {"EndpointName": name}, note="until it is InService"))
        body = json.dumps({"messages": [{"role": "user", "content": "..."}], "max_tokens": 256})
        invoke = {"EndpointName": name, "ContentType": "application/json", "Body": body}
        how, when = ("InvokeEndpoint", "once a prompt and trial") if settings.compare else (
            "InvokeEndpointWithResponseStream", "as you use it"
        )  # fmt: skip
        calls.append(Call("sagemaker-runtime", how, invoke, note=when))
        gone += delete_calls(name, scaled=settings.max_instances is not None)
    if settings.compare:
        note = "after the comparison, whatever happens"
    elif settings.delete_after_minutes is not None:
        note = f"after {settings.delete_after_minutes} minutes"
    else:
        note = "when you say so: gorgon endpoints delete NAME"
    return calls + [replace(call, note=note) for call in gone]


def artifact_files(wheel: Path, assets: Path) -> dict[str, Path | str]:
    """What the DJL container finds in /opt/ml/model: the handler, its settings, and our wheel, installed offline."""
    return {
        "serving.properties": assets / "djl" / "serving.properties", "model.py": assets / "djl" / "model.py",
        "requirements.txt": f"{MODEL_DIR}/local_wheels/{wheel.name}[serve]\n", f"local_wheels/{wheel.name}": wheel,
    }  # fmt: skip


def _prefix(uri: str) -> dict[str, str]:
    return {"S3Uri": uri.rstrip("/") + "/", "S3DataType": "S3Prefix", "CompressionType": "None"}
