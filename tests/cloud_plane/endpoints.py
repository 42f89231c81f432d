"""An endpoint that really serves: model files from S3 in /opt/ml, the container's server, health check, runtime."""

import contextlib
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

from tests.cloud_plane.sandbox import Container

FRONT = Path(__file__).parent / "djl_front.py"
STAND_IN = Path(__file__).parent / "stand_in.py"
STAND_INS = re.compile(r"^me/stand-in:|/(vllm|huggingface-pytorch-tgi-inference):")
"""Images that run a server without a model: one for tests of what stands around a model, and in the place of vLLM and
TGI one that looks for what they look for."""
HOST = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
"""SageMaker reaches a container from outside: a server that listens on 127.0.0.1 alone is not found here."""
PORT = 8080
DOCKERFILE = Path(__file__).parents[2] / "Dockerfile"
GRACE = 30
"""Seconds between SIGTERM and SIGKILL."""
OWN = {"GORGON_STEPS": "eager", "GORGON_WARMUP": "false"}
"""The images' own variables: compiling takes half a minute, and has tests elsewhere."""
_port_8080 = threading.Lock()


def entrypoint():
    """What our Dockerfile says."""
    return json.loads(re.search(r"^ENTRYPOINT (.+)$", DOCKERFILE.read_text(), re.MULTILINE)[1])


class Endpoint(threading.Thread):
    def __init__(self, plane, name, request, config, model):
        super().__init__(daemon=True)
        self.plane, self.name, self.config, self.model = plane, name, config, model
        self.config_name = request["EndpointConfigName"]
        self.root = Path(plane.root) / "endpoints" / name
        self.status, self.reason, self.created = "Creating", None, time.time()
        self.container, self.closed, self.own_image = None, False, False
        self.port = _free(0)

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
            if self.own_image and self.container.process.poll() is None:
                self.container.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.container.wait(GRACE)
            self.container.kill()
        if self.port == PORT:
            _port_8080.release()
            self.port = None

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
        elif STAND_INS.search(primary["Image"]):
            command = [str(Path(self.plane.image_bin) / "python3"), str(STAND_IN), str(self.port)]
        else:
            self.own_image, command = True, [*entrypoint(), "serve"]
            if _port_8080.acquire(blocking=False):  # the contract's port if nobody has it, else the contract's variable
                if _free(PORT):
                    self.port = PORT
                else:
                    _port_8080.release()
        port = {} if self.port == PORT else {"SAGEMAKER_BIND_TO_PORT": str(self.port)}
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / "ml" / "model").mkdir(parents=True, exist_ok=True)
        log = self.root / "container.log"
        with log.open("w") as output:
            self.container = Container(
                command, self.root, self.plane.images.get(primary["Image"], self.plane.image_bin),
                {**self.plane.inside, **OWN, "MODEL_DIR": "/opt/ml/model", **port, **primary.get("Environment", {})},
                output,
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
            with urllib.request.urlopen(f"http://{HOST}:{self.port}/ping", timeout=2) as answer:
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
        return ask(self.port, body, content_type, "127.0.0.1")

    def close(self):
        pass


def ask(port, body, content_type, host=HOST):
    """Status, and the open answer, of the server at this port."""
    url = f"http://{host}:{port}/invocations"
    request = urllib.request.Request(url, body, {"Content-Type": content_type or "application/json"})
    try:
        return 200, urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        return error.code, error


def _free(port):
    """The port, or any for 0, if nobody listens there; else None."""
    with socket.socket() as free:
        try:
            free.bind(("", port))
        except OSError:
            return None
        return free.getsockname()[1]


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
