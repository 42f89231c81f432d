"""`gorgon deploy`: a model directory, here or in S3, to an endpoint that serves, with its cost told before."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gorgon.cloud.aws import Aws, AwsError, offline_place, resolve_place
from gorgon.cloud.config import EndpointConfig, SageMakerConfig
from gorgon.cloud.deploy import deploy, endpoint_cost, ends_on_sigterm, keep_until_deleted, upload_artifact
from gorgon.cloud.endpoint import EndpointSpec, create_calls, delete_calls, endpoint_spec
from gorgon.cloud.plan import Place, resource_name
from gorgon.cloud.pricing import guard
from gorgon.cloud.sagemaker import Call
from gorgon.cloud.storage import Upload, check_prefix, send, split_uri, upload_of
from gorgon.cloud.submit import timestamp
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

    def spec(self, place: Place, name: str, model_uri: str, *, heads: int | None) -> EndpointSpec:
        """What is deployed, checked."""
        artifact = None
        spec = endpoint_spec(name, model_uri, self.settings, place.region, heads=heads, plain=self.plain)
        if spec.through_djl:
            artifact = place.uri(RUN, name, "serving")
        elif self.settings.engine == "vllm" and not self.plain:
            artifact = place.uri(RUN, name, "heads")
        return endpoint_spec(
            name, model_uri, self.settings, place.region, artifact=artifact, heads=heads, plain=self.plain
        )

    def dry_run(self) -> list[Call]:
        """Every API call, without credentials."""
        place, name = offline_place(self.cloud), self._name()
        local = Path(self.model).is_dir()
        uri = place.uri(RUN, name, "model") if local else self.model
        heads = self._heads(None) if local else None
        spec = self.spec(place, name, uri, heads=heads or (1 if self.settings.engine == "vllm" else None))
        guard([endpoint_cost(spec, self.cloud, None)], None)
        calls = [Call("sts", "GetCallerIdentity", {})]
        calls += upload_of(self.model, place, RUN).calls() if local else []
        calls += create_calls(spec, self.cloud, place, run=RUN)
        calls.append(Call("sagemaker", "DescribeEndpoint", {"EndpointName": name}, note="until it is InService"))
        gone = delete_calls(name, scaled=self.settings.max_instances is not None)
        note = f"when you say so: gorgon endpoints delete {name}"
        return calls + [Call(c.service, c.operation, c.parameters, note=note) for c in gone]

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
        heads = self._heads(aws)
        spec = self.spec(place, self._name(), self._address(aws, place, upload=False), heads=heads)
        create_calls(spec, self.cloud, place, run=RUN)
        return spec

    def upload(self, aws: Aws, place: Place, spec: EndpointSpec) -> EndpointSpec:
        """The same, after what it needs is in S3."""
        spec = self.spec(place, spec.name, self._address(aws, place, upload=True), heads=spec.heads)
        if spec.through_djl and spec.artifact:
            upload_artifact(aws, spec.artifact)
        elif spec.artifact:
            self._upload_heads(aws, spec.artifact)
        return spec

    def _address(self, aws: Aws, place: Place, *, upload: bool) -> str:
        """Where the model is in S3, uploaded if it is here; a hub id stays what it is."""
        if self.model.startswith("s3://"):
            check_prefix(aws, self.model, "model")
            return self.model
        if not Path(self.model).is_dir():
            if self.plain and (self.model == EMBEDDED or re.fullmatch(r"[\w.-]+/[\w.-]+", self.model)):
                return self.model
            raise ModelError(
                "no such model directory", field="model", value=self.model,
                hint="give the output of `gorgon tune`, or the s3:// address that a job left it at",
            )  # fmt: skip
        exported = self.settings.engine == "tgi" and self.export is not None and not self.plain
        with tempfile.TemporaryDirectory() as folder:
            source = self.model
            if exported and upload and self.export is not None:
                source = str(Path(folder) / "model")
                self.export(Path(self.model), Path(source), "tgi")
            found = upload_of(source, place, RUN)
            if upload:
                send(found, aws)
            return found.prefix

    def _upload_heads(self, aws: Aws, prefix: str) -> None:
        """The heads as vLLM reads them, beside the backbone. Raises CloudError when the model is not here to export."""
        if not Path(self.model).is_dir() or self.export is None:
            raise CloudError(
                "the heads must be exported for vLLM first, and the model is in S3", field="model", value=self.model,
                hint="copy it here (`aws s3 cp --recursive`) and deploy the local directory",
            )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            heads = Path(folder) / "heads"
            self.export(Path(self.model), heads, "vllm")
            files = {f"{prefix}/{path.name}": path for path in sorted(heads.iterdir()) if path.is_file()}
            send(Upload(prefix, files), aws)  # the backbone beside them is uploaded with the model

    def _heads(self, aws: Aws | None) -> int | None:
        """How many heads the model has, from its config.json."""
        if self.plain:
            return None
        config: dict[str, Any] = {}
        try:
            if Path(self.model).is_dir():
                config = json.loads((Path(self.model) / "config.json").read_text(encoding="utf-8"))
            elif aws is not None and self.model.startswith("s3://"):
                bucket, key = split_uri(self.model.rstrip("/"))
                config = json.loads(
                    aws.call("s3", "get_object", Bucket=bucket, Key=f"{key}/config.json")["Body"].read()
                )
        except (OSError, ValueError, AwsError) as error:
            raise ModelError(
                "this is no model directory with heads: config.json cannot be read", field="model", value=self.model,
                hint="give the output of `gorgon tune`",
            ) from error  # fmt: skip
        heads = config.get("medusa_num_heads")
        if config and heads is None:
            raise ModelError(
                "a plain backbone has no heads",
                field="model",
                value=self.model,
                hint="give the output of `gorgon tune`",
            )
        return int(heads) if heads is not None else None
