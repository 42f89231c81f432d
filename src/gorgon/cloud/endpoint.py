"""Endpoints as SageMaker's requests: model, configuration, endpoint and scaling. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gorgon.cloud.config import EndpointConfig, SageMakerConfig
from gorgon.cloud.images import gpu_count, serving_image
from gorgon.cloud.plan import Place, resource_name, split_uri
from gorgon.cloud.sagemaker import Call, tags
from gorgon.errors import CloudError

MODEL_DIR = "/opt/ml/model"
BASE_CONFIG = "base-model/config.json"
ADDITIONAL = "/opt/ml/additional-model-data-sources"
VARIANT = "main"
INFERENCE_ENVIRONMENT = 1024
"""Longest value of a model's environment variable; a training job's is half of that."""
TOTAL_TOKENS = 2048
"""Prompt and answer of vLLM and TGI unless the recipe says otherwise: they reserve memory for it when they start."""


@dataclass(frozen=True)
class EndpointSpec:
    """What is deployed.

    Args:
        name: of endpoint, configuration and model alike.
        model: S3 prefix of the model directory, or a hub id for a plain backbone.
        engine, image, ami: who serves it.
        artifact: S3 prefix of what belongs beside the model: the handler and wheel, or the exported heads.
        heads: number of heads, for engines that must be told.
        context: longest context of the model itself, in tokens; None where it cannot be looked up.
        plain: decode without drafts, to compare.
        nested: the backbone lies in the model's directory base-model, as beside heads.
    """

    name: str
    model: str
    settings: EndpointConfig
    image: str
    ami: str | None
    artifact: str | None = None
    heads: int | None = None
    context: int | None = None
    plain: bool = False
    nested: bool = True
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def through_djl(self) -> bool:
        """True when our engine runs inside AWS's DJL container, which the artifact's handler needs."""
        return self.settings.engine == "gorgon" and "djl-inference" in self.image

    @property
    def model_in_s3(self) -> bool:
        """False for a hub id."""
        return self.model.startswith("s3://")

    @property
    def backbone(self) -> str:
        """Where the container finds the weights without heads, or their hub id."""
        if not self.model_in_s3:
            return self.model
        return f"{MODEL_DIR}/base-model" if self.nested else MODEL_DIR


def endpoint_spec(
    name: str, model: str, settings: EndpointConfig, region: str, *, artifact: str | None = None,
    heads: int | None = None, context: int | None = None, plain: bool = False,
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
    limits(settings, context)
    return EndpointSpec(name, model, settings, image, ami, artifact, heads, context, plain)


def limits(settings: EndpointConfig, context: int | None = None) -> dict[str, str]:
    """The variables by which an engine is told how long a prompt, and prompt and answer together, may be.

    Args: context: the model's own, if it is known.
    Raises: CloudError for limits that contradict each other or the model, that are given twice, or that the engine
        does not have.
    """
    total, prompt = settings.max_total_tokens, settings.max_input_tokens
    if total is not None and context is not None and total > context:
        raise CloudError(
            "the model's own context is shorter", field="endpoint.max_total_tokens", value=total,
            allowed=f"at most {context}",
        )  # fmt: skip
    if settings.engine == "vllm" and prompt is not None:
        raise CloudError(
            "vLLM has no limit for the prompt alone", field="endpoint.max_input_tokens", value=prompt, allowed="null",
            hint="max_total_tokens limits prompt and answer together; gorgon and tgi know both limits",
        )  # fmt: skip
    if settings.engine != "gorgon" and total is None:
        total = min(TOTAL_TOKENS, context or TOTAL_TOKENS)
    room = total if total is not None else context
    if prompt is not None and room is not None and prompt >= room:
        raise CloudError(
            "a prompt of the longest kind leaves no room for an answer", field="endpoint.max_input_tokens",
            value=prompt, allowed=f"below max_total_tokens ({room})",
        )  # fmt: skip
    match settings.engine:
        case "gorgon":
            told = {"GORGON_CONTEXT": total, "GORGON_MAX_PROMPT": prompt}
        case "vllm":
            told = {"SM_VLLM_MAX_MODEL_LEN": total}
        case "tgi":  # wants both
            told = {"MAX_INPUT_TOKENS": prompt or (total or TOTAL_TOKENS) // 2, "MAX_TOTAL_TOKENS": total}
    twice = sorted(told.keys() & settings.environment.keys())
    if twice and (prompt is not None or settings.max_total_tokens is not None):
        raise CloudError(
            "this limit is given twice", field=f"endpoint.environment.{twice[0]}",
            value=settings.environment[twice[0]], hint="keep endpoint.max_total_tokens and endpoint.max_input_tokens",
        )  # fmt: skip
    return {name: str(value) for name, value in told.items() if value is not None}


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
            made = {"SM_VLLM_MODEL": spec.backbone}
            if not spec.plain:
                # one column of drafts per head: vLLM's proposer returns as many as there are heads
                heads = f"{ADDITIONAL}/heads" if spec.artifact else MODEL_DIR  # beside an exported backbone
                made["SM_VLLM_SPECULATIVE_CONFIG"] = json.dumps(
                    {"method": "medusa", "model": heads, "num_speculative_tokens": spec.heads}
                )
        case "tgi":
            made = {"HF_MODEL_ID": spec.backbone if spec.plain else model, "SM_NUM_GPUS": "1"}
    made |= limits(settings, spec.context) | settings.environment
    for key, value in made.items():
        if len(value) > INFERENCE_ENVIRONMENT:
            raise CloudError(
                f"the variable is {len(value)} characters long", field=f"endpoint.environment.{key}",
                allowed=f"at most {INFERENCE_ENVIRONMENT}",
            )  # fmt: skip
    return made


def compared_names(stamp: str) -> tuple[str, str, str]:
    """Names of the endpoints that a comparison makes: base, fine-tuned, Medusa."""
    return f"gorgon-base-{stamp}", f"gorgon-sft-{stamp}", f"gorgon-medusa-{stamp}"


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


def ending_calls(name: str) -> list[Call]:
    """What `gorgon endpoints delete` does: looks the endpoint up, takes all of it away, and waits until it is gone."""
    return [
        Call("sagemaker", "DescribeEndpoint", {"EndpointName": name}),
        Call("sagemaker", "DescribeEndpointConfig", {"EndpointConfigName": name}),
        *delete_calls(name, scaled=True),
        Call("sagemaker", "DescribeEndpoint", {"EndpointName": name}),
    ]


def reading_calls(model: str) -> list[Call]:
    """What is read of a model in S3 before an endpoint is made of it: that it is whole, and its description."""
    bucket, key = split_uri(model.rstrip("/"))
    listed = Call("s3", "ListObjectsV2", {"Bucket": bucket, "Prefix": f"{key}/"}, note="the model must be whole")
    return [
        listed,
        *get_calls([f"{model.rstrip('/')}/{name}" for name in ("manifest.json", "config.json", BASE_CONFIG)]),
    ]


def get_calls(uris: Sequence[str]) -> list[Call]:
    """GetObject of S3 addresses."""
    found = [split_uri(uri) for uri in uris]
    return [Call("s3", "GetObject", {"Bucket": bucket, "Key": key}) for bucket, key in found]


def artifact_files(wheel: Path, assets: Path) -> dict[str, Path | str]:
    """What the DJL container finds in /opt/ml/model: the handler, its settings, and our wheel, installed offline."""
    return {
        "serving.properties": assets / "djl" / "serving.properties", "model.py": assets / "djl" / "model.py",
        "requirements.txt": f"{MODEL_DIR}/local_wheels/{wheel.name}[serve]\n", f"local_wheels/{wheel.name}": wheel,
    }  # fmt: skip


def _prefix(uri: str) -> dict[str, str]:
    return {"S3Uri": uri.rstrip("/") + "/", "S3DataType": "S3Prefix", "CompressionType": "None"}
