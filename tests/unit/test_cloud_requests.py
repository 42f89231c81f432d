"""Requests: golden files, the service model's limits, pinned images, the rules between settings."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gorgon.cli import app
from gorgon.cloud.config import EndpointConfig, SageMakerConfig
from gorgon.cloud.dry import dry_run
from gorgon.cloud.endpoint import create_calls, delete_calls, endpoint_spec, environment, limits
from gorgon.cloud.images import SERVING, TRAINING, serving_image, training_image
from gorgon.cloud.job import Channel, JobSpec
from gorgon.cloud.plan import Place, plan_jobs, resource_name
from gorgon.cloud.run import CloudRun
from gorgon.cloud.sagemaker import Call, create_training_job
from gorgon.cloud.validate import service_model, validate
from gorgon.config import PrepareConfig, TrainHeadsConfig, TuneConfig, build
from gorgon.errors import CloudError, ConfigError, DataError

GOLDEN = Path(__file__).parents[1] / "cloud_plane" / "golden"
ROLE = "arn:aws:iam::123456789012:role/gorgon-execution"
PLACE = Place("eu-west-1", "123456789012", ROLE, "my-bucket", "gorgon")
OUT = Path("runs/sql")
STEPS = {
    "prepare": PrepareConfig(dataset="embedded", model="org/base"),
    "train-heads": TrainHeadsConfig(model="org/base", data="runs/sql/prepare"),
    "tune": TuneConfig(model="runs/sql/train-heads", data="runs/sql/prepare"),
}
EVERYTHING = {
    "spot": True, "instance_fallbacks": ["ml.g5.2xlarge", "ml.g6.4xlarge"], "kms_key": "alias/mine",
    "subnets": ["subnet-1"], "security_groups": ["sg-1"], "encrypt_traffic": True, "tags": {"team": "search"},
    "environment": {"LEVEL": "info"},
}  # fmt: skip


def jobs(cloud, steps=STEPS):
    return plan_jobs(steps, OUT, run="sql", stamp="20260101-000000", cloud=cloud, place=PLACE)


def request(cloud, step="train-heads", steps=STEPS):
    spec = next(s for s in jobs(cloud, steps) if s.step == step)
    return create_training_job(spec, cloud, PLACE, run="sql", code_uri="s3://my-bucket/code", uploads={}).parameters


def golden(name, calls):
    """Compares with a committed file; GORGON_WRITE_GOLDEN=1 writes it, to be read before it is committed."""
    path, text = GOLDEN / f"{name}.json", json.dumps([c.document() for c in calls], indent=1) + "\n"
    if os.environ.get("GORGON_WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), f"the requests of {name} have changed"


def test_golden_jobs():
    for name, cloud in (("jobs", SageMakerConfig()), ("jobs-everything", SageMakerConfig(**EVERYTHING))):
        calls = [
            create_training_job(s, cloud, PLACE, run="sql", code_uri="s3://my-bucket/code", uploads={})
            for s in jobs(cloud)
        ]
        golden(name, calls)


def test_golden_jobs_without_a_network():
    """A warm machine, an image of one's own, and nothing to be fetched."""
    image = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/gorgon:0.1.0"
    cloud = SageMakerConfig(network_isolation=True, image=image, keep_alive_s=600)
    golden("jobs-isolated", [
        create_training_job(s, cloud, PLACE, run="sql", code_uri="s3://my-bucket/code", uploads={})
        for s in jobs(cloud, {"prepare": PrepareConfig(dataset="embedded")})
    ])  # fmt: skip


@pytest.mark.parametrize("engine", ["gorgon", "vllm", "tgi"])
def test_golden_endpoints(engine):
    settings = EndpointConfig(
        engine=engine, instance_type="ml.g5.xlarge", max_instances=3, data_capture=engine == "tgi"
    )
    artifact = None if engine == "tgi" else "s3://my-bucket/artifact"
    spec = endpoint_spec("sql-1", "s3://my-bucket/model", settings, "eu-west-1", artifact=artifact, heads=5)
    cloud = SageMakerConfig(kms_key="alias/mine", tags={"team": "search"})
    golden(f"endpoint-{engine}", [*create_calls(spec, cloud, PLACE, run="sql"), *delete_calls("sql-1", scaled=True)])


