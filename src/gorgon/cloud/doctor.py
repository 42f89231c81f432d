"""What a run needs of an AWS account, checked before anything is started; each finding with the next step to take."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from gorgon.cloud.aws import ROLE_VARIABLE, Aws, AwsError, execution_role
from gorgon.cloud.config import SageMakerConfig
from gorgon.cloud.images import serving_image, training_image
from gorgon.cloud.job import EXPORT
from gorgon.cloud.plan import Place, exported_for
from gorgon.errors import CloudError

ENDPOINT_USE = " for endpoint usage"


@dataclass(frozen=True)
class Finding:
    """One check: ok is None when it could not be made."""

    check: str
    ok: bool | None
    detail: str
    advice: str = ""


def examine(cloud: SageMakerConfig, steps: Collection[str]) -> Iterator[Finding]:
    """All checks, in the order in which a run would need their answers; the later ones need the earlier ones.

    Args: steps: names of the recipe's steps.
    """
    try:
        aws = Aws(cloud.region)
        aws.client("sagemaker")
    except CloudError as error:
        yield Finding("region", False, str(error), error.hint or "")
        return
    yield Finding("region", True, aws.region)
    try:
        identity = aws.identity()
    except CloudError as error:
        yield Finding("credentials", False, str(error), error.hint or "")
        return
    yield Finding("credentials", True, identity["Arn"])
    try:
        role = execution_role(cloud, aws, identity["Arn"])
    except AwsError:  # may not look itself up: the check of the role says so
        role = None
    bucket = cloud.bucket or f"sagemaker-{aws.region}-{identity['Account']}"
    place = Place(aws.region, identity["Account"], role or "", bucket, cloud.prefix)
    jobs = machines(cloud, steps)
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "role": lambda: _role(aws, place),
        "bucket": lambda: _bucket(aws, place),
        "image": lambda: _images(aws, cloud, place, jobs),
        "quota": lambda: _quotas(aws, cloud, jobs),
    }
    for name, check in checks.items():
        yield from _checked(name, check)


def _checked(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except AwsError as error:
        denied = "AccessDenied" in error.code or "not authorized" in str(error)
        yield Finding(name, None if denied else False, str(error), error.hint or "")
    except CloudError as error:
        yield Finding(name, False, str(error), error.hint or "")


def _role(aws: Aws, place: Place) -> Iterator[Finding]:
    if not place.role:
        yield Finding(
            "role", False, "no execution role is named", f"set sagemaker.role in the recipe or {ROLE_VARIABLE}"
        )
        return
    trust = aws.call("iam", "get_role", RoleName=place.role.rpartition("/")[2])["Role"]["AssumeRolePolicyDocument"]
    trusted = "sagemaker.amazonaws.com" in json.dumps(trust)
    advice = "" if trusted else "its trust policy must name sagemaker.amazonaws.com: `gorgon iam-policy RECIPE`"
    yield Finding("role", trusted, place.role, advice)


def _bucket(aws: Aws, place: Place) -> Iterator[Finding]:
    try:
        aws.call("s3", "list_objects_v2", Bucket=place.bucket, Prefix=f"{place.prefix.strip('/')}/", MaxKeys=1)
    except AwsError as error:
        missing = error.code in ("404", "NoSuchBucket")
        advice = f"aws s3 mb s3://{place.bucket} --region {place.region}" if missing else (error.hint or "")
        detail = f"{place.bucket} does not exist" if missing else f"{place.bucket}: {error}"
        yield Finding("bucket", False, detail, advice)
        return
    yield Finding("bucket", True, place.bucket)


def _images(aws: Aws, cloud: SageMakerConfig, place: Place, jobs: list[str]) -> Iterator[Finding]:
    uris = [training_image(cloud.image, machine, place.region)[0] for machine in jobs]
    if cloud.endpoint is not None:
        uris.append(serving_image(cloud.endpoint.engine, cloud.endpoint.image, place.region)[0])
    for uri in dict.fromkeys(uris):
        registry, _, rest = uri.partition("/")
        repository, _, tag = rest.partition(":")
        repository = repository.partition("@")[0]
        image = {"imageDigest": uri.partition("@")[2]} if "@" in uri else {"imageTag": tag}
        try:
            found = aws.call(
                "ecr", "batch_get_image", registryId=registry.partition(".")[0], repositoryName=repository,
                imageIds=[image],
            )  # fmt: skip
        except CloudError as error:
            yield Finding("image", None, f"{uri}: {error}", error.hint or "")
            continue
        ok = bool(found.get("images"))
        yield Finding("image", ok, uri, "" if ok else "this tag is not in the region's registry: choose another image")


def _quotas(aws: Aws, cloud: SageMakerConfig, jobs: list[str]) -> Iterator[Finding]:
    use = "spot training job usage" if cloud.spot else "training job usage"
    needed = [f"{machine} for {use}" for machine in jobs]
    if cloud.keep_alive_s:
        needed += [f"{machine} for training warm pool usage" for machine in jobs]
    serving = 0
    if cloud.endpoint is not None:
        needed.append(f"{cloud.endpoint.instance_type}{ENDPOINT_USE}")
        serving = cloud.endpoint.instance_count * (3 if cloud.endpoint.compare else 1)
    quotas = {
        quota["QuotaName"]: quota
        for quota in aws.pages("service-quotas", "list_service_quotas", "Quotas", ServiceCode="sagemaker")
    }
    for name in needed:
        quota = quotas.get(name)
        if quota is None:
            yield Finding("quota", None, f"{name}: not listed", "look under Service Quotas, Amazon SageMaker")
            continue
        wanted = serving if name.endswith(ENDPOINT_USE) else 1
        ok = quota["Value"] >= wanted
        ask = (
            "aws service-quotas request-service-quota-increase --service-code sagemaker "
            f"--quota-code {quota['QuotaCode']} --desired-value {wanted}"
        )
        yield Finding("quota", ok, f"{name}: {quota['Value']:g}", "" if ok else ask)


def machines(cloud: SageMakerConfig, steps: Collection[str]) -> list[str]:
    """The machines that a recipe's jobs may take, each once.

    Args: steps: names of the recipe's steps.
    """
    jobs = [*steps, *([EXPORT] if exported_for(cloud) else [])]
    chosen = [cloud.instance_types.get(job, cloud.instance_type) for job in jobs]
    return list(dict.fromkeys([*chosen, *cloud.instance_fallbacks]))
