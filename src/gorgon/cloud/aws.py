"""The way to AWS: clients, who we are, and AWS's errors as ours with the next step to take."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from gorgon.cloud.config import SageMakerConfig
from gorgon.cloud.plan import Place
from gorgon.cloud.validate import validate
from gorgon.errors import CloudError, MissingDependencyError

ROLE_VARIABLE = "GORGON_SAGEMAKER_ROLE"
UNKNOWN_ACCOUNT = "000000000000"
FALLBACK_REGION = "us-east-1"
SIGN_IN = "sign in again (`aws sso login` or new keys)"

HINTS: tuple[tuple[str, str], ...] = (
    (r"ExpiredToken|token.*expired|RequestExpired", f"{SIGN_IN}; a job that runs goes on, and "
     "`gorgon jobs attach NAME` shows it again"),
    (r"InvalidClientTokenId|UnrecognizedClient|SignatureDoesNotMatch|InvalidAccessKeyId",
     "these credentials are not known to AWS: check the profile and its keys"),
    (r"iam:PassRole", "the caller may not hand this role to SageMaker: see `gorgon iam-policy RECIPE`"),
    (r"ResourceLimitExceeded|service limit|quota", "ask for more under Service Quotas, Amazon SageMaker; training, "
     "spot training, endpoint and warm pool usage are separate quotas of the same machine; `gorgon doctor` names them"),
    (r"InsufficientInstanceCapacity|CapacityError|Insufficient capacity|InsufficientCapacity",
     "there are no such machines free now: name others in sagemaker.instance_fallbacks, take another region, or wait"),
    (r"AccessDenied|Access Denied|not authorized|UnauthorizedOperation",
     "`gorgon iam-policy RECIPE` prints the policies that caller and role need"),
    (r"CannotPullContainer|pull.*image|image.*not (found|exist)|RepositoryNotFound|ImageNotFound|ecr:",
     "the image is not there, or the execution role may not pull it: check its region and tag"),
    (r"NoSuchBucket", "the bucket does not exist in this account: `aws s3 mb s3://NAME`, or set sagemaker.bucket"),
    (r"No S3 objects found|NoSuchKey|empty", "the S3 prefix is empty: has the step that writes it finished?"),
    (r"(assume|validate).*role|role.*(not|cannot be) (exist|found|assumed)|RoleArn",
     "the execution role must exist and trust sagemaker.amazonaws.com: `gorgon iam-policy RECIPE` prints its policy"),
    (r"ping health check", "the server did not answer in time: read its log above; a big model may need a larger "
     "endpoint.health_check_s, and CUDA errors a newer host image"),
    (r"MaxRuntimeExceeded|maximum runtime", "raise sagemaker.max_runtime_s; the same command goes on from there"),
    (r"MaxWaitTimeExceeded", "no spot machine came in time: raise sagemaker.max_wait_s or set spot to false"),
    (r"InstallError", "the job could not install Gorgon: does the subnet reach PyPI? Or use an image of your own "
     "(see Dockerfile)"),
    (r"CUDA out of memory|OutOfMemory", "take a machine with more GPU memory, or a smaller batch_size"),
    (r"Throttling|Rate exceeded|TooManyRequests", "AWS asks to slow down; try again in a minute"),
    (r"already exists|ResourceInUse|Cannot create already existing", "the name is taken: choose another one"),
    (r"Could not find|does not exist|of account \d+ not found|resource not found|RecordNotFound|ResourceNotFound",
     "`gorgon jobs list` and `gorgon endpoints list` show what there is in this region"),
)  # fmt: skip
"""What AWS's words mean for the user, the first match first."""


def hint_for(text: str) -> str | None:
    """The next step to take for an AWS error or a FailureReason, if we know one."""
    return next((hint for pattern, hint in HINTS if re.search(pattern, text, re.IGNORECASE)), None)


class Aws:
    """Clients of one region, made when they are first needed."""

    def __init__(self, region: str | None = None) -> None:
        try:
            import boto3
        except ImportError as error:
            raise MissingDependencyError(
                "SageMaker needs boto3", field="boto3", hint="pip install 'gorgon-llm[sagemaker]'"
            ) from error
        self.session = boto3.session.Session(region_name=region)
        if self.session.region_name is None:
            raise CloudError(
                "no AWS region is set", field="sagemaker.region",
                hint="set sagemaker.region in the recipe, AWS_DEFAULT_REGION, or a region in the AWS profile",
            )  # fmt: skip
        self.region: str = self.session.region_name

    @lru_cache  # noqa: B019 - one object per command
    def client(self, service: str, config: Any = None) -> Any:
        """A boto3 client.

        Args: config: botocore's settings; unless given, timeouts of a minute and botocore's standard retries.
        Raises: CloudError for a region that the service is not in.
        """
        from botocore.config import Config
        from botocore.exceptions import UnknownRegionError

        region = FALLBACK_REGION if service == "pricing" else self.region  # the price list is served from there
        try:
            partition = self.session.get_partition_for_region(self.region)
        except UnknownRegionError:
            partition = "aws"
        known = self.session.get_available_regions("sagemaker", partition)
        if self.region not in known and not os.environ.get("AWS_ENDPOINT_URL"):
            raise CloudError(
                "SageMaker is not in this region", field="sagemaker.region", value=self.region,
                allowed=", ".join(known[:6]) + ", ...",
            )  # fmt: skip
        timeout = 3 if service == "pricing" else 60
        config = config or Config(
            retries={"mode": "standard", "max_attempts": 1 if service == "pricing" else 5}, connect_timeout=timeout,
            read_timeout=timeout,
        )  # fmt: skip
        return self.session.client(service, region_name=region, config=config)

    def call(self, service: str, operation: str, /, **parameters: Any) -> dict[str, Any]:
        """One API call.

        Args: operation: in boto3's spelling, such as create_training_job.
        Raises: CloudError for what the service's model does not allow, and with AWS's own words and what to do next.
        """
        client = self.client(service)
        validate(client.meta.service_model, client.meta.method_to_api_mapping[operation], parameters)
        with aws_errors(operation):
            answer: dict[str, Any] = getattr(client, operation)(**parameters)
        answer.pop("ResponseMetadata", None)
        return answer

    def pages(self, service: str, operation: str, key: str, **parameters: Any) -> Iterator[dict[str, Any]]:
        """The entries of a listing over all its pages."""
        client = self.client(service)
        validate(client.meta.service_model, client.meta.method_to_api_mapping[operation], parameters)
        with aws_errors(operation):
            for page in client.get_paginator(operation).paginate(**parameters):
                yield from page.get(key, [])

    def identity(self) -> dict[str, Any]:
        """Account and ARN of the caller."""
        return self.call("sts", "get_caller_identity")


