"""Endpoints that exist: deployed with cleanup after a failure, listed, described, invoked, deleted whole."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from gorgon.cloud.aws import Aws, AwsError, aws_errors, hint_for, our_tags
from gorgon.cloud.config import SageMakerConfig
from gorgon.cloud.endpoint import EndpointSpec, artifact_files, create_calls, scalable_target, scaling_calls
from gorgon.cloud.jobs import poll_seconds, quota_error
from gorgon.cloud.logs import ENDPOINTS, LogTail
from gorgon.cloud.plan import Place
from gorgon.cloud.pricing import Cost, price_of
from gorgon.cloud.runtime import stream_lines
from gorgon.cloud.storage import ASSETS, Upload
from gorgon.cloud.wheel import build_wheel, package_digest
from gorgon.errors import CloudError
from gorgon.progress import say

LOG_LINES = 30
DELETE_SECONDS = 900
"""Longest wait for an endpoint to be gone."""
DELETE_AT = "gorgon:delete-at"


def artifact_prefix(place: Place, run: str) -> str:
    """Where the DJL handler and our wheel lie, named by their contents: every endpoint of the same code reads them."""
    return place.uri(run, "serving", package_digest())


def artifact_upload(prefix: str, folder: Path) -> Upload:
    """The DJL handler and our wheel, to go under an S3 prefix.

    Args: folder: a directory that the files are made in.
    """
    files = {}
    for name, content in artifact_files(build_wheel(folder), ASSETS).items():
        path = content if isinstance(content, Path) else folder / name
        if isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        files[f"{prefix}/{name}"] = path
    return Upload(prefix, files)


def endpoint_cost(spec: EndpointSpec, cloud: SageMakerConfig, aws: Aws | None) -> Cost:
    """What an endpoint costs: for ever, unless it is to be deleted after a time."""
    settings = spec.settings
    price = price_of(settings.instance_type, "endpoint", cloud.price_per_hour, aws=aws)
    hours = None if settings.delete_after_minutes is None else settings.delete_after_minutes / 60
    return Cost(spec.name, price, settings.instance_count, hours, f"gorgon endpoints delete {spec.name}")


def deploy(aws: Aws, specs: Sequence[EndpointSpec], cloud: SageMakerConfig, place: Place, *, run: str) -> None:
    """Creates endpoints, all of them at once, and waits until every one serves.

    Raises: CloudError when one does not come up, after showing the last lines of its log. Whatever goes wrong, also a
        Ctrl-C, nothing of any of them is left.
    """
    begun: list[str] = []
    try:
        for spec in specs:
            _begin(aws, spec, cloud, place, run, begun)
        for spec in specs:
            wait(aws, spec.name)
            for call in scaling_calls(spec):  # there is nothing to scale before it serves
                aws.call(call.service, _snake(call.operation), **call.parameters)
    except BaseException as error:
        for name in begun:
            clean_up(aws, name)
        if isinstance(error, CloudError):
            raise quota_error(aws, error) from error
        raise
    for spec in specs:
        say(
            f"{spec.name}: in service\n  use it: gorgon endpoints invoke {spec.name} 'your question'\n"
            f"  end it: gorgon endpoints delete {spec.name}"
        )


def _begin(
    aws: Aws, spec: EndpointSpec, cloud: SageMakerConfig, place: Place, run: str, begun: list[str]
) -> None:  # fmt: skip
    """Model, configuration and endpoint, without waiting. A name that is somebody's already is not ours to delete."""
    minutes = spec.settings.delete_after_minutes
    if minutes is not None:
        until = datetime.now(UTC) + timedelta(minutes=minutes)
        spec = replace(spec, labels={**spec.labels, DELETE_AT: until.strftime("%Y-%m-%dT%H:%MZ")})
    begun.append(spec.name)
    for call in create_calls(spec, cloud, place, run=run):
        if call.service != "sagemaker":
            continue
        try:
            aws.call(call.service, _snake(call.operation), **call.parameters)
        except AwsError as error:
            if error.code == "ValidationException" and "already exist" in str(error):
                begun.remove(spec.name)
            raise


def clean_up(aws: Aws, name: str) -> None:
    """Deletes whatever there is of an endpoint, and says how to go on if something cannot be."""
    say(f"{name}: cleaning up")
    left = delete(aws, name, missing_ok=True)
    if left:
        say(f"{name}: could not delete {', '.join(left)}: gorgon endpoints delete {name}")


def wait(aws: Aws, name: str) -> None:
    """Until the endpoint serves. Raises CloudError with its log's end when it fails."""
    state = ""
    while True:
        endpoint = aws.call("sagemaker", "describe_endpoint", EndpointName=name)
        if endpoint["EndpointStatus"] != state:
            state = endpoint["EndpointStatus"]
            say(f"{name}: {state}")
        if state == "InService":
            return
        if state not in ("Creating", "Updating", "SystemUpdating", "RollingBack"):
            reason = endpoint.get("FailureReason", state)
            lines = log_lines(aws, name)[-LOG_LINES:]
            say(
                "\n".join(["the last lines of its log:", *(f"  {line}" for line in lines)])
                if lines
                else "it has no log"
            )
            text = f"{reason}\n" + "\n".join(lines)
            raise CloudError(
                f"the endpoint '{name}' did not come up: {reason}", field="endpoint", value=name, hint=hint_for(text)
            )
        time.sleep(poll_seconds())


def log_lines(aws: Aws, name: str) -> list[str]:
    """Everything the endpoint's containers have logged."""
    return list(LogTail(aws, f"{ENDPOINTS}/{name}").new())


