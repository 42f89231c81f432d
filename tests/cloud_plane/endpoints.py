"""An endpoint that really serves: model files from S3 in /opt/ml, the container's server, health check, runtime."""

import socket
import struct
import threading
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

from tests.cloud_plane.sandbox import Container

FRONT = Path(__file__).parent / "djl_front.py"
STAND_IN = Path(__file__).parent / "stand_in.py"
STAND_INS = {"me/stand-in:1.0"}
"""Images that run a server without a model, for tests of what stands around a model."""


class Endpoint(threading.Thread):
    def __init__(self, plane, name, request, config, model):
        super().__init__(daemon=True)
        self.plane, self.name, self.config, self.model = plane, name, config, model
        self.config_name = request["EndpointConfigName"]
        self.root = Path(plane.root) / "endpoints" / name
        self.status, self.reason, self.created = "Creating", None, time.time()
        self.container, self.closed = None, False
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def describe(self):
        from tests.cloud_plane.plane import ACCOUNT, REGION

        reason = {"FailureReason": self.reason} if self.reason else {}
        return {
            "EndpointName": self.name,
            "EndpointArn": f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:endpoint/{self.name.lower()}",
            "EndpointConfigName": self.config_name, "EndpointStatus": self.status, "CreationTime": self.created,
            "LastModifiedTime": self.created, **reason,
        }  # fmt: skip

    def close(self):
        self.closed = True
        if self.container is not None:
            self.container.kill()

    def run(self):
        primary = self.model["PrimaryContainer"]
        sources = {"model": primary["ModelDataSource"]} if "ModelDataSource" in primary else {}
        for more in primary.get("AdditionalModelDataSources", []):
            sources[f"additional-model-data-sources/{more['ChannelName']}"] = more
        for place, source in sources.items():
            uri = source["S3DataSource"]["S3Uri"]
            if not self.plane.store.copy_out(uri, self.root / "ml" / place):
                self._failed(f"Could not find model data at {uri}.")
                return
        if "djl-inference" in primary["Image"]:
            command = [str(Path(self.plane.image_bin) / "python3"), str(FRONT), str(self.port)]
        elif primary["Image"] in STAND_INS:
            command = [str(Path(self.plane.image_bin) / "python3"), str(STAND_IN), str(self.port)]
        else:
            command = ["gorgon", "serve", "/opt/ml/model", "--port", str(self.port)]
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / "ml").mkdir(exist_ok=True)
        log = self.root / "container.log"
        with log.open("w") as output:
            self.container = Container(
                command, self.root, self.plane.image_bin,
                {"SAGEMAKER_BIND_TO_PORT": str(self.port), **primary.get("Environment", {})}, output,
            )  # fmt: skip
        limit = self.config["ProductionVariants"][0]["ContainerStartupHealthCheckTimeoutInSeconds"]
        until = time.monotonic() + limit
        while not self._healthy():
            if self.container.process.poll() is not None or time.monotonic() > until or self.closed:
                self._log()
                self._failed(
                    "The primary container for production variant main did not pass the ping health check. Please "
                    "check CloudWatch logs for this endpoint."
                )
                return
            time.sleep(0.1)
        self._log()
        self.status = "InService"

    def _failed(self, reason):
        self.reason = reason
        self.status = "Failed"

    def _log(self):
        for line in (self.root / "container.log").read_text().splitlines():
            self.plane.log(f"/aws/sagemaker/Endpoints/{self.name}", "main/i-1", line)

    def _healthy(self):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ping", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False

    def ask(self, body, content_type):
        """Status, and the open answer of the container."""
        return ask(self.port, body, content_type)


class Attached:
    """An endpoint whose server runs already, in the test's own process."""

    status = "InService"

    def __init__(self, port):
        self.port = port

    def ask(self, body, content_type):
        return ask(self.port, body, content_type)

    def close(self):
        pass


def ask(port, body, content_type):
    """Status, and the open answer, of the server at this port."""
    url = f"http://127.0.0.1:{port}/invocations"
    request = urllib.request.Request(url, body, {"Content-Type": content_type or "application/json"})
    try:
        return 200, urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        return error.code, error


def stream_frames(answer):
    """What the container sends, piece by piece, in frames of application/vnd.amazon.eventstream."""
    while piece := answer.read1(65536):
        yield frame(piece)


def frame(payload, message="event", kind="PayloadPart"):
    """One event, a PayloadPart unless told: lengths, checksums and headers as the format has them."""
    headers = b""
    for key, value in (
        (f":{message}-type", kind),
        (":content-type", "application/octet-stream" if message == "event" else "application/json"),
        (":message-type", message),
    ):
        headers += struct.pack("!B", len(key)) + key.encode() + struct.pack("!BH", 7, len(value)) + value.encode()
    prelude = struct.pack("!II", len(headers) + len(payload) + 16, len(headers))
    message = prelude + struct.pack("!I", zlib.crc32(prelude)) + headers + payload
    return message + struct.pack("!I", zlib.crc32(message))
