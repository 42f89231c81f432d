"""The control plane: AWS's wire protocols on one loopback port, told apart as AWS tells them apart.

SageMaker, logs, scaling, quotas, prices and the registry speak JSON 1.1 with an `X-Amz-Target` header; STS and IAM the
query protocol; the runtime and S3 are REST. Clients are unmodified boto3 with AWS_ENDPOINT_URL set.
"""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from tests.cloud_plane.endpoints import Endpoint, stream_frames
from tests.cloud_plane.jobs import Job
from tests.cloud_plane.store import Store

ACCOUNT, REGION = "123456789012", "us-east-1"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/gorgon-execution"
BUCKET = f"sagemaker-{REGION}-{ACCOUNT}"
SECRET = "AWS4-HMAC-SHA256"


class Fault(Exception):  # noqa: N818 - an answer, not an error of ours
    """An error answer: AWS's name for it, and its words."""

    def __init__(self, code, message, status=400, **more):
        self.code, self.message, self.status, self.more = code, message, status, more


class Plane:
    """All state of the account: resources, objects, logs, prices, quotas; `fail` makes an operation refuse."""

    def __init__(self, root, image_bin):
        self.root, self.image_bin = Path(root), image_bin
        self.store = Store(self.root / "s3")
        (self.store.root / BUCKET).mkdir(parents=True)
        self.jobs, self.models, self.configs, self.endpoints, self.scaling = {}, {}, {}, {}, {}
        self.tags, self.logs, self.requests = {}, {}, []
        self.made = set()  # names of the operations that were called, of all services
        self.fail, self.prices, self.quotas = {}, {}, {}
        self.trust, self.caller = "sagemaker.amazonaws.com", f"arn:aws:iam::{ACCOUNT}:user/tester"
        self.missing_images = set()
        # The images hold every dependency, and pip takes seconds to find that out: one test lets it look.
        self.inside = {"PIP_NO_DEPS": "1"}
        self.images = {}  # images of the account's own: name -> the directory of its commands
        self.lock = threading.RLock()
        self.server = _Server(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self):
        for running in (*self.jobs.values(), *self.endpoints.values()):
            running.close()
        self.server.shutdown()
        self.server.server_close()

    def environment(self):
        """What a client needs to find us instead of AWS."""
        return {
            "AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": REGION, "AWS_EC2_METADATA_DISABLED": "true", "GORGON_POLL_SECONDS": "0.05",
            "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "GORGON_SAGEMAKER_ROLE": ROLE,
        }  # fmt: skip

    def log(self, group, stream, line):
        with self.lock:
            self.logs.setdefault(group, {}).setdefault(stream, []).append((int(time.time() * 1000), line))

    def left(self):
        """Every resource that is still there, objects in S3 aside."""
        running = [name for name, job in self.jobs.items() if job.status in ("InProgress", "Stopping")]
        return {
            "jobs": running, "models": list(self.models), "configs": list(self.configs),
            "endpoints": list(self.endpoints), "scaling": list(self.scaling),
        }  # fmt: skip

    def operation(self, name, request):
        """One JSON 1.1 operation."""
        with self.lock:
            self.requests.append((name, request))
        if name in self.fail:
            raise self.fail[name] if isinstance(self.fail[name], Fault) else self.fail[name](request)
        method = getattr(self, f"do_{name}", None)
        if method is None:
            raise Fault("UnknownOperationException", f"the control plane does not know {name}")
        return method(request)

    # training jobs

    def do_CreateTrainingJob(self, request):
        name = request["TrainingJobName"]
        if name in self.jobs:
            raise Fault("ResourceInUse", f"Training job names must be unique within an AWS account: {name}")
        if request["RoleArn"] != ROLE:
            raise Fault("ValidationException", f"Could not assume role {request['RoleArn']}.")
        self.jobs[name] = Job(self, request)
        arn = self._arn("training-job", name, request)
        self.jobs[name].start()
        return {"TrainingJobArn": arn}

    def do_DescribeTrainingJob(self, request):
        return self._job(request).describe()

    def do_StopTrainingJob(self, request):
        self._job(request).stop()
        return {}

    def do_ListTrainingJobs(self, request):
        found = [j.summary() for n, j in self.jobs.items() if request.get("NameContains", "") in n]
        return {"TrainingJobSummaries": sorted(found, key=lambda j: -j["CreationTime"])}

    def _job(self, request):
        if request["TrainingJobName"] not in self.jobs:
            raise Fault("ValidationException", "Requested resource not found.")
        return self.jobs[request["TrainingJobName"]]

    # endpoints

    def do_CreateModel(self, request):
        self._new(self.models, request, "ModelName", "model")
        return {"ModelArn": self._arn("model", request["ModelName"], request)}

    def do_CreateEndpointConfig(self, request):
        for variant in request["ProductionVariants"]:
            self._get(self.models, variant["ModelName"], "model")
        self._new(self.configs, request, "EndpointConfigName", "endpoint configuration")
        return {"EndpointConfigArn": self._arn("endpoint-config", request["EndpointConfigName"], request)}

    def do_CreateEndpoint(self, request):
        name = request["EndpointName"]
        config = self._get(self.configs, request["EndpointConfigName"], "endpoint configuration")
        model = self._get(self.models, config["ProductionVariants"][0]["ModelName"], "model")
        if name in self.endpoints:
            raise Fault("ValidationException", f'Cannot create already existing endpoint "{name}".')
        self.endpoints[name] = Endpoint(self, name, request, config, model)
        arn = self._arn("endpoint", name, request)
        self.endpoints[name].start()
        return {"EndpointArn": arn}

    def do_DescribeModel(self, request):
        return {
            **self._get(self.models, request["ModelName"], "model"),
            "CreationTime": time.time(),
            "ModelArn": "a" * 20,
        }

    def do_DescribeEndpointConfig(self, request):
        found = self._get(self.configs, request["EndpointConfigName"], "endpoint configuration")
        return {**found, "CreationTime": time.time(), "EndpointConfigArn": "a" * 20}

    def do_DescribeEndpoint(self, request):
        return self._get(self.endpoints, request["EndpointName"], "endpoint").describe()

    def do_ListEndpoints(self, request):
        return {"Endpoints": [e.describe() for e in self.endpoints.values()]}

    def do_DeleteModel(self, request):
        self._get(self.models, request["ModelName"], "model")
        del self.models[request["ModelName"]]
        return {}

    def do_DeleteEndpointConfig(self, request):
        self._get(self.configs, request["EndpointConfigName"], "endpoint configuration")
        del self.configs[request["EndpointConfigName"]]
        return {}

    def do_DeleteEndpoint(self, request):
        self._get(self.endpoints, request["EndpointName"], "endpoint").close()
        del self.endpoints[request["EndpointName"]]
        return {}

    def do_ListTags(self, request):
        return {"Tags": self.tags.get(request["ResourceArn"], [])}

    def _new(self, kind, request, key, word):
        if request[key] in kind:
            raise Fault("ValidationException", f'Cannot create already existing {word} "{request[key]}".')
        kind[request[key]] = request

    def _get(self, kind, name, word):
        if name not in kind:
            raise Fault("ValidationException", f'Could not find {word} "{name}".')
        return kind[name]

    def _arn(self, kind, name, request):
        arn = f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:{kind}/{name.lower()}"
        self.tags[arn] = request.get("Tags", [])
        return arn

    # the services around SageMaker

    def do_DescribeLogStreams(self, request):
        if request["logGroupName"] not in self.logs:
            raise Fault("ResourceNotFoundException", "The specified log group does not exist.")
        prefix = request.get("logStreamNamePrefix", "")
        names = [name for name in self.logs[request["logGroupName"]] if name.startswith(prefix)]
        return {"logStreams": [{"logStreamName": name} for name in names]}

    def do_GetLogEvents(self, request):
        lines = self.logs[request["logGroupName"]][request["logStreamName"]]
        start = int(request.get("nextToken", "f/0").removeprefix("f/"))
        page = lines[start : start + 100]
        events = [{"timestamp": t, "message": line, "ingestionTime": t} for t, line in page]
        return {"events": events, "nextForwardToken": f"f/{start + len(page)}", "nextBackwardToken": "b/0"}

    def do_RegisterScalableTarget(self, request):
        name = request["ResourceId"].split("/")[1]
        if name not in self.endpoints or self.endpoints[name].status != "InService":
            raise Fault("ValidationException", "Could not find the endpoint to scale.")
        self.scaling[request["ResourceId"]] = {}
        return {}

    def do_PutScalingPolicy(self, request):
        self._get(self.scaling, request["ResourceId"], "scalable target")[request["PolicyName"]] = request
        return {"PolicyARN": "arn", "Alarms": []}

    def do_DeregisterScalableTarget(self, request):
        if request["ResourceId"] not in self.scaling:
            raise Fault("ObjectNotFoundException", "No scalable target found.")
        del self.scaling[request["ResourceId"]]
        return {}

    def do_ListServiceQuotas(self, request):
        return {"Quotas": [{"QuotaName": n, "QuotaCode": c, "Value": v} for n, (c, v) in self.quotas.items()]}

    def do_GetProducts(self, request):
        wanted = {f["Field"]: f["Value"] for f in request["Filters"]}
        rows = self.prices.get(wanted["instanceName"], {})
        return {"FormatVersion": "aws_v1", "PriceList": [_product(usage, usd) for usage, usd in rows.items()]}

    def do_BatchGetImage(self, request):
        tag = request["imageIds"][0].get("imageTag")
        name = f"{request['repositoryName']}:{tag}"
        return {"images": [] if name in self.missing_images else [{"imageId": {"imageTag": tag}}], "failures": []}

    def query(self, form):
        """STS and IAM."""
        action = form["Action"][0]
        if action in self.fail:
            raise self.fail[action]
        if action == "GetCallerIdentity":
            inner = f"<UserId>U</UserId><Account>{ACCOUNT}</Account><Arn>{self.caller}</Arn>"
        else:
            trust = json.dumps({"Statement": [{"Principal": {"Service": self.trust}}]}).replace('"', "%22")
            inner = (
                f"<Role><Path>/</Path><RoleName>r</RoleName><RoleId>i</RoleId><Arn>{ROLE}</Arn>"
                f"<CreateDate>2026-01-01T00:00:00Z</CreateDate>"
                f"<AssumeRolePolicyDocument>{trust}</AssumeRolePolicyDocument></Role>"
            )
        return f"<{action}Response><{action}Result>{inner}</{action}Result></{action}Response>".encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that was killed is no fault of ours."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _operation(target, method, path, body):
    """AWS's name for a request; the parts of a large upload count as PutObject."""
    if target is not None:
        return target.rpartition(".")[2]
    if path.startswith("/endpoints/"):
        return "InvokeEndpoint" if path.endswith("/invocations") else "InvokeEndpointWithResponseStream"
    if b"Action=" in body and path == "/":
        return parse_qs(body.decode())["Action"][0]
    if method == "GET":
        return "GetObject" if urlsplit(path).path.strip("/").count("/") else "ListObjectsV2"
    return "PutObject" if method in ("PUT", "POST") else f"{method.title()}Object"


