"""What `gorgon serve` can be told. A default stands here and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from gorgon.config import QUANTIZATION_HELP, STEPS_HELP, Dtype, Quantization, StepConfig, StepMode, parse_value
from gorgon.errors import GorgonError

MODEL_DIRECTORY = Path("/opt/ml/model")
"""Where SageMaker puts the model."""
Drafts = Literal["tuned", "ngram", "none"]


class ServeConfig(StepConfig):
    """Serves a model over HTTP: OpenAI's interface, SageMaker's, metrics, and a playground."""

    model: str = Field(description="Directory that `tune` wrote; with --drafts ngram or none any model.")
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 is every network.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    name: str | None = Field(None, description="Name of the model in the API; the directory's name unless given.")
    api_key: str | None = Field(None, min_length=1, description="Bearer key that requests must show.")
    slots: int = Field(8, ge=1, le=256, description="Requests decoded together.")
    context: int | None = Field(
        None, ge=2, description="Tokens of prompt and answer that a slot holds; the model's own, at most 4096."
    )
    max_prompt: int | None = Field(None, ge=1, description="Longest prompt, in tokens; null leaves it to the context.")
    queue: int = Field(64, ge=0, description="Answers that may wait for a slot; more are refused with 429.")
    prefill_chunk: int = Field(256, ge=1, description="Prompt tokens read between two decoding steps.")
    reuse_prefixes: bool = Field(True, description="Take a prompt's beginning from rows that earlier requests left.")
    deadline_s: float = Field(600.0, gt=0, description="Seconds after which a request is given up.")
    drain_s: float = Field(25.0, ge=0, description="Seconds that running requests get to finish after SIGTERM.")
    max_body_bytes: int = Field(6_291_456, ge=1024, description="Largest request body; SageMaker's own limit.")
    drafts: Drafts = Field("tuned", description="What is drafted: the tuned trees, copies from the context, nothing.")
    dtype: Dtype = Field("auto", description="Weights' dtype; auto is bfloat16 on a GPU and float32 on a CPU.")
    quantization: Quantization = Field("none", description=QUANTIZATION_HELP)
    steps: StepMode = Field("auto", description=STEPS_HELP)
    warmup: bool = Field(True, description="Decode at every batch size before the first request is taken.")
    playground: bool = Field(True, description="Serve the page at / and its race; it has a slot of its own.")


def environment_settings() -> dict[str, Any]:
    """Settings that the environment gives as GORGON_NAME, such as GORGON_SLOTS: a container has no command line."""
    given = {}
    for name, field in ServeConfig.model_fields.items():
        text = os.environ.get(f"GORGON_{name.upper()}")
        if text is not None:
            given[name] = text if field.annotation in (str, str | None) else parse_value(text)
    return given


def container_defaults() -> dict[str, Any]:
    """Model, address and port when SageMaker starts the container with the argument `serve`; {} elsewhere."""
    if not MODEL_DIRECTORY.is_dir():
        return {}
    port = os.environ.get("SAGEMAKER_BIND_TO_PORT", "8080")
    if not port.isdigit():
        raise GorgonError("not a port", field="SAGEMAKER_BIND_TO_PORT", value=port, allowed="0 to 65535")
    return {"model": str(MODEL_DIRECTORY), "host": "0.0.0.0", "port": int(port)}  # noqa: S104 - only inside a container
