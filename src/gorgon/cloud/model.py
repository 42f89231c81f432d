"""What a model directory says of itself, here or in S3: whose layout it has, how many heads, how long a context."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from gorgon.cloud.aws import Aws, AwsError
from gorgon.cloud.endpoint import BASE_CONFIG, MODEL_DIR
from gorgon.cloud.storage import read_text
from gorgon.errors import ModelError

Layout = Literal["gorgon", "vllm", "tgi"]


@dataclass(frozen=True)
class ModelFacts:
    """What its configuration files say.

    Args:
        layout: ours, or that of `gorgon export --format vllm` or `tgi`; None for a backbone without heads.
        heads: number of heads.
        context: longest context of the backbone, in tokens, if it is told.
    """

    layout: Layout | None = None
    heads: int | None = None
    context: int | None = None


def read_facts(model: str, aws: Aws | None) -> ModelFacts:
    """Reads a model directory's configuration.

    Args: model: a local directory or an S3 address.
    Raises: ModelError when config.json is not there or not JSON.
    """
    config = _document(model, "config.json", aws)
    if config is None:
        raise ModelError(
            "this is no model directory with heads: config.json cannot be read", field="model", value=model,
            hint="give the output of `gorgon tune`",
        )  # fmt: skip
    backbone = _document(model, BASE_CONFIG, aws) or {}
    length = (backbone.get("text_config") or backbone).get("max_position_embeddings")
    context = length if isinstance(length, int) else None
    if config.get("model_type") == "medusa" and "num_heads" in config:
        return ModelFacts("vllm", int(config["num_heads"]), context)
    heads = config.get("medusa_num_heads")
    if heads is None:
        return ModelFacts(context=context)
    # TGI is given the place in the container, our own directories name it beside them
    exported = str(config.get("base_model_name_or_path", "")).startswith(MODEL_DIR)
    return ModelFacts("tgi" if exported else "gorgon", int(heads), context)


def _document(model: str, name: str, aws: Aws | None) -> dict[str, Any] | None:
    try:
        text = read_text(model, name, aws)
        document = None if text is None else json.loads(text)
    except (OSError, ValueError, AwsError) as error:
        raise ModelError(
            f"{name} of this model directory cannot be read", field="model", value=model,
            hint="give the output of `gorgon tune`",
        ) from error  # fmt: skip
    return document if isinstance(document, dict) else None
