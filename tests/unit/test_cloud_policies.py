"""The policies of `gorgon iam-policy`, held against every call of a dry run: none is missing, and none is wide."""

import json
from fnmatch import fnmatchcase

import pytest

from gorgon.cloud.config import EndpointConfig, SageMakerConfig
from gorgon.cloud.dry import dry_run
from gorgon.cloud.permissions import policies
from gorgon.cloud.plan import Place, s3_inputs
from gorgon.cloud.run import CloudRun
from gorgon.config import PrepareConfig, TrainHeadsConfig, TuneConfig
from tests.unit.test_cloud_requests import OUT, ROLE

REGION, ACCOUNT = "eu-west-1", "123456789012"
HERE = f"{REGION}:{ACCOUNT}"
STEPS = {
    "prepare": PrepareConfig(dataset="embedded", model="org/base"),
    "train-heads": TrainHeadsConfig(model="s3://weights/base/7b", data=str(OUT / "prepare")),
    "tune": TuneConfig(model=str(OUT / "train-heads"), data=str(OUT / "prepare")),
}
KINDS = {"TrainingJobName": "training-job", "ModelName": "model", "EndpointConfigName": "endpoint-config",
         "EndpointName": "endpoint"}  # fmt: skip


def cloud(engine, **more):
    endpoint = EndpointConfig(engine=engine, compare=True, max_instances=2)
    return SageMakerConfig(region=REGION, role=ROLE, bucket="my-bucket", prefix="p", endpoint=endpoint, **more)


def made(settings, run="My sql"):
    place = Place(REGION, ACCOUNT, ROLE, "my-bucket", "p")
    inputs = s3_inputs(STEPS, "s3://weights/base/7b")
    return policies(settings, place, run=run, inputs=inputs)


def calls(settings):
    return dry_run(CloudRun("My sql", STEPS, settings, OUT, base="s3://weights/base/7b"))["calls"]


def listed(value):
    return [value] if isinstance(value, str) else value


def allowed(policy, action, resource, **given):
    """What IAM decides, as far as these policies use it: actions, resources with *, StringLike and StringEquals."""
    for statement in policy["Statement"]:
        conditions = [
            any(fnmatchcase(str(given.get(key)), pattern) for pattern in listed(wanted))
            for kind, pairs in statement.get("Condition", {}).items() if kind in ("StringLike", "StringEquals")
            for key, wanted in pairs.items()
        ]  # fmt: skip
        if (
            action in statement["Action"]
            and any(fnmatchcase(resource, pattern) for pattern in listed(statement["Resource"]))
            and all(conditions)
        ):
            return True
    return False


def needed(call):
    """Actions and resources of a call, and what conditions are asked about."""
    service, operation, given = call["service"], call["operation"], call["parameters"]
    if service == "s3":
        bucket, key = f"arn:aws:s3:::{given['Bucket']}", given.get("Key")
        yield ("s3:ListBucket", bucket, {"s3:prefix": given.get("Prefix")}) if key is None else (
            f"s3:{operation}", f"{bucket}/{key}", {}
        )  # fmt: skip
    elif service == "logs":
        yield f"logs:{operation}", f"arn:aws:logs:{HERE}:log-group:{given['logGroupName']}:log-stream:x", {}
    elif service.startswith("sagemaker"):
        for parameter, kind in KINDS.items():
            if parameter in given:
                arn = f"arn:aws:sagemaker:{HERE}:{kind}/{given[parameter].lower()}"
                yield f"sagemaker:{operation}", arn, {}
                if "Tags" in given:
                    yield "sagemaker:AddTags", arn, {}
        role = given.get("RoleArn") or given.get("ExecutionRoleArn")
        if role:
            yield "iam:PassRole", role, {"iam:PassedToService": "sagemaker.amazonaws.com"}
    elif service != "sts":
        yield f"{service}:{operation}", "*", {}