def test_golden_run_with_an_export():
    """A recipe whose three endpoints are vLLM's: the model is exported by one more job, and served from its result."""
    vllm = EndpointConfig(engine="vllm", compare=True)
    where = {"region": "eu-west-1", "role": ROLE, "bucket": "my-bucket"}
    cloud = SageMakerConfig(endpoint=vllm, instance_types={"export": "ml.m5.large"}, **where)
    calls = []
    for shown in dry_run(CloudRun("sql", STEPS, cloud, OUT, base="org/base"), stamp="20260101-000000")["calls"]:
        job = shown["parameters"].get("TrainingJobName", "sql-export")
        if shown["service"] == "sagemaker" and shown["operation"].startswith("Create") and job.startswith("sql-export"):
            text = re.sub(r"code/[0-9a-f]{16}/", "code/DIGEST/", json.dumps(shown))  # it is named by its contents
            calls.append(Call(**json.loads(text)))
    golden("run-vllm", calls)


def test_golden_calls_beside_jobs_and_endpoints():
    """The first call of every other operation of a run: who is asked, what is read, watched and ended."""
    where = {"region": "eu-west-1", "role": ROLE, "bucket": "my-bucket"}
    cloud = SageMakerConfig(endpoint=EndpointConfig(compare=True), **where)
    found = {}
    for shown in dry_run(CloudRun("sql", STEPS, cloud, OUT, base="org/base"), stamp="20260101-000000")["calls"]:
        text = re.sub(r"(?<=[/g])[0-9a-f]{12,16}(?=[-/])", "DIGEST", json.dumps(shown["parameters"]))
        call = Call(shown["service"], shown["operation"], json.loads(text))
        if not call.operation.startswith("Create"):
            found.setdefault(call.operation, call.checked())
    golden("run-calls", list(found.values()))


@pytest.mark.parametrize("image", [None, "me/gorgon:0.1.0"])
def test_what_is_compared_with_decodes_without_drafts(image):
    settings = EndpointConfig(image=image)
    spec = endpoint_spec("a", "s3://b/m", settings, "eu-west-1", artifact="s3://b/a", plain=True)
    assert environment(spec)["GORGON_DRAFTS"] == "none", "the handler and `gorgon serve` read the same variable"
    assert "GORGON_DRAFTS" not in environment(replace(spec, plain=False))


def test_a_job_runs_the_laptops_argv_and_reads_what_the_job_before_it_wrote():
    sent = request(SageMakerConfig(), "tune")
    algorithm = sent["AlgorithmSpecification"]
    assert algorithm["ContainerArguments"] == ["gorgon", "step", "tune", "--base-dir", "/opt/ml"]
    channels = {c["ChannelName"]: c["DataSource"]["S3DataSource"]["S3Uri"] for c in sent["InputDataConfig"]}
    first = request(SageMakerConfig(), "prepare")
    output = f"{first['OutputDataConfig']['S3OutputPath']}/{first['TrainingJobName']}/output/model/"
    assert channels["data"] == output and set(channels) == {"model", "data", "code"}
    assert "model" not in sent["HyperParameters"] and json.loads(sent["HyperParameters"]["prompts"]) == 100
    assert json.loads(request(SageMakerConfig())["HyperParameters"]["model"]) == "org/base", "a hub id is no channel"
    assert sent["OutputDataConfig"]["CompressionType"] == "NONE"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"TrainingJobName": "a_b"}, "does not match"),
        ({"TrainingJobName": "x" * 64}, "at most 63"),
        ({"Environment": {"A": "x" * 513}}, "513 characters, at most 512"),
        ({"HyperParameters": {str(n): "1" for n in range(101)}}, "101 entries, at most 100"),
        ({"HyperParameters": {"a": "x" * 2501}}, "at most 2500"),
        ({"RoleArn": "my-role"}, "RoleArn"),
        ({"StoppingCondition": {"MaxRuntimeInSeconds": 0}}, "at least 1"),
        ({"Tags": [{"Key": "a#b", "Value": ""}]}, "does not match"),
        ({"EnableManagedSpotTraining": "yes"}, "must be a boolean"),
        ({"Surprise": 1}, "no such member"),
        ({"OutputDataConfig": {}}, "S3OutputPath: required"),
        ({"ResourceConfig": {"InstanceType": "ml.g5.nope", "VolumeSizeInGB": 1}}, "did you mean 'ml.g5"),
    ],
)
def test_what_botocore_lets_through_is_refused(change, word):
    sent = {**request(SageMakerConfig()), **change}
    with pytest.raises(CloudError, match=re.escape(word)):
        validate(service_model("sagemaker"), "CreateTrainingJob", sent)


