"""CloudWatch log streams, followed from the beginning, each line once."""

from __future__ import annotations

from collections.abc import Iterator

from gorgon.cloud.aws import Aws, AwsError

TRAINING = "/aws/sagemaker/TrainingJobs"
ENDPOINTS = "/aws/sagemaker/Endpoints"


class LogTail:
    """The lines of all streams of a log group that begin with a prefix; `new` returns those not yet seen."""

    def __init__(self, aws: Aws, group: str, prefix: str = "") -> None:
        self._aws, self._group, self._prefix = aws, group, prefix
        self._tokens: dict[str, str | None] = {}

    def new(self) -> Iterator[str]:
        """Lines that have come since the last call; none while the streams do not exist yet."""
        try:
            found = self._aws.pages(
                "logs", "describe_log_streams", "logStreams", logGroupName=self._group,
                **({"logStreamNamePrefix": self._prefix} if self._prefix else {}),
            )  # fmt: skip
            for stream in found:
                self._tokens.setdefault(stream["logStreamName"], None)
        except AwsError as error:
            if error.code != "ResourceNotFoundException":  # the group comes with the first line
                raise
            return
        for name in self._tokens:
            yield from self._read(name)

    def _read(self, stream: str) -> Iterator[str]:
        while True:
            token = self._tokens[stream]
            answer = self._aws.call(
                "logs", "get_log_events", logGroupName=self._group, logStreamName=stream, startFromHead=True,
                **({"nextToken": token} if token else {}),
            )  # fmt: skip
            for event in answer["events"]:
                yield event["message"].rstrip("\n")
            self._tokens[stream] = answer["nextForwardToken"]
            if not answer["events"] or answer["nextForwardToken"] == token:
                return
