"""A recipe's jobs on SageMaker: shown as API calls, or uploaded, started, followed and chained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gorgon.artifacts import digest_input, write_json
from gorgon.cloud.aws import Aws, AwsError, offline_place, resolve_place
from gorgon.cloud.config import SageMakerConfig
from gorgon.cloud.job import JobSpec
from gorgon.cloud.jobs import follow, quota_error
from gorgon.cloud.logs import TRAINING
from gorgon.cloud.plan import Place, plan_jobs, resource_name, result_uri
from gorgon.cloud.pricing import Cost, guard, job_cost, price_of
from gorgon.cloud.sagemaker import Call, create_training_job
from gorgon.cloud.storage import Upload, check_prefix, code_upload, send, upload_of
from gorgon.config import EMBEDDED, CompareConfig, StepConfig
from gorgon.errors import CloudError
from gorgon.progress import say

STATE = "sagemaker.json"
COMPARE_MINUTES = 120
"""A comparison on endpoints ends, and its endpoints with it, after this time."""


@dataclass(frozen=True)
class CloudRun:
    """A recipe on its way to SageMaker.

    Args:
        name: the recipe's name.
        steps: resolved configurations in order.
        cloud: the recipe's `sagemaker` section.
        out: local directory of the run, which keeps the names of its jobs.
        recipe: the recipe's file, sent along for the record.
        base: the backbone before fine-tuning, for the comparison on endpoints.
    """

    name: str
    steps: Mapping[str, StepConfig]
    cloud: SageMakerConfig
    out: Path
    recipe: Path | None = None
    base: str = EMBEDDED

    def jobs(self, place: Place, stamp: str) -> list[JobSpec]:
        """The chain of jobs."""
        return plan_jobs(self.steps, self.out, run=self.name, stamp=stamp, cloud=self.cloud, place=place)

    def uploads(self, jobs: list[JobSpec], place: Place) -> dict[str, Upload]:
        """Local inputs by path."""
        return {
            channel.source: upload_of(channel.source, place, self.name)
            for spec in jobs for channel in spec.channels if not channel.in_s3 and channel.job is None
        }  # fmt: skip

    def costs(self, jobs: list[JobSpec], aws: Aws | None) -> list[Cost]:
        """The most that each job can cost."""
        costs = []
        for spec in jobs:
            if spec.resources is not None:
                machine = spec.resources.instance_type
                costs.append(
                    job_cost(
                        spec.name, spec.resources, price_of(machine, "training", self.cloud.price_per_hour, aws=aws)
                    )
                )
        return costs

    def endpoint_costs(self, aws: Aws | None) -> list[Cost]:
        """The most that the endpoint, or the three that are compared, can cost."""
        settings = self.cloud.endpoint
        if settings is None:
            return []
        price = price_of(settings.instance_type, "endpoint", self.cloud.price_per_hour, aws=aws)
        minutes = COMPARE_MINUTES if settings.compare else settings.delete_after_minutes
        machines = settings.instance_count * (3 if settings.compare else 1)
        hours = None if minutes is None else minutes / 60
        return [Cost(f"endpoints of {self.name}", price, machines, hours, "gorgon endpoints delete NAME")]


def timestamp() -> str:
    """Now, as a part of names."""
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S")


def dry_run(run: CloudRun, *, stamp: str | None = None) -> dict[str, Any]:
    """Every API call that the run would make, checked against the service's model. Needs no credentials.

    Raises: what planning and rendering raise, as the real run would before it starts anything.
    """
    place, stamp = offline_place(run.cloud), stamp or timestamp()
    jobs = run.jobs(place, stamp)
    uploads = run.uploads(jobs, place)
    addresses = {source: upload.prefix for source, upload in uploads.items()}
    calls = [Call("sts", "GetCallerIdentity", {})]
    with code_upload(place, run.name, run.recipe) as code:
        for upload in (code, *uploads.values()):
            calls += upload.calls()
        for spec in jobs:
            calls.append(
                create_training_job(spec, run.cloud, place, run=run.name, code_uri=code.prefix, uploads=addresses)
            )
            calls += watching(spec.name)
    if run.cloud.endpoint is not None and jobs:
        from gorgon.cloud.endpoint import dry_calls

        calls += dry_calls(run.cloud, place, run=run.name, stamp=stamp, model_uri=final_model(jobs), base=run.base)
    cost = guard([*run.costs(jobs, None), *run.endpoint_costs(None)], None)
    return {
        "name": run.name, "region": place.region, "account": place.account, "at_most_usd": cost,
        "calls": [call.document() for call in calls],
    }  # fmt: skip


def watching(name: str) -> list[Call]:
    """The calls that follow a job until it ends."""
    return [
        Call("sagemaker", "DescribeTrainingJob", {"TrainingJobName": name}, note="every few seconds until it ends"),
        Call(
            "logs", "DescribeLogStreams",
            {"logGroupName": TRAINING, "logStreamNamePrefix": f"{name}/"}, note="as above",
        ),
        Call(
            "logs", "GetLogEvents",
            {"logGroupName": TRAINING, "logStreamName": f"{name}/algo-1-...", "startFromHead": True},
            note="as above",
        ),
    ]  # fmt: skip


def final_model(jobs: list[JobSpec]) -> str:
    """The S3 address of the model directory that the chain ends in: the tuned one, else the one with heads.

    Raises: CloudError when no step makes a model with heads.
    """
    made = {spec.step: result_uri(spec) for spec in jobs}
    for step in ("tune", "train-heads"):
        if step in made:
            return made[step]
    raise CloudError("no step of this recipe makes a model to deploy", field="sagemaker.endpoint", allowed="tune")


def run_jobs(run: CloudRun) -> dict[str, str]:
    """Runs the chain on SageMaker and returns the S3 address of each step's result.

    A second call goes on where the first one ended: finished steps with the same settings and inputs are reused, a
    running one is followed again, a stopped one resumes from its checkpoints.
    Raises: CloudError, BudgetError, and what planning raises; nothing is billed before all of the chain is checked.
    """
    aws = Aws(run.cloud.region)
    place = resolve_place(run.cloud, aws)
    state = _State(run.out, place)
    jobs = run.jobs(place, state.stamp)
    uploads = run.uploads(jobs, place)
    addresses = {source: upload.prefix for source, upload in uploads.items()}
    for spec in jobs:
        for channel in spec.channels:
            if channel.in_s3 and channel.job is None:
                check_prefix(aws, channel.source, channel.name)
    results: dict[str, str] = {}
    with code_upload(place, run.name, run.recipe) as code:
        requests = {
            spec.step: create_training_job(
                spec, run.cloud, place, run=run.name, code_uri=code.prefix, uploads=addresses
            )
            for spec in jobs
        }  # all checked before the first one starts
        waiting = [spec for spec in jobs if not state.finished(aws, spec)]
        guard([*run.costs(waiting, aws), *run.endpoint_costs(aws)], run.cloud.budget_usd)
        for upload in (code, *uploads.values()):
            sent = send(upload, aws)
            say(f"{upload.prefix}: {sent} of {len(upload.files)} files uploaded")
        for number, spec in enumerate(jobs, start=1):
            say(f"[{number}/{len(jobs)}] {spec.step}")
            name = state.job(aws, spec)
            if name is None:
                name = state.next_name(spec, run.name)
                request = _with_results(requests[spec.step], spec, name, results)
                state.started(spec, name)  # before it is: killed in between, the next run looks for it by this name
                _start(aws, request)
                say(f"  started {name}; end it with: gorgon jobs stop {name}")
            follow(aws, name)
            results[spec.step] = result_uri(replace(spec, name=name))
            say(f"      done: {results[spec.step]}")
    return results


def after_jobs(
    run: CloudRun, results: Mapping[str, str], report: Callable[[Mapping[str, Any], Path], dict[str, Any]]
) -> dict[str, Any]:
    """What a recipe's `endpoint` section asks for once its jobs are done: an endpoint, or the comparison of three.

    Args: report: as `compare_endpoints` has it.
    """
    settings = run.cloud.endpoint
    if settings is None:
        return {}
    from gorgon.cloud.compare import compare_endpoints
    from gorgon.cloud.launch import Launch

    model = results.get("tune") or results["train-heads"]
    stamp = timestamp()
    if not settings.compare:
        return {"endpoint": Launch(model, run.cloud, name=resource_name("gorgon", run.name, stamp)).run()}
    compare = run.steps.get("compare") or CompareConfig()
    if not isinstance(compare, CompareConfig) or "prepare" not in results:
        raise CloudError("a comparison on endpoints needs the recipe's test prompts", field="endpoint.compare",
                         hint="add a 'prepare' section")  # fmt: skip
    summary = compare_endpoints(
        run.base, model, results["prepare"], run.cloud, run.out / "endpoints", report=report, stamp=stamp,
        prompts=compare.prompts, trials=compare.trials, max_tokens=compare.max_new_tokens, stop=compare.stop,
    )  # fmt: skip
    return {"endpoints": summary}


def _start(aws: Aws, request: Call) -> None:
    try:
        aws.call("sagemaker", "create_training_job", **request.parameters)
    except AwsError as error:
        raise quota_error(aws, error) from error


def _with_results(request: Call, spec: JobSpec, name: str, results: Mapping[str, str]) -> Call:
    """The request under its final name, with the addresses that earlier jobs really wrote to."""
    parameters = json.loads(json.dumps(request.parameters))
    parameters["TrainingJobName"] = name
    sources = {c.name: results[c.job] for c in spec.channels if c.job is not None}
    for channel in parameters["InputDataConfig"]:
        if channel["ChannelName"] in sources:
            channel["DataSource"]["S3DataSource"]["S3Uri"] = sources[channel["ChannelName"]] + "/"
    return Call(request.service, request.operation, parameters).checked()


class _State:
    """What is known of a run's jobs, in `OUT/sagemaker.json`: written before a job is followed, so that nothing that
    costs money is ever forgotten."""

    def __init__(self, out: Path, place: Place) -> None:
        self._path = out / STATE
        document: dict[str, Any] = {}
        if self._path.is_file():
            try:
                document = json.loads(self._path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise CloudError(f"{self._path} is not valid JSON", hint="remove it to start over") from error
        if document.get("bucket") != place.bucket or document.get("region") != place.region:
            document = {"region": place.region, "bucket": place.bucket, "stamp": timestamp(), "jobs": {}}
        self._document = document
        self.stamp: str = document["stamp"]
        self._digests: dict[str, str] = {}

    def digest(self, spec: JobSpec) -> str:
        """Settings and inputs of a step; an earlier step's result counts with its own digest."""
        if spec.step not in self._digests:
            inputs = {
                c.name: self._digests.get(c.job, c.source) if c.job is not None
                else c.source if c.in_s3 else digest_input(c.source)
                for c in spec.channels
            }  # fmt: skip
            text = json.dumps([spec.step, dict(spec.settings), inputs], sort_keys=True)
            self._digests[spec.step] = hashlib.sha256(text.encode()).hexdigest()
        return self._digests[spec.step]

    def job(self, aws: Aws, spec: JobSpec) -> str | None:
        """The name of a job that already does or did this, or None."""
        return self._known(aws, spec, ("Completed", "InProgress", "Stopping"))

    def finished(self, aws: Aws, spec: JobSpec) -> bool:
        """True when the step need not run again."""
        return self._known(aws, spec, ("Completed",)) is not None

    def _known(self, aws: Aws, spec: JobSpec, wanted: tuple[str, ...]) -> str | None:
        entry = self._document["jobs"].get(spec.step)
        digest = self.digest(spec)
        if entry is None or entry["digest"] != digest:
            return None
        try:
            status = aws.call("sagemaker", "describe_training_job", TrainingJobName=entry["name"])["TrainingJobStatus"]
        except AwsError as error:
            if "ValidationException" not in error.code and "NotFound" not in error.code:
                raise
            return None
        return str(entry["name"]) if status in wanted else None

    def next_name(self, spec: JobSpec, run: str) -> str:
        """The job's name; a further attempt gets a number."""
        entry = self._document["jobs"].get(spec.step)
        attempt = 1 if entry is None else entry["attempt"] + 1
        return spec.name if attempt == 1 else resource_name(run, spec.step, self.stamp, str(attempt))

    def started(self, spec: JobSpec, name: str) -> None:
        """Remembers a job."""
        entry = self._document["jobs"].get(spec.step)
        self._document["jobs"][spec.step] = {
            "name": name, "digest": self.digest(spec), "attempt": 1 if entry is None else entry["attempt"] + 1,
        }  # fmt: skip
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, self._document)