def test_all_problems_are_told_at_once():
    with pytest.raises(CloudError) as error:
        validate(
            service_model("sagemaker"),
            "CreateEndpoint",
            {"EndpointName": "a_b", "Tags": [{"Key": "k" * 129, "Value": 3}]},
        )
    assert str(error.value).startswith("4 values") and "EndpointConfigName: required" in str(error.value)


def test_patterns_of_every_operation_we_call_compile():
    from gorgon.cloud.validate import _pattern

    seen = []

    def walk(shape, depth=0):
        if shape.metadata.get("pattern"):
            _pattern(shape.metadata["pattern"])
            seen.append(shape.name)
        for inner in (
            *getattr(shape, "members", {}).values(),
            *(getattr(shape, k, None) for k in ("member", "key", "value")),
        ):
            if inner is not None and depth < 8:
                walk(inner, depth + 1)

    names = ("CreateModel", "CreateEndpointConfig", "CreateEndpoint", "DeleteEndpoint")
    for name in ("CreateTrainingJob", *names):
        walk(service_model("sagemaker").operation_model(name).input_shape)
    for name in ("RegisterScalableTarget", "PutScalingPolicy", "DeregisterScalableTarget"):
        walk(service_model("application-autoscaling").operation_model(name).input_shape)
    assert len(set(seen)) > 30


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"spot": True, "keep_alive_s": 600}, "warm pools on spot"),
        ({"spot": True, "max_wait_s": 60}, "at least max_runtime_s"),
        ({"max_wait_s": 99999}, "for spot machines only"),
        ({"subnets": ["subnet-1"]}, "go together"),
        ({"instance_types": {"tun": "ml.m5.xlarge"}}, "did you mean 'tune'"),
        ({"instance_fallbacks": ["ml.g5.xlarge"] * 5}, "at most 4"),
        ({"network_isolation": True}, "image of your own"),
        ({"network_isolation": True, "image": "a/b:1"}, "'org/base' cannot be fetched"),
        ({"environment": {"A": "x" * 513}}, "at most 512"),
        ({"environment": {"HF_TOKEN": "hf_x"}}, "looks like a secret"),
    ],
)
def test_settings_that_would_cost_money_for_nothing(given, word):
    with pytest.raises(ConfigError, match=re.escape(word)):
        jobs(SageMakerConfig(**given))


def test_settings_of_the_section_are_checked():
    for values, word in (
        ({"instance_typ": "x"}, "did you mean 'instance_type'"),
        ({"endpoint": {"engin": "tgi"}}, "unknown key 'sagemaker.endpoint.engin': did you mean 'engine'"),
        ({"endpoint": {"engine": "sglang"}}, "sagemaker.endpoint.engine"),
        ({"keep_alive_s": 99999}, "keep_alive_s"),
    ):
        with pytest.raises(ConfigError, match=re.escape(word)):
            build(SageMakerConfig, values, step="sagemaker")
    for kind in (SageMakerConfig, EndpointConfig):
        assert all(f.description.endswith(".") for f in kind.model_fields.values())