@contextmanager
def aws_errors(what: str) -> Iterator[None]:
    """Turns botocore's errors into CloudError."""
    from botocore import exceptions as e

    try:
        yield
    except (
        e.NoCredentialsError,
        e.PartialCredentialsError,
        e.CredentialRetrievalError,
        e.TokenRetrievalError,
    ) as error:
        raise CloudError(
            "no AWS credentials were found", field="credentials",
            hint="run `aws configure` or `aws sso login`, or set AWS_PROFILE; `--dry-run` needs none",
        ) from error  # fmt: skip
    except e.ProfileNotFound as error:
        raise CloudError(str(error), field="AWS_PROFILE", hint="`aws configure list-profiles` shows them") from error
    except e.ClientError as error:
        code = error.response["Error"].get("Code", "")
        message = error.response["Error"].get("Message", "")
        raise AwsError(what, code, message) from error
    except (e.EndpointConnectionError, e.ConnectTimeoutError, e.ReadTimeoutError, e.ConnectionError) as error:
        raise CloudError(
            f"AWS does not answer: {error}", field="region", hint="is the region spelt right, and is there a network?"
        ) from error
    except e.ParamValidationError as error:
        raise CloudError(str(error)) from error


class AwsError(CloudError):
    """AWS answered with an error; `code` is its name for it."""

    def __init__(self, what: str, code: str, message: str) -> None:
        self.code = code
        super().__init__(f"{what}: {code}: {message}", hint=hint_for(f"{code}: {message}"))


def our_tags(aws: Aws, arn: str) -> dict[str, str] | None:
    """Tags of a job or endpoint of ours; None for somebody else's, which the policies of `gorgon iam-policy` need not
    even let us look at."""
    try:
        found = aws.call("sagemaker", "list_tags", ResourceArn=arn)["Tags"]
    except AwsError as error:
        if "AccessDenied" in error.code:
            return None
        raise
    tags = {tag["Key"]: tag["Value"] for tag in found}
    return tags if "gorgon:run" in tags else None


def execution_role(cloud: SageMakerConfig, aws: Aws, caller: str) -> str | None:
    """The role that jobs run under: the recipe's, the environment's, or in SageMaker Studio the notebook's own.

    Args: caller: ARN of the caller, which in Studio is a session of its execution role.
    """
    named = cloud.role or os.environ.get(ROLE_VARIABLE)
    session = re.fullmatch(r"arn:[\w-]+:sts::\d+:assumed-role/([^/]+)/SageMaker", caller)
    if named or session is None:
        return named
    return str(aws.call("iam", "get_role", RoleName=session[1])["Role"]["Arn"])  # its path is not in the session's ARN


def resolve_place(cloud: SageMakerConfig, aws: Aws) -> Place:
    """Account, role and bucket that a run uses, asked of AWS where the recipe leaves them open.

    Raises: CloudError when there are no credentials or no role is named.
    """
    identity = aws.identity()
    role = execution_role(cloud, aws, identity["Arn"])
    if not role:
        raise CloudError(
            "no execution role is named", field="sagemaker.role", allowed="the ARN of a role that SageMaker may assume",
            hint=f"set it in the recipe or in {ROLE_VARIABLE}; `gorgon iam-policy RECIPE` prints what it must allow",
        )  # fmt: skip
    bucket = cloud.bucket or f"sagemaker-{aws.region}-{identity['Account']}"
    return Place(aws.region, identity["Account"], role, bucket, cloud.prefix)


def offline_place(cloud: SageMakerConfig) -> Place:
    """The same without asking anybody, for `--dry-run`: what is unknown gets a visible placeholder."""
    region = cloud.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or FALLBACK_REGION
    role = cloud.role or os.environ.get(ROLE_VARIABLE)
    account = role.split(":")[4] if role and role.count(":") >= 5 else UNKNOWN_ACCOUNT
    role = role or f"arn:aws:iam::{UNKNOWN_ACCOUNT}:role/EXECUTION-ROLE"
    return Place(region, account, role, cloud.bucket or f"sagemaker-{region}-{account}", cloud.prefix)