def _product(usage, usd):
    terms = {"OnDemand": {"t": {"priceDimensions": {"d": {"unit": "Hrs", "pricePerUnit": {"USD": str(usd)}}}}}}
    return json.dumps({"product": {"attributes": {"usagetype": usage}}, "terms": terms})


def _handler(plane):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_arguments):
            pass

        def _any(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            target = self.headers.get("X-Amz-Target")
            try:
                plane.made.add(_operation(target, self.command, self.path, body))
                if target is not None:
                    answer = plane.operation(target.rpartition(".")[2], json.loads(body or b"{}"))
                    self._send(200, {"Content-Type": "application/x-amz-json-1.1"}, json.dumps(answer).encode())
                elif self.path.startswith("/endpoints/"):
                    self._invoke(body)
                elif b"Action=" in body and self.path == "/":
                    self._send(200, {"Content-Type": "text/xml"}, plane.query(parse_qs(body.decode())))
                else:
                    self._send(*plane.store.answer(self.command, self.path, self.headers, body))
            except Fault as fault:
                document = {"__type": fault.code, "message": fault.message, "Message": fault.message, **fault.more}
                if target is None and not self.path.startswith("/endpoints/"):
                    error = f"<Error><Code>{fault.code}</Code><Message>{fault.message}</Message></Error>"
                    self._send(fault.status, {}, f"<ErrorResponse>{error}</ErrorResponse>".encode())
                else:
                    self._send(fault.status, {"x-amzn-ErrorType": fault.code}, json.dumps(document).encode())

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _any

        def _send(self, status, headers, body):
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _invoke(self, body):
            _, _, name, how = self.path.split("/", 3)
            if name not in plane.endpoints or plane.endpoints[name].status != "InService":
                raise Fault("ValidationError", f"Endpoint {name} of account {ACCOUNT} not found.")
            status, answer = plane.endpoints[name].ask(body, self.headers.get("Content-Type"))
            if status != 200:
                text = answer.read().decode()
                raise Fault(
                    "ModelError", f"Received client error ({status}) from primary with message \"{text}\".", 424,
                    OriginalStatusCode=status, OriginalMessage=text, LogStreamArn="",
                )  # fmt: skip
            if how == "invocations":
                self._send(200, {"Content-Type": answer.headers.get("Content-Type")}, answer.read())
                return
            self.send_response(200)
            self.send_header("Content-Type", "application/vnd.amazon.eventstream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for frame in stream_frames(answer):
                self.wfile.write(f"{len(frame):x}\r\n".encode() + frame + b"\r\n")
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")

    return Handler
