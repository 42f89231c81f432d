"""`--dry-run`: every API call that a recipe makes on SageMaker, in order, checked and without credentials."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gorgon.cloud.aws import offline_place
from gorgon.cloud.compare import TUNING
from gorgon.cloud.deploy import artifact_upload
from gorgon.cloud.endpoint import EndpointSpec, create_calls, ending_calls, get_calls, reading_calls
from gorgon.cloud.job import JobSpec
from gorgon.cloud.launch import RUN
from gorgon.cloud.logs import TRAINING
from gorgon.cloud.plan import Place, final_step, result_uri, timestamp
from gorgon.cloud.pricing import guard, price_query
from gorgon.cloud.run import CloudRun
from gorgon.cloud.sagemaker import Call, create_training_job
from gorgon.cloud.storage import code_upload


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
        started = []
        for spec in jobs:
            started.append(
                create_training_job(spec, run.cloud, place, run=run.name, code_uri=code.prefix, uploads=addresses)
            )
            started += _watching(spec.name)
        endpoints = run.endpoints(place, stamp, jobs)
        machines = {spec.resources.instance_type for spec in jobs if spec.resources is not None}
        machines |= {spec.settings.instance_type for spec in endpoints}
        calls += [Call("pricing", "GetProducts", price_query(machine, place.region)) for machine in sorted(machines)]
        for upload in (code, *uploads.values()):
            calls += upload.calls()
    calls += started + _endpoint_calls(run, place, endpoints, jobs)
    cost = guard([*run.costs(jobs, None), *run.endpoint_costs(None)], None)
    return {
        "name": run.name, "region": place.region, "account": place.account, "at_most_usd": cost,
        "calls": [call.document() for call in calls],
    }  # fmt: skip


def _watching(name: str) -> list[Call]:
    """The calls that follow a job until it ends."""
    group = {"logGroupName": TRAINING}
    return [
        Call("sagemaker", "DescribeTrainingJob", {"TrainingJobName": name}, note="every few seconds until it ends"),
        Call("logs", "DescribeLogStreams", {**group, "logStreamNamePrefix": f"{name}/"}, note="as above"),
        Call(
            "logs", "GetLogEvents", {**group, "logStreamName": f"{name}/algo-1-...", "startFromHead": True},
            note="as above",
        ),
    ]  # fmt: skip


def _endpoint_calls(
    run: CloudRun, place: Place, specs: Sequence[EndpointSpec], jobs: Sequence[JobSpec]
) -> list[Call]:  # fmt: skip
    """The calls that deploy, watch, use and delete endpoints."""
    settings = run.cloud.endpoint
    if settings is None:
        return []
    calls, gone = reading_calls(specs[-1].model), []
    calls += _report_calls(jobs) if settings.compare else []
    if specs[-1].artifact:  # one for all of them
        with tempfile.TemporaryDirectory() as folder:
            calls += artifact_upload(specs[-1].artifact, Path(folder)).calls()
    for spec in specs:
        name = {"EndpointName": spec.name}
        calls += create_calls(spec, run.cloud, place, run=RUN)
        calls.append(Call("sagemaker", "DescribeEndpoint", name, note="until it is InService"))
        body = json.dumps({"messages": [{"role": "user", "content": "..."}], "max_tokens": 256})
        how, when = ("InvokeEndpoint", "once a prompt and trial") if settings.compare else (
            "InvokeEndpointWithResponseStream", "as you use it"
        )  # fmt: skip
        invoke = {**name, "ContentType": "application/json", "Body": body}
        calls.append(Call("sagemaker-runtime", how, invoke, note=when))
        gone += ending_calls(spec.name)
    if settings.compare:
        note = "after the comparison, whatever happens"
    elif settings.delete_after_minutes is not None:
        note = f"after {settings.delete_after_minutes} minutes"
    else:
        note = "when you say so: gorgon endpoints delete NAME"
    return calls + [replace(call, note=note) for call in gone]


def _report_calls(jobs: Sequence[JobSpec]) -> list[Call]:
    """What a comparison reads of the jobs' results: the prompts, and what is told of heads and drafts."""
    made = {job.step: result_uri(job) for job in jobs}
    return get_calls([f"{made['prepare']}/test.jsonl", *(f"{made[final_step(made)]}/{name}" for name in TUNING)])
