"""What goes wrong in an AWS account: each time a typed error with the next step, and nothing billed or left behind."""

import io
import json
import os
import signal
import threading

import pytest

from gorgon.cloud.aws import Aws, resolve_place
from gorgon.cloud.config import EndpointConfig, SageMakerConfig
from gorgon.cloud.jobs import ask_to_stop
from gorgon.cloud.launch import Launch
from gorgon.errors import BudgetError, CloudError
from tests.cloud_plane.fixtures import TINY, cli, settings, until
from tests.cloud_plane.plane import BUCKET, ROLE, Fault

pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("cloud")]
DATA = f"s3://{BUCKET}/data"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*given):
    """One job that reads its data from S3."""
    only = ("prepare=null", f"train-heads.data={DATA}")
    return cli("run", "quickstart", *settings(*TINY, *only, *given), "--on", "sagemaker", "--out", "run")


def started(plane):
    return [name for name, _ in plane.requests if name.startswith("Create")]


def refused(plane, done, *words):
    assert done.error is not None and done.error.exit_code == 2, done.err
    text = f"{done.error} {done.error.hint}"
    for word in words:
        assert word in text, text
    assert not any(plane.left().values())


def test_no_credentials(plane, here, monkeypatch):
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(key)
    refused(plane, run(), "no AWS credentials", "aws configure")


def test_no_region_and_a_wrong_one(plane, here, monkeypatch):
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    refused(plane, run(), "no AWS region", "AWS_DEFAULT_REGION")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    refused(plane, run("sagemaker.region=us-esat-1"), "not in this region", "us-esat-1")


def test_no_role_and_one_that_cannot_be_assumed(plane, here, monkeypatch):
    plane.store.put(f"{DATA}/train.jsonl", "{}")
    refused(plane, run("sagemaker.role=arn:aws:iam::123456789012:role/other"), "Could not assume role", "iam-policy")
    monkeypatch.delenv("GORGON_SAGEMAKER_ROLE")
    refused(plane, run(), "no execution role", "iam-policy")


def test_in_studio_the_notebooks_own_role_is_taken(plane, here, monkeypatch):
    monkeypatch.delenv("GORGON_SAGEMAKER_ROLE")
    plane.caller = "arn:aws:sts::123456789012:assumed-role/gorgon-execution/SageMaker"
    assert resolve_place(SageMakerConfig(), Aws()).role == ROLE


@pytest.mark.parametrize(("answer", "stopped"), [("y\n", ["job-1"]), ("\n", []), (KeyboardInterrupt, [])])
def test_ctrl_c_asks_whether_to_stop_the_job(plane, here, monkeypatch, capsys, answer, stopped):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

        def readline(self):
            if isinstance(answer, str):
                return answer
            raise answer

    asked = []
    plane.do_StopTrainingJob = lambda request: asked.append(request["TrainingJobName"]) or {}
    monkeypatch.setattr("sys.stdin", Terminal())
    ask_to_stop(Aws(), "job-1")
    said = capsys.readouterr().err
    assert asked == stopped and "Stop it? [y/N]" in said
    assert ("gorgon jobs attach job-1" in said) == (not stopped)


def test_what_is_somebody_elses_is_not_listed(plane, here):
    """Neither with other tags, nor where a least-privilege policy does not let us look."""
    plane.store.put(f"{DATA}/train.jsonl", "{}")
    for name in ("ours-1", "theirs-1", "hidden-1"):
        plane.jobs[name] = _ended(plane, name)
    tags = {"ours-1": [{"Key": "gorgon:run", "Value": "r"}], "theirs-1": [{"Key": "team", "Value": "x"}]}

    def list_tags(request):
        name = request["ResourceArn"].rpartition("/")[2]
        if name == "hidden-1":
            raise Fault("AccessDeniedException", "User is not authorized to perform: sagemaker:ListTags")
        return {"Tags": tags[name]}

    plane.do_ListTags = list_tags
    assert [row["name"] for row in json.loads(cli("jobs", "list", "--json").out)] == ["ours-1"]


def _ended(plane, name):
    from tests.cloud_plane.jobs import Job

    made = Job(plane, {"TrainingJobName": name})
    made.status = "Completed"
    return made


