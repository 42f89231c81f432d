"""The `sagemaker` section of a recipe: where its jobs run, what they may cost, and the endpoint to deploy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gorgon.config import StepConfig

COMPARE_MINUTES = 120
"""A comparison on endpoints ends, and its endpoints with it, after this time."""
Engine = Literal["gorgon", "vllm", "tgi"]


class EndpointConfig(StepConfig):
    """An endpoint: engine, machine, time limits and scaling. `gorgon deploy` takes the same settings as options."""

    engine: Engine = Field("gorgon", description="gorgon (all of Gorgon), vllm or tgi (chains of top guesses only).")
    instance_type: str = Field("ml.g5.xlarge", description="Machine behind the endpoint.")
    instance_fallbacks: list[str] = Field([], description="Other machines to take when there is none of the first.")
    instance_count: int = Field(1, ge=1, description="Machines behind the endpoint.")
    max_instances: int | None = Field(None, ge=1, description="Scale out to this many machines; null never scales.")
    requests_per_instance: int = Field(8, ge=1, description="Concurrent requests per machine that scaling aims at.")
    image: str | None = Field(None, description="Container image: a key of the pinned table or a URI of your own.")
    health_check_s: int = Field(1800, ge=60, le=3600, description="Seconds that the container may take to answer.")
    download_s: int = Field(1800, ge=60, le=3600, description="Seconds that the download of the model may take.")
    data_capture: bool = Field(False, description="Store requests and answers in S3.")
    max_input_tokens: int | None = Field(
        None, ge=1, description="Longest prompt, in tokens; null leaves it to max_total_tokens. vLLM has no such limit."
    )
    max_total_tokens: int | None = Field(
        None, ge=2, description="Longest prompt and answer together, in tokens; null is 2048 for vLLM and TGI, and for "
        "gorgon the model's own, at most 4096.",
    )  # fmt: skip
    delete_after_minutes: int | None = Field(None, ge=1, description="Delete the endpoint after this many minutes.")
    environment: dict[str, str] = Field({}, description="Further environment variables of the container.")
    compare: bool = Field(False, description="Deploy base, fine-tuned and Medusa side by side, compare, delete all.")
    compare_prompts: int | None = Field(100, ge=1, description="Test prompts to compare on; null takes all of them.")
    compare_trials: int = Field(3, ge=1, description="Timed passes of the comparison over the prompts.")
    compare_max_tokens: int = Field(128, ge=1, description="Length limit of a compared answer, in tokens.")


class SageMakerConfig(StepConfig):
    """Where and how a recipe's jobs run. Names of machines are SageMaker's, times are in seconds."""

    region: str | None = Field(None, description="AWS region; null takes the one of the environment or profile.")
    role: str | None = Field(None, description="ARN of the execution role; null takes GORGON_SAGEMAKER_ROLE.")
    bucket: str | None = Field(None, description="Bucket for everything; null is sagemaker-REGION-ACCOUNT.")
    prefix: str = Field("gorgon", description="S3 prefix below which a run keeps its files.")
    instance_type: str = Field("ml.g5.4xlarge", description="Machine of every step.")
    instance_types: dict[str, str] = Field({}, description="Other machines for some steps: step name to machine.")
    instance_fallbacks: list[str] = Field([], description="Machines to take when there is none of the first.")
    volume_gb: int = Field(100, ge=1, description="Disk of a job, in GB.")
    max_runtime_s: int = Field(14400, ge=60, description="A job is stopped after this time, and costs at most this.")
    max_wait_s: int | None = Field(None, ge=60, description="Spot: longest time in all; null is twice max_runtime_s.")
    spot: bool = Field(False, description="Spot machines: cheaper, may be interrupted; checkpoints resume them.")
    keep_alive_s: int = Field(0, ge=0, le=3600, description="Keep the machine warm for the next job; billed meanwhile.")
    image: str | None = Field(None, description="Training image: a key of the pinned table or a URI of your own.")
    kms_key: str | None = Field(None, description="KMS key for volumes and output.")
    subnets: list[str] = Field([], description="VPC subnets; needs security_groups too.")
    security_groups: list[str] = Field([], description="VPC security groups; needs subnets too.")
    network_isolation: bool = Field(False, description="No network in the container; needs an image of your own.")
    encrypt_traffic: bool = Field(False, description="Encrypt traffic between the containers of a job.")
    tags: dict[str, str] = Field({}, description="Tags of every resource, beside gorgon:run and gorgon:step.")
    environment: dict[str, str] = Field({}, description="Environment variables of the jobs. Never put secrets here.")
    budget_usd: float | None = Field(None, gt=0, description="Refuse to start what may cost more than this.")
    price_per_hour: dict[str, float] = Field({}, description="Prices in USD when the price list is out of reach.")
    endpoint: EndpointConfig | None = Field(None, description="Deploy the result to this endpoint.")