def test_several_gpus_are_not_paid_for():
    with pytest.raises(CloudError, match="'tune' uses one GPU and this machine has 4"):
        request(SageMakerConfig(instance_type="ml.g5.12xlarge"), "tune")
    sent = request(SageMakerConfig(instance_type="ml.g5.12xlarge"), "train-heads")
    assert sent["ResourceConfig"]["InstanceType"] == "ml.g5.12xlarge", "this step uses all four"
    assert sent["AlgorithmSpecification"]["ContainerArguments"][:3] == ["gorgon", "step", "train-heads"]
    with pytest.raises(CloudError, match="has 8"):
        endpoint_spec("a", "s3://b/m", EndpointConfig(instance_type="ml.p4d.24xlarge"), "eu-west-1")


@pytest.mark.parametrize(
    ("engine", "image", "word"),
    [
        ("vllm", "763104351884.dkr.ecr.us-east-1.amazonaws.com/vllm:server-sagemaker-cuda-v2", "floating"),
        ("vllm", "me/vllm:latest", "floating"),
        ("vllm", "me/vllm", "floating"),
        ("vllm", "me/vllm:0.33.0-gpu", "vLLM 0.33 removed Medusa"),
        ("vllm", "me/vllm:0.23.1-gpu", "loses the quotes"),
        ("vllm", "me/vllm:server-sagemaker-cuda-v2.6", "does not say which vLLM"),
        ("tgi", "me/tgi:4.0-tgi4.0.0-gpu", "not a TGI image"),
        ("gorgon", "nonsense", "not a container image"),
    ],
)
def test_images_that_do_not_serve_medusa(engine, image, word):
    with pytest.raises(CloudError, match=word):
        serving_image(engine, image, "eu-west-1")


def test_pinned_images_have_exact_tags_and_reasons():
    for image in (*TRAINING.values(), *SERVING.values()):
        assert re.search(r"\d+\.\d+", image.tag) and len(image.reason) > 40
    assert serving_image("vllm", "me/vllm:0.32.0-cu130", "x")[1] == "al2023-ami-sagemaker-inference-gpu-4-1"
    assert serving_image("gorgon", "me/mine@sha256:" + "0" * 64, "x")[0].startswith("me/mine")
    assert training_image(None, "ml.m5.xlarge", "cn-north-1")[0].split("/")[0].endswith("amazonaws.com.cn")


def test_names():
    assert resource_name("my recipe", "train-heads", "1") == "my-recipe-train-heads-1"
    with pytest.raises(CloudError, match="70 characters"):
        resource_name("x" * 70)
    with pytest.raises(CloudError, match="at most 63"):
        plan_jobs(STEPS, OUT, run="x" * 50, stamp="20260101-000000", cloud=SageMakerConfig(), place=PLACE)


def test_inputs_that_nobody_makes(tmp_path):
    with pytest.raises(DataError, match="no step of this recipe writes it"):
        jobs(SageMakerConfig(), {"train-heads": TrainHeadsConfig(data=str(tmp_path / "none"))})
    (spec,) = jobs(SageMakerConfig(), {"train-heads": TrainHeadsConfig(data="s3://other/data", model=str(tmp_path))})
    assert spec.channels == (Channel("model", str(tmp_path)), Channel("data", "s3://other/data"))


def test_a_hyperparameter_too_long_for_the_service():
    with pytest.raises(CloudError, match="at most 2500"):
        request(SageMakerConfig(), "prepare", {"prepare": PrepareConfig(dataset="embedded", system="x" * 2600)})