def test_a_job_that_is_not_there(plane, here):
    refused(plane, cli("jobs", "attach", "nothing"), "not found", "gorgon jobs list")


def test_an_empty_and_a_partly_uploaded_prefix(plane, here):
    refused(plane, run(), "this S3 prefix is empty", DATA)
    plane.store.put(f"{DATA}/manifest.json", json.dumps({"outputs": {"train.jsonl": "0", "validation.jsonl": "0"}}))
    plane.store.put(f"{DATA}/train.jsonl", "{}")
    refused(plane, run(), "only partly uploaded", "validation.jsonl")
    assert started(plane) == []


def test_no_quota_is_named_with_its_code(plane, here):
    plane.store.put(f"{DATA}/train.jsonl", "{}")
    name = "ml.m5.xlarge for training job usage"
    plane.quotas = {name: ("L-CCE2AFA6", 0.0)}
    plane.fail["CreateTrainingJob"] = Fault(
        "ResourceLimitExceeded",
        f"The account-level service limit '{name}' is 0 Instances, with current utilization of 0.",
    )
    refused(plane, run(), name, "--quota-code L-CCE2AFA6", "separate quotas")


def test_denied_access_names_the_policy(plane, here):
    plane.store.put(f"{DATA}/train.jsonl", "{}")
    plane.fail["CreateTrainingJob"] = Fault("AccessDeniedException", "User is not authorized to perform: iam:PassRole")
    refused(plane, run(), "iam:PassRole", "gorgon iam-policy")


def test_a_token_that_expires_while_a_job_runs(plane, here):
    plane.store.put(f"{DATA}/train.jsonl", "{}")
    original = plane.do_CreateTrainingJob

    def create(request):
        answer = original(request)
        plane.fail["DescribeTrainingJob"] = Fault("ExpiredTokenException", "The security token is expired")
        return answer

    plane.do_CreateTrainingJob = create
    done = run()
    assert done.error.exit_code == 2 and "gorgon jobs attach" in done.error.hint and "sign in again" in done.error.hint
    plane.fail.clear()
    (entry,) = json.loads((here / "run" / "sagemaker.json").read_text())["jobs"].values()
    assert entry["name"] in plane.jobs, "the job is remembered, so that it is not forgotten on the bill"
    plane.jobs[entry["name"]].close()


def test_no_capacity_and_other_reasons_get_their_hints():
    from gorgon.cloud.aws import hint_for

    for reason, word in (
        ("CapacityError: Unable to provision requested ML compute capacity. Insufficient capacity", "fallbacks"),
        ("ClientError: Please use an instance type with more memory. CUDA out of memory", "GPU memory"),
        ("ClientError: CannotPullContainerError: manifest unknown", "image is not there"),
        ("MaxWaitTimeExceeded", "max_wait_s"),
        ("did not pass the ping health check", "health_check_s"),
        ("AlgorithmError: InstallError: pip could not install Gorgon in this image", "PyPI"),
    ):
        assert word in hint_for(reason), reason
    assert hint_for("something new") is None


def test_the_budget_stands_before_everything(plane, here):
    plane.store.put(f"{DATA}/train.jsonl", "{}")
    done = run("sagemaker.budget_usd=5")
    refused(plane, done, "what this may cost is not known", "price_per_hour for ml.m5.xlarge")
    done = run("sagemaker.budget_usd=5", "sagemaker.price_per_hour={ml.m5.xlarge: 2}")
    refused(plane, done, "up to 8.00 USD", "max_runtime_s")
    assert isinstance(done.error, BudgetError) and "gorgon jobs stop" in done.err
    plane.prices = {"ml.m5.xlarge": {"USE1-Train:ml.m5.xlarge": 3.0, "USE1-Host:ml.m5.xlarge": 9.0}}
    refused(plane, run("sagemaker.budget_usd=5"), "up to 12.00 USD")
    assert started(plane) == [] and plane.store.keys(BUCKET, "gorgon") == [], "nothing was even uploaded"


# endpoints


def model(plane):
    uri = f"s3://{BUCKET}/model"
    plane.store.put(f"{uri}/config.json", json.dumps({"medusa_num_heads": 3}))
    return uri


