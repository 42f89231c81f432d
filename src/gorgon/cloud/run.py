"""A recipe on its way to SageMaker: its jobs, its uploads, its endpoints, and the most that they can cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gorgon.cloud.aws import Aws
from gorgon.cloud.config import COMPARE_MINUTES, SageMakerConfig
from gorgon.cloud.deploy import artifact_prefix
from gorgon.cloud.endpoint import EndpointSpec, compared_names, endpoint_spec
from gorgon.cloud.job import EXPORT, JobSpec
from gorgon.cloud.launch import RUN as DEPLOY
from gorgon.cloud.plan import Place, final_step, plan_jobs, resource_name, result_uri
from gorgon.cloud.pricing import Cost, job_cost, price_of
from gorgon.cloud.storage import Upload, upload_of
from gorgon.config import EMBEDDED, StepConfig, TrainHeadsConfig
from gorgon.errors import CloudError


@dataclass(frozen=True)
class CloudRun:
    """A recipe on its way to SageMaker.

    Args:
        name: the recipe's name.
        steps: resolved configurations in order.
        cloud: the recipe's `sagemaker` section.
        out: local directory of the run, which keeps the names of its jobs.
        recipe: the recipe's file, sent along for the record.
        base: the backbone before fine-tuning, for the comparison on endpoints.
    """

    name: str
    steps: Mapping[str, StepConfig]
    cloud: SageMakerConfig
    out: Path
    recipe: Path | None = None
    base: str = EMBEDDED

    def jobs(self, place: Place, stamp: str) -> list[JobSpec]:
        """The chain of jobs."""
        return plan_jobs(self.steps, self.out, run=self.name, stamp=stamp, cloud=self.cloud, place=place)

    def uploads(self, jobs: list[JobSpec], place: Place) -> dict[str, Upload]:
        """Local inputs by path."""
        return {
            channel.source: upload_of(channel.source, place, self.name)
            for spec in jobs for channel in spec.channels if not channel.in_s3 and channel.job is None
        }  # fmt: skip

    def costs(self, jobs: list[JobSpec], aws: Aws | None) -> list[Cost]:
        """The most that each job can cost."""
        costs = []
        for spec in jobs:
            if spec.resources is not None:
                machine = spec.resources.instance_type
                costs.append(
                    job_cost(
                        spec.name, spec.resources, price_of(machine, "training", self.cloud.price_per_hour, aws=aws)
                    )
                )
        return costs

    def endpoint_costs(self, aws: Aws | None) -> list[Cost]:
        """The most that the endpoint, or the three that are compared, can cost."""
        settings = self.cloud.endpoint
        if settings is None:
            return []
        price = price_of(settings.instance_type, "endpoint", self.cloud.price_per_hour, aws=aws)
        minutes = COMPARE_MINUTES if settings.compare else settings.delete_after_minutes
        machines = settings.instance_count * (3 if settings.compare else 1)
        hours = None if minutes is None else minutes / 60
        return [Cost(f"endpoints of {self.name}", price, machines, hours, "gorgon endpoints delete NAME")]

    def endpoints(self, place: Place, stamp: str, jobs: Sequence[JobSpec]) -> list[EndpointSpec]:
        """The recipe's endpoint, or the three that are compared, as they can be told before there is a model.

        Raises: CloudError for settings that no endpoint can have, and when a step is missing whose result is needed.
        """
        settings = self.cloud.endpoint
        if settings is None:
            return []
        made = {spec.step: result_uri(spec) for spec in jobs}
        model = made.get(EXPORT) or made[final_step(made)]
        if settings.compare and "prepare" not in made:
            raise CloudError("a comparison on endpoints needs the recipe's test prompts", field="endpoint.compare",
                             hint="add a 'prepare' section")  # fmt: skip
        heads = next((config.heads for config in self.steps.values() if isinstance(config, TrainHeadsConfig)), 1)
        wanted = {resource_name("gorgon", self.name, stamp): (model, False)}
        if settings.compare:
            base, tuned, medusa = compared_names(stamp)
            wanted = {base: (self.base, True), tuned: (model, True), medusa: (model, False)}
        specs = []
        for name, (source, plain) in wanted.items():
            spec = endpoint_spec(name, source, settings, place.region, heads=heads, plain=plain)
            artifact = artifact_prefix(place, DEPLOY) if spec.through_djl else None
            specs.append(replace(spec, nested=source == model, artifact=artifact))  # the base is no directory of ours
        return specs
