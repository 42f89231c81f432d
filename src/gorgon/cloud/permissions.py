"""Least-privilege IAM policies for a recipe: for whoever runs it, and for the role that its jobs run under."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from gorgon.cloud.config import SageMakerConfig
from gorgon.cloud.images import DLC_ACCOUNT
from gorgon.cloud.plan import Place, resource_name, split_uri

Statement = dict[str, Any]


def policies(cloud: SageMakerConfig, place: Place, *, run: str, inputs: Collection[str] = ()) -> dict[str, Any]:
    """`caller`, `execution_role` and `trust`: three IAM policy documents.

    Args: inputs: S3 addresses that the recipe reads and that lie elsewhere.
    """
    reading = _inputs(place, inputs)
    return {
        "caller": _policy([*_caller(cloud, place, run), *reading]),
        "execution_role": _policy([*_execution_role(cloud, place), *reading]),
        "trust": _policy([_trust(place)]),
    }


def _policy(statements: list[Statement]) -> dict[str, Any]:
    return {"Version": "2012-10-17", "Statement": statements}


def _allow(name: str, actions: list[str], resource: str | list[str], **condition: Any) -> Statement:
    statement: Statement = {"Sid": name, "Effect": "Allow", "Action": actions, "Resource": resource}
    return {**statement, "Condition": condition} if condition else statement


def _caller(cloud: SageMakerConfig, place: Place, run: str) -> list[Statement]:
    arn = f"arn:{_partition(place.region)}"
    sagemaker = f"{arn}:sagemaker:{place.region}:{place.account}"
    named = [f"{sagemaker}:training-job/{_lower(resource_name(run))}-*"]
    if cloud.endpoint:
        named += [f"{sagemaker}:{kind}/gorgon-*" for kind in ("model", "endpoint-config", "endpoint")]
    jobs = ["CreateTrainingJob", "DescribeTrainingJob", "StopTrainingJob", "AddTags", "ListTags"]
    endpoints = [
        f"{verb}{kind}" for kind in ("Model", "EndpointConfig", "Endpoint") for verb in ("Create", "Describe", "Delete")
    ] + ["InvokeEndpoint", "InvokeEndpointWithResponseStream"]
    logs = [f"{arn}:logs:{place.region}:{place.account}:log-group:/aws/sagemaker/{group}*" for group in
            ("TrainingJobs", *(("Endpoints",) if cloud.endpoint else ()))]  # fmt: skip
    statements = [
        _allow("Jobs", [f"sagemaker:{a}" for a in (*jobs, *(endpoints if cloud.endpoint else ()))], named),
        _allow("Lists", ["sagemaker:ListTrainingJobs", *(["sagemaker:ListEndpoints"] if cloud.endpoint else [])], "*"),
        _allow(
            "HandOverRole", ["iam:PassRole"], place.role,
            StringEquals={"iam:PassedToService": "sagemaker.amazonaws.com"},
        ),
        _allow("Logs", ["logs:DescribeLogStreams", "logs:GetLogEvents"], logs),
        *_s3(place),
        _allow("Doctor", ["iam:GetRole"], place.role),
        _allow("DoctorImages", ["ecr:BatchGetImage"], _repositories(place)),
        _allow("Prices", ["pricing:GetProducts", "servicequotas:ListServiceQuotas"], "*"),
    ]  # fmt: skip
    if cloud.endpoint is not None and cloud.endpoint.max_instances is not None:
        scaling = ["RegisterScalableTarget", "PutScalingPolicy", "DeregisterScalableTarget"]
        # autoscaling acts for the caller: it makes the alarms of a policy, and once in an account its own role
        alarms = ["cloudwatch:PutMetricAlarm", "cloudwatch:DescribeAlarms", "cloudwatch:DeleteAlarms"]
        scaled = "sagemaker.application-autoscaling.amazonaws.com"
        statements += [
            _allow("Scaling", [f"application-autoscaling:{a}" for a in scaling], "*"),
            _allow("ScalingAlarms", alarms, "*"),
            _allow("ScalingCapacity", ["sagemaker:UpdateEndpointWeightsAndCapacities"], named[1:]),
            _allow("ScalingRole", ["iam:CreateServiceLinkedRole"], "*",
                   StringEquals={"iam:AWSServiceName": scaled}),
        ]  # fmt: skip
    if cloud.kms_key:
        statements.append(_key(["kms:CreateGrant", "kms:DescribeKey"], cloud.kms_key, place))
    return statements


def _execution_role(cloud: SageMakerConfig, place: Place) -> list[Statement]:
    arn = f"arn:{_partition(place.region)}"
    pull = ["ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer", "ecr:BatchCheckLayerAvailability"]
    logs = ["logs:CreateLogGroup", "logs:CreateLogStream", "logs:PutLogEvents", "logs:DescribeLogStreams"]
    statements = [
        *_s3(place),
        _allow("ImageToken", ["ecr:GetAuthorizationToken"], "*"),
        _allow("Images", pull, _repositories(place)),
        _allow("Logs", logs, f"{arn}:logs:{place.region}:{place.account}:log-group:/aws/sagemaker/*"),
        _allow(
            "Metrics", ["cloudwatch:PutMetricData"], "*",
            StringLike={"cloudwatch:namespace": ["/aws/sagemaker/*", "SageMaker"]},
        ),
    ]  # fmt: skip
    if cloud.subnets:
        network = [
            "CreateNetworkInterface", "CreateNetworkInterfacePermission", "DeleteNetworkInterface",
            "DeleteNetworkInterfacePermission", "DescribeNetworkInterfaces", "DescribeVpcs", "DescribeDhcpOptions",
            "DescribeSubnets", "DescribeSecurityGroups",
        ]  # fmt: skip
        statements.append(_allow("Network", [f"ec2:{a}" for a in network], "*"))
    if cloud.kms_key:
        key = ["kms:Encrypt", "kms:Decrypt", "kms:GenerateDataKey", "kms:CreateGrant", "kms:DescribeKey"]
        statements.append(_key(key, cloud.kms_key, place))
    return statements


def _s3(place: Place) -> list[Statement]:
    bucket = f"arn:{_partition(place.region)}:s3:::{place.bucket}"
    below = f"{place.prefix.strip('/')}/*"
    return [
        _allow("Bucket", ["s3:ListBucket"], bucket, StringLike={"s3:prefix": [below]}),
        _allow(
            "Objects", ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"],
            f"{bucket}/{below}",
        ),
    ]  # fmt: skip


def _inputs(place: Place, uris: Collection[str]) -> list[Statement]:
    """Reading of what the recipe names elsewhere in S3, a bucket at a time."""
    found: dict[str, list[str]] = {}
    for bucket, key in sorted(split_uri(uri.rstrip("/")) for uri in set(uris)):
        if not (bucket == place.bucket and f"{key}/".startswith(f"{place.prefix.strip('/')}/")):
            found.setdefault(bucket, []).append(key)
    arn = f"arn:{_partition(place.region)}:s3:::"
    statements = []
    for number, (bucket, keys) in enumerate(found.items(), start=1):
        below = [f"{key}/*" for key in keys]
        statements += [
            _allow(f"InputBucket{number}", ["s3:ListBucket"], f"{arn}{bucket}", StringLike={"s3:prefix": below}),
            _allow(f"InputObjects{number}", ["s3:GetObject"], [f"{arn}{bucket}/{pattern}" for pattern in below]),
        ]
    return statements


def _repositories(place: Place) -> list[str]:
    arn = f"arn:{_partition(place.region)}"
    return [f"{arn}:ecr:{place.region}:{account}:repository/*" for account in sorted({DLC_ACCOUNT, place.account})]


def _trust(place: Place) -> Statement:
    return {
        "Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}, "Action": "sts:AssumeRole",
        "Condition": {"StringEquals": {"aws:SourceAccount": place.account}},
    }  # fmt: skip


def _key(actions: list[str], key: str, place: Place) -> Statement:
    """Use of a key, by its ARN, its id, or an alias: policies name a key behind an alias by a condition."""
    keys = f"arn:{_partition(place.region)}:kms:{place.region}:{place.account}:key/"
    alias = key.rpartition(":")[2]
    if alias.startswith("alias/"):
        return _allow("Key", actions, f"{keys}*", **{"ForAnyValue:StringEquals": {"kms:ResourceAliases": alias}})
    return _allow("Key", actions, key if key.startswith("arn:") else f"{keys}{key}")


def _partition(region: str) -> str:
    return "aws-cn" if region.startswith("cn-") else "aws-us-gov" if region.startswith("us-gov-") else "aws"


def _lower(name: str) -> str:
    return name.lower()  # ARNs of SageMaker's resources are in lower case