def launch(plane, **given):
    endpoint = EndpointConfig(instance_type="ml.m5.xlarge", **given)
    return Launch(model(plane), SageMakerConfig(endpoint=endpoint), name="sql")


def test_a_container_that_dies_shows_its_log_and_leaves_nothing(plane, here, capsys):
    with pytest.raises(CloudError, match="did not pass the ping health check") as error:
        launch(plane, image="me/mine:1.0").run()  # `gorgon serve` finds no model to serve here, or is no command yet
    assert "health_check_s" in error.value.hint
    assert "the last lines of its log" in capsys.readouterr().err
    assert not any(plane.left().values())


@pytest.mark.parametrize("stage", ["CreateModel", "CreateEndpointConfig", "CreateEndpoint", "DescribeEndpoint"])
def test_a_deployment_that_fails_at_any_stage_leaves_nothing(plane, here, stage):
    plane.fail[stage] = Fault("AccessDeniedException", "no")
    with pytest.raises(CloudError):
        launch(plane).run()
    plane.fail.clear()
    assert not any(plane.left().values()), plane.left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_deployment_that_is_killed_leaves_nothing(plane, here, number):
    threading.Thread(target=lambda: (until(lambda: plane.endpoints), os.kill(os.getpid(), number)), daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        launch(plane).run()
    assert not any(plane.left().values()), plane.left()


def test_somebody_elses_endpoint_of_that_name_is_not_deleted(plane, here):
    plane.models["sql"] = {"ModelName": "sql"}
    with pytest.raises(CloudError, match="already existing"):
        launch(plane).run()
    assert plane.left()["models"] == ["sql"]


@pytest.mark.parametrize(
    ("content", "word"), [({}, "no heads"), (None, "config.json cannot be read")], ids=["backbone", "nothing"]
)
def test_a_model_without_heads_is_not_deployed(plane, here, content, word):
    uri = f"s3://{BUCKET}/plain"
    plane.store.put(f"{uri}/config.json" if content is not None else f"{uri}/x", json.dumps({"hidden_size": 8}))
    done = cli("deploy", uri, "--name", "sql")
    refused(plane, done, word, "gorgon tune")
    for command in (("deploy", "./nowhere"), ("deploy", "./nowhere", "--dry-run")):
        refused(plane, cli(*command), "no such model directory")


def local_model(here):
    folder = here / "tuned"
    (folder / "base-model").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"medusa_num_heads": 3}))
    (folder / "base-model" / "model.safetensors").write_bytes(os.urandom(9_000_000))  # more than one part of an upload
    return folder


def test_a_local_model_is_uploaded_once_and_whole(plane, here, monkeypatch):
    folder = local_model(here)
    cloud = SageMakerConfig(endpoint=EndpointConfig(instance_type="ml.m5.xlarge", image="me/stand-in:1.0"))
    for _ in range(2):
        Launch(str(folder), cloud, name="sql").run()
        source = plane.models["sql"]["PrimaryContainer"]["ModelDataSource"]["S3DataSource"]["S3Uri"]
        weights = plane.store.path(source + "base-model/model.safetensors")
        assert weights.read_bytes() == (folder / "base-model" / "model.safetensors").read_bytes()
        cli("endpoints", "delete", "sql")
        stamp = weights.stat().st_mtime_ns
    assert weights.stat().st_mtime_ns == stamp, "named by its contents, it is not sent twice"


def test_overdue_endpoints_can_be_found_and_deleted(plane, here):
    for name, when in (("old", "2020-01-01T00:00Z"), ("new", "2999-01-01T00:00Z")):
        labels = [{"Key": "gorgon:run", "Value": "r"}, {"Key": "gorgon:delete-at", "Value": when}]
        plane.models[name] = {"ModelName": name, "PrimaryContainer": {"Image": "x"}}
        plane.configs[name] = {
            "EndpointConfigName": name,
            "ProductionVariants": [{"VariantName": "m", "ModelName": name}],
        }
        plane.endpoints[name] = _still(plane, name)
        plane.tags[plane.endpoints[name].describe()["EndpointArn"]] = labels
    plane.endpoints["theirs"] = _still(plane, "theirs")
    assert {e["name"]: e["overdue"] for e in json.loads(cli("endpoints", "list", "--json").out)} == {
        "old": True, "new": False,
    }  # fmt: skip
    assert cli("endpoints", "delete", "--overdue").out.startswith("old: deleted")
    assert cli("endpoints", "delete").error.exit_code == 2
    assert cli("endpoints", "delete", "--all").out.startswith("new: deleted")
    assert plane.left()["endpoints"] == ["theirs"], "what is not ours stays"
    del plane.endpoints["theirs"]


