"""Training jobs that exist: followed, listed, stopped."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from gorgon.cloud.aws import Aws, hint_for, our_tags
from gorgon.cloud.logs import TRAINING, LogTail
from gorgon.errors import CloudError
from gorgon.progress import say

ENDED = ("Completed", "Failed", "Stopped")


def poll_seconds() -> float:
    """Time between two looks at a job or an endpoint."""
    return float(os.environ.get("GORGON_POLL_SECONDS", "5"))


def follow(aws: Aws, name: str, *, show: Callable[[str], None] = say) -> dict[str, Any]:
    """Shows a job's states and log lines until it ends, and returns its final description.

    Raises: CloudError with the job's own reason when it failed or was stopped. Ctrl-C leaves it running, unless the
        user says otherwise.
    """
    tail, told = LogTail(aws, TRAINING, f"{name}/"), 0
    try:
        while True:
            job = aws.call("sagemaker", "describe_training_job", TrainingJobName=name)
            changes = job.get("SecondaryStatusTransitions", [])  # the whole history: none is missed between two looks
            for change in changes[told:]:
                show(f"{name}: {change['Status']}{_meaning(change['Status'])}")
            told = len(changes)
            for line in tail.new():
                show(f"  {line}")
            if job["TrainingJobStatus"] in ENDED:
                for line in tail.new():
                    show(f"  {line}")
                return _ended(job, name, show)
            time.sleep(poll_seconds())
    except KeyboardInterrupt:
        ask_to_stop(aws, name)
        raise


def _meaning(status: str) -> str:
    if status in ("Interrupted", "Restarting"):
        return ": the spot machine was taken away; the job goes on from its checkpoint"
    return ""


def _ended(job: dict[str, Any], name: str, show: Callable[[str], None]) -> dict[str, Any]:
    status = job["TrainingJobStatus"]
    seconds = job.get("BillableTimeInSeconds")
    if seconds is not None:
        saved = job.get("TrainingTimeInSeconds", seconds) - seconds
        show(f"{name}: {status}, {seconds} s billed" + (f", {saved} s saved by spot" if saved > 0 else ""))
    if status == "Completed":
        return job
    reason = job.get("FailureReason") or job.get("SecondaryStatus") or status
    raise CloudError(
        f"the job '{name}' {'failed' if status == 'Failed' else 'was stopped'}: {reason}", field="job", value=name,
        hint=hint_for(reason) or f"`gorgon jobs logs {name}` shows its log; the same command starts it again",
    )  # fmt: skip


def ask_to_stop(aws: Aws, name: str) -> None:
    """After Ctrl-C: stops the job if the user wants it, else says that it runs on, what it costs to forget, and how to
    come back to it."""
    answer = ""
    if sys.stdin.isatty():
        say(f"\n{name} is still running. Stop it? [y/N]")
        with suppress(KeyboardInterrupt):  # a second Ctrl-C wants to get away, not to stop the job
            answer = sys.stdin.readline().strip().lower()
    if answer in ("y", "yes"):
        stop(aws, name)
        say(f"{name}: stopping; it writes a checkpoint first")
    else:
        say(
            f"{name} runs on, and is billed.\n  see it again: gorgon jobs attach {name}\n"
            f"  end it: gorgon jobs stop {name}"
        )


def stop(aws: Aws, name: str) -> None:
    """Asks a job to stop: it gets SIGTERM and two minutes."""
    aws.call("sagemaker", "stop_training_job", TrainingJobName=name)


def list_jobs(aws: Aws, run: str | None, limit: int = 50) -> list[dict[str, Any]]:
    """Our jobs, newest first: name, status, start, billable seconds, failure."""
    found = []
    parameters = {"SortBy": "CreationTime", "SortOrder": "Descending", **({"NameContains": run} if run else {})}
    for job in aws.pages("sagemaker", "list_training_jobs", "TrainingJobSummaries", **parameters):
        ours = our_tags(aws, job["TrainingJobArn"])
        if ours is None:
            continue
        found.append(
            {"name": job["TrainingJobName"], "status": job["TrainingJobStatus"], "run": ours["gorgon:run"],
             "step": ours.get("gorgon:step"), "created": job["CreationTime"].isoformat(timespec="seconds")}
        )  # fmt: skip
        if len(found) == limit:
            break
    return found


def quota_name(message: str) -> str | None:
    """The quota that AWS's message names, such as `ml.g5.4xlarge for training job usage`."""
    found = re.search(r"'?(ml\.[\w.-]+ for [a-z ]+usage)'?", message)
    return found[1] if found else None


def quota_code(aws: Aws, name: str) -> str | None:
    """The code by which `aws service-quotas request-service-quota-increase` knows a quota, or None."""
    try:
        for quota in aws.pages("service-quotas", "list_service_quotas", "Quotas", ServiceCode="sagemaker"):
            if quota["QuotaName"] == name:
                return str(quota["QuotaCode"])
    except CloudError:  # a help, not a condition
        return None
    return None


def quota_error(aws: Aws, error: CloudError) -> CloudError:
    """The same error with the quota's name and code in the hint, when it is about a quota."""
    name = quota_name(str(error))
    if name is None:
        return error
    code = quota_code(aws, name)
    ask = f"ask for a higher quota '{name}'"
    ask += (
        f": aws service-quotas request-service-quota-increase --service-code sagemaker --quota-code {code} "
        "--desired-value 1" if code else " under Service Quotas, Amazon SageMaker"
    )  # fmt: skip
    return CloudError(str(error), hint=f"{ask}; training, spot, endpoint and warm pool usage are separate quotas")