def delete(aws: Aws, name: str, *, missing_ok: bool = False) -> list[str]:
    """Deletes endpoint, configuration and model, waits until the endpoint is gone, and returns what could not be.

    A part that cannot be deleted does not keep the others.
    Raises: CloudError when there is no such endpoint at all and `missing_ok` is false.
    """
    left, found = [], 0
    try:
        config = aws.call("sagemaker", "describe_endpoint", EndpointName=name)["EndpointConfigName"]
        variants = aws.call("sagemaker", "describe_endpoint_config", EndpointConfigName=config)["ProductionVariants"]
        models = [v["ModelName"] for v in variants if "ModelName" in v]
    except CloudError:
        config, models = name, [name]
    calls: list[tuple[str, str, dict[str, Any]]] = [
        ("application-autoscaling", "deregister_scalable_target", dict(scalable_target(name))),
        ("sagemaker", "delete_endpoint", {"EndpointName": name}),
        ("sagemaker", "delete_endpoint_config", {"EndpointConfigName": config}),
        *(("sagemaker", "delete_model", {"ModelName": model}) for model in models),
    ]
    for service, operation, parameters in calls:
        try:
            aws.call(service, operation, **parameters)
            found += service == "sagemaker"
        except CloudError as error:
            code = getattr(error, "code", "")
            gone = code == "ObjectNotFoundException" or "Could not find" in str(error)
            if not gone and service == "sagemaker":
                left.append(f"{operation.removeprefix('delete_')} ({error})")
    if not found and not left and not missing_ok:
        raise CloudError(
            "there is no such endpoint", field="endpoint", value=name, hint="`gorgon endpoints list` shows them"
        )
    if found and not _gone(aws, name):
        left.append("endpoint (still being deleted)")
    return left


def _gone(aws: Aws, name: str) -> bool:
    """Waits until there is no such endpoint; False when it takes too long or nobody may look."""
    end = time.monotonic() + DELETE_SECONDS
    while time.monotonic() < end:
        try:
            aws.call("sagemaker", "describe_endpoint", EndpointName=name)
        except AwsError as error:
            return error.code == "ValidationException"
        time.sleep(poll_seconds())
    return False


def list_endpoints(aws: Aws) -> list[dict[str, Any]]:
    """Our endpoints in this region: name, status, age, machine, when they are to be deleted, whether that is past."""
    found = []
    for endpoint in aws.pages("sagemaker", "list_endpoints", "Endpoints"):
        ours = our_tags(aws, endpoint["EndpointArn"])
        if ours is None:
            continue
        created = endpoint["CreationTime"]
        delete_at = ours.get(DELETE_AT)
        overdue = delete_at is not None and delete_at <= datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ")
        found.append(
            {"name": endpoint["EndpointName"], "status": endpoint["EndpointStatus"], "run": ours["gorgon:run"],
             "created": created.isoformat(timespec="seconds"), "delete_at": delete_at, "overdue": overdue}
        )  # fmt: skip
    return found


def invoke(aws: Aws, name: str, request: dict[str, Any]) -> Any:
    """One request, one answer, both JSON.

    Raises: CloudError with the container's own message when it refuses.
    """
    with _model_errors():
        answer = aws.client("sagemaker-runtime").invoke_endpoint(
            EndpointName=name, ContentType="application/json", Body=json.dumps(request)
        )
        return json.loads(answer["Body"].read())


def invoke_stream(aws: Aws, name: str, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pieces of a streamed answer as they come: JSON lines, or server-sent events.

    Raises: CloudError with the container's own message when it refuses or breaks off.
    """
    with _model_errors():
        answer = aws.client("sagemaker-runtime").invoke_endpoint_with_response_stream(
            EndpointName=name, ContentType="application/json", Body=json.dumps({**request, "stream": True})
        )
        for line in stream_lines(answer["Body"]):
            text = line.removeprefix(b"data:").strip()
            if text and text != b"[DONE]":
                yield json.loads(text)


class _model_errors:  # noqa: N801 - used as a function
    """Shows what the container answered instead of botocore's wrapping of it."""

    def __enter__(self) -> None:
        self._inner: Any = aws_errors("invoke_endpoint")
        self._inner.__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        response = getattr(error, "response", None)
        if response and response.get("Error", {}).get("Code") == "ModelError":
            message = response.get("OriginalMessage") or response["Error"].get("Message", "")
            status = response.get("OriginalStatusCode", "")
            raise CloudError(f"the endpoint answered {status}: {message}", field="endpoint") from error
        return bool(self._inner.__exit__(kind, error, trace))


@contextmanager
def ends_on_sigterm() -> Iterator[None]:
    """Within the block SIGTERM is a Ctrl-C, so that what was created is deleted before the process goes."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # Python's rule for signal handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def keep_until_deleted(aws: Aws, name: str, minutes: int, *, sleep: Callable[[float], None] = time.sleep) -> None:
    """Waits, then deletes the endpoint; a Ctrl-C deletes it at once. Only this process does: if it is killed, the
    endpoint stays, tagged with its time, and `gorgon endpoints delete --overdue` takes it away."""
    say(f"{name}: will be deleted in {minutes} minutes; keep this command running, Ctrl-C deletes it now")
    try:
        sleep(60 * minutes)
    finally:
        delete(aws, name, missing_ok=True)
        say(f"{name}: deleted")


def _snake(operation: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in operation).removeprefix("_")