def _still(plane, name):
    from tests.cloud_plane.endpoints import Endpoint

    made = Endpoint(plane, name, {"EndpointConfigName": name}, {}, {})
    made.status = "InService"
    return made


def test_scaling_is_set_up_and_taken_down(plane, here, monkeypatch):
    from tests.cloud_plane.endpoints import Endpoint

    monkeypatch.setattr(Endpoint, "run", lambda self: setattr(self, "status", "InService"))
    launch(plane, max_instances=4, requests_per_instance=5).run()
    (policy,) = plane.scaling["endpoint/sql/variant/main"].values()
    assert policy["TargetTrackingScalingPolicyConfiguration"]["TargetValue"] == 5.0
    cli("endpoints", "delete", "sql")
    assert not any(plane.left().values())


def test_delete_after_keeps_the_command_and_then_deletes(plane, here, monkeypatch):
    from gorgon.cloud import deploy
    from tests.cloud_plane.endpoints import Endpoint

    slept = []
    monkeypatch.setattr(Endpoint, "run", lambda self: setattr(self, "status", "InService"))
    monkeypatch.setattr(deploy.keep_until_deleted, "__kwdefaults__", {"sleep": slept.append})
    launch(plane, delete_after_minutes=7).run()
    assert slept == [420] and not any(plane.left().values())


# doctor and policies


def test_the_doctor_finds_what_is_missing(plane, here, monkeypatch):
    (here / "r.yaml").write_text(
        "tune: {}\nsagemaker: {instance_type: ml.g5.xlarge, bucket: nowhere, endpoint: {instance_type: ml.g6.xlarge}}\n"
    )
    plane.trust = "ec2.amazonaws.com"
    plane.quotas = {
        "ml.g5.xlarge for training job usage": ("L-1", 2.0), "ml.g6.xlarge for endpoint usage": ("L-2", 0.0)
    }  # fmt: skip
    plane.missing_images = {"djl-inference:0.38.0-lmi29.0.0-cu130"}
    done = cli("doctor", "r.yaml", "--json")
    found = [(f["check"], f["ok"]) for f in json.loads(done.out)]
    assert found == [
        ("region", True), ("credentials", True), ("role", False), ("bucket", False), ("image", True), ("image", False),
        ("quota", True), ("quota", False),
    ]  # fmt: skip
    assert done.error.exit_code == 2 and "--quota-code L-2" in done.out and "aws s3 mb s3://nowhere" in done.out
    plane.fail["GetCallerIdentity"] = Fault("ExpiredToken", "expired", 403)
    assert "sign in again" in cli("doctor", "r.yaml").out


def test_policies_allow_the_runs_prefix_and_nothing_else_in_s3(here):
    (here / "r.yaml").write_text(
        "name: sql\ntune: {}\n"
        "sagemaker: {role: 'arn:aws:iam::123456789012:role/r', bucket: b, prefix: p, endpoint: {}}\n"
    )
    made = json.loads(cli("iam-policy", "r.yaml").out)
    for policy in (made["caller"], made["execution_role"]):
        s3 = {s["Sid"]: s for s in policy["Statement"] if s["Action"][0].startswith("s3:")}
        assert s3["Objects"]["Resource"] == "arn:aws:s3:::b/p/*"
        assert s3["Bucket"]["Condition"] == {"StringLike": {"s3:prefix": ["p/*"]}}
        assert not any(s["Action"] == "*" or "*" in "".join(s["Action"]) for s in policy["Statement"])
    (role,) = [s for s in made["caller"]["Statement"] if s["Action"] == ["iam:PassRole"]]
    assert role["Resource"].endswith(":role/r")
    assert role["Condition"]["StringEquals"]["iam:PassedToService"] == "sagemaker.amazonaws.com"
    assert made["trust"]["Statement"][0]["Condition"]["StringEquals"]["aws:SourceAccount"] == "123456789012"
