"""A load generator's way to a SageMaker endpoint: streamed invocations, signed by boto3, each tried once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gorgon.cloud.aws import Aws, aws_errors, hint_for
from gorgon.errors import CloudError, RefusedError

CONNECT_S = 10.0
MOST_CONNECTIONS = 512
"""As many as an open loop has requests under way."""
NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")


class StreamBrokenError(ConnectionError):
    """The endpoint broke an answer off."""


class EndpointTransport:
    """Sends a body to an endpoint and yields the lines of its event stream; may be used by several threads."""

    def __init__(self, client: Any, name: str) -> None:
        self._client, self._name = client, name

    def lines(self, body: Mapping[str, Any]) -> Iterator[bytes]:
        """The lines of the answer as they come; a container's JSON lines are made events.

        Raises: RefusedError with the container's own status, or AWS's; CloudError for credentials, OSError when there
            is no answer or it breaks off.
        """
        from botocore import exceptions as e

        with aws_errors("invoke_endpoint_with_response_stream"):
            try:
                answer = self._client.invoke_endpoint_with_response_stream(
                    EndpointName=self._name, ContentType="application/json", Body=json.dumps(body)
                )
                yield from map(_as_event, stream_lines(answer["Body"]))
            except e.EventStreamError as error:
                raise StreamBrokenError(str(error)) from error
            except e.ClientError as error:
                raise _refused(error.response) from error
            except (e.ReadTimeoutError, e.ConnectTimeoutError) as error:
                raise TimeoutError(str(error)) from error
            except e.HTTPClientError as error:
                raise ConnectionError(str(error)) from error

    def close(self) -> None:
        """Nothing: connections belong to the client, which all transports share."""


def connector(name: str, region: str | None, timeout_s: float) -> Callable[[], EndpointTransport]:
    """Makes transports to one endpoint, over one client. AWS's retries are off: an error is part of what is measured.

    Raises: CloudError for a name that no endpoint can have, or a region that there is not.
    """
    if not NAME.fullmatch(name):
        raise CloudError("not the name of an endpoint", field="url", value=name, hint="such as sagemaker://my-endpoint",
                         allowed="1 to 63 letters, digits and dashes")  # fmt: skip
    from botocore.config import Config

    aws = Aws(region)
    client = aws.client(
        "sagemaker-runtime",
        Config(retries={"total_max_attempts": 1}, connect_timeout=CONNECT_S, read_timeout=timeout_s,
               max_pool_connections=MOST_CONNECTIONS),
    )  # fmt: skip
    return lambda: EndpointTransport(client, name)


def stream_lines(events: Any) -> Iterator[bytes]:
    """The lines of a response stream, whose events cut them anywhere."""
    rest = b""
    for event in events:
        rest += event.get("PayloadPart", {}).get("Bytes", b"")
        *lines, rest = rest.split(b"\n")
        yield from lines
    if rest:
        yield rest


def _as_event(line: bytes) -> bytes:
    return b"data: " + line if line.startswith(b"{") else line


def _refused(response: Mapping[str, Any]) -> RefusedError:
    """The container's status where it is the container that refused, AWS's elsewhere."""
    fault, status = response.get("Error", {}), response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
    if response.get("OriginalMessage"):
        return RefusedError(int(response.get("OriginalStatusCode") or status), response["OriginalMessage"])
    text = f"{fault.get('Code')}: {fault.get('Message')}"
    return RefusedError(int(status), text, hint=hint_for(text))
