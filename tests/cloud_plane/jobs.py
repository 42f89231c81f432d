"""A training job that really runs: channels from S3, the request's own entry point, stop, spot, failure, results."""

import shutil
import threading
import time
from pathlib import Path

from gorgon.cloud.layout import Layout
from tests.cloud_plane.sandbox import Container

GROUP = "/aws/sagemaker/TrainingJobs"
GRACE = 120
"""Seconds between SIGTERM and SIGKILL."""


class Job(threading.Thread):
    def __init__(self, plane, request):
        super().__init__(daemon=True)
        self.plane, self.request, self.name = plane, request, request["TrainingJobName"]
        self.root = Path(plane.root) / "jobs" / self.name
        self.status, self.reason, self.transitions = "InProgress", None, []
        self.secondary = "Starting"
        self.created, self.begun, self.ended, self.attempts = time.time(), None, None, 0
        self.container, self._stopping, self._interrupted = None, False, False

    # what the service shows

    @property
    def secondary(self):
        return self.transitions[-1]["Status"]

    @secondary.setter
    def secondary(self, status):
        if not self.transitions or self.secondary != status:
            self.transitions.append({"Status": status, "StartTime": time.time(), "StatusMessage": status})

    def describe(self):
        given = {k: v for k, v in self.request.items() if k not in ("Tags",)}
        seconds = int((self.ended or time.time()) - (self.begun or time.time()))
        times = {"TrainingTimeInSeconds": seconds, "BillableTimeInSeconds": seconds} if self.ended else {}
        reason = {"FailureReason": self.reason} if self.reason else {}
        artifacts = f"{self.request['OutputDataConfig']['S3OutputPath']}/{self.name}/output/model"
        return {
            **given, **self.summary(), "SecondaryStatus": self.secondary, **times, **reason,
            "SecondaryStatusTransitions": self.transitions,
            "ModelArtifacts": {"S3ModelArtifacts": artifacts},
        }  # fmt: skip

    def summary(self):
        from tests.cloud_plane.plane import ACCOUNT, REGION

        arn = f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:training-job/{self.name.lower()}"
        return {
            "TrainingJobName": self.name, "TrainingJobArn": arn, "CreationTime": self.created,
            "TrainingJobStatus": self.status,
        }  # fmt: skip

    # what happens to it

    def stop(self):
        if self.ended is None:
            self.status, self.secondary, self._stopping = "Stopping", "Stopping", True
            self._signal()

    def interrupt(self):
        """Takes the spot machine away."""
        self._interrupted = True
        self._signal()

    def close(self):
        if self.container is not None:
            self.container.kill()

    def _signal(self):
        if self.container is not None:
            self.container.terminate()
            timer = threading.Timer(GRACE, self.container.kill)
            timer.daemon = True
            timer.start()

    # its life

    def run(self):
        try:
            while True:
                code = self._attempt()
                if not (self._interrupted and code is not None):
                    break
                self._interrupted, self.secondary = False, "Restarting"
                time.sleep(0.3)
            self._finish(code)
        except Exception as error:  # noqa: BLE001 - a fault of ours must not look like a job that never ends
            self._end("Failed", "Failed", f"InternalServerError: {error!r}")

    def _attempt(self):
        """One machine, from its start to its end; the container's exit code, or None when it could not start."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.attempts += 1
        layout, request = Layout(self.root / "ml"), self.request
        self.secondary = "Downloading"
        channels = {c["ChannelName"]: c["DataSource"]["S3DataSource"]["S3Uri"] for c in request["InputDataConfig"]}
        layout.create(request["HyperParameters"], list(channels))
        for name, uri in channels.items():
            if not self.plane.store.copy_out(uri, layout.channels / name):
                self.reason = (
                    f'ClientError: Data download failed:No S3 objects found under S3 URL "{uri}" given in input data '
                    "source. Please ensure that the bucket exists in the selected region."
                )
                return None
        checkpoints = request["CheckpointConfig"]["S3Uri"]
        self.plane.store.copy_out(checkpoints, layout.checkpoints)
        self.secondary, self.begun = "Training", self.begun or time.time()
        algorithm = request["AlgorithmSpecification"]
        command = [*algorithm["ContainerEntrypoint"], *algorithm["ContainerArguments"]]
        environment = {**self.plane.inside, "TRAINING_JOB_NAME": self.name, **request.get("Environment", {})}
        log = self.root / "container.log"
        with log.open("w") as output:
            self.container = Container(command, self.root, self.plane.image_bin, environment, output)
            if self._stopping:
                self._signal()
            follower = threading.Thread(target=self._follow, args=(log, self.container, self.attempts), daemon=True)
            follower.start()
            code = self.container.wait()
            follower.join()
        self.plane.store.copy_in(layout.checkpoints, checkpoints)
        if self._interrupted:
            self.secondary = "Interrupted"
        return code

    def _follow(self, log, container, attempt):
        stream = f"{self.name}/algo-1-{int(self.created)}-{attempt}"
        with log.open() as lines:
            while True:
                ended = container.process.poll() is not None
                for line in lines:
                    self.plane.log(GROUP, stream, line.rstrip("\n"))
                if ended:
                    return
                time.sleep(0.05)

    def _finish(self, code):
        layout = Layout(self.root / "ml")
        if code is None:
            self._end("Failed", "Failed", self.reason)
            return
        if code != 0 and not self._stopping:
            said = layout.failure.read_text()[:1024] if layout.failure.is_file() else ""
            self._end("Failed", "Failed", f"AlgorithmError: {said}, exit code: {code}")
            return
        self.secondary = "Uploading"
        output = f"{self.request['OutputDataConfig']['S3OutputPath']}/{self.name}/output"
        self.plane.store.copy_in(layout.model, f"{output}/model")
        self.plane.store.copy_in(layout.output_data, f"{output}/data")
        self._end(*(("Stopped", "Stopped") if self._stopping else ("Completed", "Completed")), None)

    def _end(self, status, secondary, reason):
        self.ended, self.reason, self.secondary = time.time(), reason, secondary
        self.status = status  # last: whoever sees it may read the rest