@pytest.mark.parametrize("engine", ["gorgon", "vllm"])
def test_the_caller_may_make_every_call_of_the_dry_run(engine):
    policy = made(cloud(engine))["caller"]
    asked = [(call["operation"], *one) for call in calls(cloud(engine)) for one in needed(call)]
    assert len(asked) > 40
    refused = {(operation, action, arn) for operation, action, arn, given in asked
               if not allowed(policy, action, arn, **given)}  # fmt: skip
    assert refused == set()


@pytest.mark.parametrize("engine", ["gorgon", "vllm"])
def test_the_role_may_read_and_write_what_its_jobs_and_endpoints_are_given(engine):
    policy = made(cloud(engine))["execution_role"]

    def s3(uri, *actions):
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        assert allowed(policy, "s3:ListBucket", f"arn:aws:s3:::{bucket}", **{"s3:prefix": key.rstrip("/") + "/"}), uri
        for action in actions:
            assert allowed(policy, action, f"arn:aws:s3:::{bucket}/{key.rstrip('/')}/x"), (action, uri)

    read = written = 0
    for call in calls(cloud(engine)):
        given = call["parameters"]
        for image in (given.get("AlgorithmSpecification", {}).get("TrainingImage"),
                      given.get("PrimaryContainer", {}).get("Image")):  # fmt: skip
            if image:
                account, repository = image.partition(".")[0], image.partition("/")[2].partition(":")[0]
                arn = f"arn:aws:ecr:{REGION}:{account}:repository/{repository}"
                assert allowed(policy, "ecr:BatchGetImage", arn), image
        container = given.get("PrimaryContainer", {})
        sources = [c["DataSource"]["S3DataSource"] for c in given.get("InputDataConfig", [])]
        sources += [c["S3DataSource"] for c in container.get("AdditionalModelDataSources", [])]
        sources += [container["ModelDataSource"]["S3DataSource"]] if "ModelDataSource" in container else []
        for source in sources:
            s3(source["S3Uri"], "s3:GetObject")
            read += 1
        for output in (given.get("OutputDataConfig", {}).get("S3OutputPath"),
                       given.get("CheckpointConfig", {}).get("S3Uri")):  # fmt: skip
            if output:
                s3(output, "s3:PutObject", "s3:GetObject")
                written += 1
    assert read > 8 and written >= 6


def test_elsewhere_in_s3_is_only_read_and_only_where_the_recipe_says():
    for policy in (made(cloud("gorgon"))["caller"], made(cloud("gorgon"))["execution_role"]):
        assert allowed(policy, "s3:GetObject", "arn:aws:s3:::weights/base/7b/config.json")
        for action, resource in (
            ("s3:PutObject", "weights/base/7b/x"), ("s3:DeleteObject", "weights/base/7b/x"),
            ("s3:GetObject", "weights/other"), ("s3:GetObject", "my-bucket/q/x"),
        ):  # fmt: skip
            assert not allowed(policy, action, f"arn:aws:s3:::{resource}"), (action, resource)
        text = json.dumps(policy)
        assert '"*:*"' not in text and "s3:*" not in text and "sagemaker:*" not in text


@pytest.mark.parametrize(
    ("key", "resource", "condition"),
    [
        ("1234", f"arn:aws:kms:{HERE}:key/1234", None),
        (f"arn:aws:kms:{HERE}:key/1234", f"arn:aws:kms:{HERE}:key/1234", None),
        ("alias/mine", f"arn:aws:kms:{HERE}:key/*", "alias/mine"),
        (f"arn:aws:kms:{HERE}:alias/mine", f"arn:aws:kms:{HERE}:key/*", "alias/mine"),
    ],
)
def test_a_key_is_named_as_policies_name_it(key, resource, condition):
    """IAM does not match a key by its alias's ARN."""
    for policy in (made(cloud("gorgon", kms_key=key))["caller"], made(cloud("gorgon", kms_key=key))["execution_role"]):
        (statement,) = [s for s in policy["Statement"] if s["Sid"] == "Key"]
        assert statement["Resource"] == resource
        told = statement.get("Condition", {}).get("ForAnyValue:StringEquals", {}).get("kms:ResourceAliases")
        assert told == condition
