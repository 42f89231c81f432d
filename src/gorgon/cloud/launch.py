"""`gorgon deploy`: a model directory, here or in S3, to an endpoint that serves, with its cost told before."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from gorgon.cloud.aws import Aws, offline_place, resolve_place
from gorgon.cloud.config import EndpointConfig, SageMakerConfig
from gorgon.cloud.deploy import (
    artifact_prefix,
    artifact_upload,
    deploy,
    endpoint_cost,
    ends_on_sigterm,
    keep_until_deleted,
)
from gorgon.cloud.endpoint import EndpointSpec, create_calls, ending_calls, endpoint_spec, reading_calls
from gorgon.cloud.model import ModelFacts, read_facts
from gorgon.cloud.plan import Place, resource_name, timestamp
from gorgon.cloud.pricing import guard, price_query
from gorgon.cloud.sagemaker import Call
from gorgon.cloud.storage import Upload, check_prefix, send, upload_of
from gorgon.config import EMBEDDED
from gorgon.errors import CloudError, ModelError

RUN = "deploy"
Export = Callable[[Path, Path, str], object]


@dataclass(frozen=True)
class Launch:
    """A deployment.

    Args:
        model: local model directory, S3 prefix, or with `plain` also a hub id.
        cloud: settings; its `endpoint` section says which engine and machine.
        name: of the endpoint; None makes one from the time.
        export: writes a model directory in another server's format.
        plain: decode without drafts, to compare.
    """

    model: str
    cloud: SageMakerConfig
    name: str | None = None
    export: Export | None = None
    plain: bool = False

    @property
    def settings(self) -> EndpointConfig:
        """The endpoint's settings."""
        return self.cloud.endpoint or EndpointConfig()

    def _name(self) -> str:
        return resource_name(self.name) if self.name else resource_name("gorgon", timestamp())

    @property
    def _here(self) -> bool:
        return not self.model.startswith("s3://") and Path(self.model).is_dir()

    def spec(self, place: Place, name: str, facts: ModelFacts) -> EndpointSpec:
        """What is deployed, checked; the address of a model that is here is a stand-in until it is uploaded.

        Raises: CloudError and ModelError for a model that the engine cannot serve, and what `endpoint_spec` raises.
        """
        self._check_layout(facts)
        address = place.uri(RUN, "inputs", "MODEL") if self._here else self.model
        spec = endpoint_spec(
            name, address, self.settings, place.region, heads=facts.heads, context=facts.context, plain=self.plain
        )
        spec = replace(spec, nested=facts.layout is not None)
        if spec.through_djl:
            return replace(spec, artifact=artifact_prefix(place, RUN))
        if self.settings.engine == "vllm" and not self.plain and facts.layout == "gorgon":
            return replace(spec, artifact=place.uri(RUN, name, "heads"))
        return spec

    def dry_run(self) -> list[Call]:
        """Every API call, without credentials. A model in S3 is taken for one that the engine can serve."""
        place, name = offline_place(self.cloud), self._name()
        spec = self.spec(place, name, self._facts(None))
        guard([endpoint_cost(spec, self.cloud, None)], None)
        calls = [Call("sts", "GetCallerIdentity", {})]
        calls.append(Call("pricing", "GetProducts", price_query(self.settings.instance_type, place.region)))
        calls += [] if self._here else reading_calls(self.model)
        with self._uploads(place, spec) as (spec, uploads):
            calls += [call for upload in uploads for call in upload.calls()]
        calls += create_calls(spec, self.cloud, place, run=RUN)
        calls.append(Call("sagemaker", "DescribeEndpoint", {"EndpointName": name}, note="until it is InService"))
        minutes = self.settings.delete_after_minutes
        note = f"when you say so: gorgon endpoints delete {name}" if minutes is None else f"after {minutes} minutes"
        return calls + [replace(call, note=note) for call in ending_calls(name)]

    def run(self) -> str:
        """Uploads, deploys, and returns the endpoint's name once it serves; with a time to live, stays and deletes it.

        Raises: CloudError, BudgetError; whatever was created is deleted again when it does not come up.
        """
        aws = Aws(self.cloud.region)
        place = resolve_place(self.cloud, aws)
        spec = self.checked(aws, place)
        guard([endpoint_cost(spec, self.cloud, aws)], self.cloud.budget_usd)
        spec = self.upload(aws, place, spec)
        with ends_on_sigterm():
            deploy(aws, [spec], self.cloud, place, run=RUN)
            if self.settings.delete_after_minutes is not None:
                keep_until_deleted(aws, spec.name, self.settings.delete_after_minutes)
        return spec.name

    def checked(self, aws: Aws, place: Place) -> EndpointSpec:
        """What is deployed, checked to the last request, before anything is uploaded or billed."""
        if self.model.startswith("s3://"):
            check_prefix(aws, self.model, "model")
        spec = self.spec(place, self._name(), self._facts(aws))
        create_calls(spec, self.cloud, place, run=RUN)
        return spec

    def upload(self, aws: Aws, place: Place, spec: EndpointSpec) -> EndpointSpec:
        """The same, after what it needs is in S3."""
        with self._uploads(place, spec) as (ready, uploads):
            for upload in uploads:
                send(upload, aws)
        return ready

    @contextmanager
    def _uploads(self, place: Place, spec: EndpointSpec) -> Iterator[tuple[EndpointSpec, list[Upload]]]:
        """The deployment with its model's address, and what must be in S3 before; the files exist within the block."""
        with tempfile.TemporaryDirectory() as folder:
            uploads = []
            if self._here:
                source = Path(self.model)
                if self.settings.engine == "tgi" and not self.plain and self._facts(None).layout == "gorgon":
                    source = self._exported(Path(folder) / "model", "tgi")
                uploads.append(upload_of(str(source), place, RUN))
                spec = replace(spec, model=uploads[0].prefix)
            if spec.artifact and spec.through_djl:
                uploads.append(artifact_upload(spec.artifact, Path(folder)))
            elif spec.artifact:
                heads = self._exported(Path(folder) / "heads", "vllm")
                files = {f"{spec.artifact}/{p.name}": p for p in sorted(heads.iterdir()) if p.is_file()}
                uploads.append(Upload(spec.artifact, files))  # the backbone beside them is uploaded with the model
            yield spec, uploads

    def _exported(self, out: Path, form: str) -> Path:
        assert self.export is not None, "checked by _check_layout"
        self.export(Path(self.model), out, form)
        return out

    def _facts(self, aws: Aws | None) -> ModelFacts:
        if self.model.startswith("s3://") and aws is None:  # a dry run does not look
            return ModelFacts(self.settings.engine, heads=1)
        if self._here or self.model.startswith("s3://"):
            return read_facts(self.model, aws)
        if self.plain and (self.model == EMBEDDED or re.fullmatch(r"[\w.-]+/[\w.-]+", self.model)):
            return ModelFacts()  # a hub id, which the container fetches itself
        raise ModelError(
            "no such model directory", field="model", value=self.model,
            hint="give the output of `gorgon tune`, or the s3:// address that a job left it at",
        )  # fmt: skip

    def _check_layout(self, facts: ModelFacts) -> None:
        engine = self.settings.engine
        if self.plain or facts.layout == engine:
            return
        if facts.layout is None:
            raise ModelError(
                "a plain backbone has no heads", field="model", value=self.model,
                hint="give the output of `gorgon tune`",
            )  # fmt: skip
        if facts.layout != "gorgon":
            raise ModelError(
                f"this directory was exported for {facts.layout}", field="model", value=self.model,
                allowed=f"--engine {facts.layout}", hint="or give the directory that `gorgon tune` wrote",
            )  # fmt: skip
        if not self._here or self.export is None:
            raise CloudError(
                f"the heads must be exported for {engine} first, and the model is in S3", field="model",
                value=self.model,
                hint="`gorgon run RECIPE --on sagemaker` exports them in a job of their own when the recipe's endpoint "
                "has this engine; or copy the model here (`aws s3 cp --recursive`) and deploy the local directory",
            )  # fmt: skip
