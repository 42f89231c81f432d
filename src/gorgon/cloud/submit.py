"""A recipe's jobs on SageMaker: uploaded, started, followed and chained; then what its endpoint section asks for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gorgon.artifacts import digest_input, write_json
from gorgon.cloud.aws import Aws, AwsError, resolve_place
from gorgon.cloud.compare import compare_endpoints
from gorgon.cloud.endpoint import create_calls
from gorgon.cloud.job import EXPORT, JobSpec
from gorgon.cloud.jobs import follow, quota_error
from gorgon.cloud.launch import Launch
from gorgon.cloud.plan import Place, final_step, resource_name, result_uri, timestamp
from gorgon.cloud.pricing import guard
from gorgon.cloud.run import CloudRun
from gorgon.cloud.sagemaker import Call, create_training_job
from gorgon.cloud.storage import check_prefix, code_upload, send
from gorgon.config import CompareConfig
from gorgon.errors import CloudError
from gorgon.progress import say

STATE = "sagemaker.json"


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
    for endpoint in run.endpoints(place, state.stamp, jobs):  # not after hours of jobs
        create_calls(endpoint, run.cloud, place, run=run.name)
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
            if name is not None and spec not in waiting:
                results[spec.step] = result_uri(replace(spec, name=name))
                say(f"      unchanged, reused: {results[spec.step]}")
                continue
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
    model = results[final_step(results)]
    served, stamp = results.get(EXPORT, model), timestamp()
    if not settings.compare:
        return {"endpoint": Launch(served, run.cloud, name=resource_name("gorgon", run.name, stamp)).run()}
    compare = run.steps.get("compare")
    summary = compare_endpoints(
        run.base, served, results["prepare"], run.cloud, run.out / "endpoints", report=report, stamp=stamp,
        tuned=model, stop=compare.stop if isinstance(compare, CompareConfig) else (),
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