def test_a_job_without_a_machine_is_for_this_machine():
    with pytest.raises(CloudError, match="without a machine"):
        spec = JobSpec("a", "tune", {}, (), "out")
        create_training_job(spec, SageMakerConfig(), PLACE, run="r", code_uri="s3://b/c", uploads={})


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"max_instances": 1, "instance_count": 2}, "fewer machines"),
        ({"max_input_tokens": 2048, "max_total_tokens": 2048}, "no room for an answer"),
        ({"engine": "tgi", "max_input_tokens": 2048}, "below max_total_tokens (2048)"),
        ({"engine": "vllm", "max_input_tokens": 9}, "no limit for the prompt alone"),
        ({"max_total_tokens": 9, "environment": {"GORGON_CONTEXT": "8"}}, "this limit is given twice"),
        ({"engine": "tgi", "instance_type": "ml.m5.xlarge"}, "needs a GPU"),
        ({"environment": {"A": "x" * 1025}}, "1025 characters"),
    ],
)
def test_endpoints_that_cannot_work(values, word):
    with pytest.raises(CloudError, match=re.escape(word)):
        spec = endpoint_spec("a", "s3://b/m", EndpointConfig(**values), "eu-west-1", artifact="s3://b/a")
        create_calls(spec, SageMakerConfig(), PLACE, run="r")


@pytest.mark.parametrize(
    ("engine", "told"),
    [
        ("gorgon", {"GORGON_CONTEXT": "3000", "GORGON_MAX_PROMPT": "2500"}),
        ("vllm", {"SM_VLLM_MAX_MODEL_LEN": "3000"}),
        ("tgi", {"MAX_TOTAL_TOKENS": "3000", "MAX_INPUT_TOKENS": "2500"}),
    ],
)
def test_limits_reach_the_engine(engine, told):
    prompt = None if engine == "vllm" else 2500
    settings = EndpointConfig(engine=engine, max_total_tokens=3000, max_input_tokens=prompt)
    for plain in (False, True):
        spec = endpoint_spec("a", "s3://b/m", settings, "eu-west-1", plain=plain, context=4096)
        assert told.items() <= environment(spec).items()
    with pytest.raises(CloudError, match=re.escape("the model's own context is shorter")):
        endpoint_spec("a", "s3://b/m", settings, "eu-west-1", context=2048)


def test_limits_that_nobody_gives_are_the_engines_own():
    assert limits(EndpointConfig()) == {}, "the server knows its model's context"
    assert limits(EndpointConfig(engine="vllm")) == {"SM_VLLM_MAX_MODEL_LEN": "2048"}
    assert limits(EndpointConfig(engine="tgi")) == {"MAX_INPUT_TOKENS": "1024", "MAX_TOTAL_TOKENS": "2048"}
    assert limits(EndpointConfig(engine="tgi"), 1024) == {"MAX_INPUT_TOKENS": "512", "MAX_TOTAL_TOKENS": "1024"}


def test_the_reference_recipe_is_shown_call_by_call_without_credentials(monkeypatch):
    for key in [k for k in os.environ if k.startswith("AWS_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    result = CliRunner().invoke(app, ["run", "recipes/zephyr-7b-sql.yaml", "--on", "sagemaker", "--dry-run"])
    assert result.exit_code == 0, result.output
    calls = json.loads(result.stdout)["calls"]
    made = [call["operation"] for call in calls]
    steps = ("prepare", "finetune", "distill", "train-heads", "tune", "compare")
    started = [c["parameters"]["TrainingJobName"] for c in calls
               if c["operation"] == "CreateTrainingJob"]  # fmt: skip
    assert [name.removeprefix("zephyr-7b-sql-").rsplit("-", 2)[0] for name in started] == list(steps)
    for kind in ("Model", "EndpointConfig", "Endpoint"):
        assert made.count(f"Create{kind}") == made.count(f"Delete{kind}") == 3
    assert "at most in all" in result.stderr and "gorgon jobs stop" in result.stderr
