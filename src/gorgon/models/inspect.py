"""What a model directory holds, read without loading the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from gorgon.errors import ModelError
from gorgon.models.backbone import resolve_model
from gorgon.models.directory import HEADS_FILE, base_model, heads_summary, read_model_config, read_tree_file


def inspect_model(name: str) -> dict[str, Any]:
    """Backbone, heads, tree and provenance of a model directory; of a plain backbone, what there is.

    Raises: ModelError when the directory is not one, or its tensors do not agree with its config.json.
    """
    directory = Path(resolve_model(name)) if name == "embedded" else Path(name)
    if not (directory / "config.json").is_file():
        raise ModelError("not a model directory: config.json is missing", field="model", value=name)
    if not (directory / HEADS_FILE).is_file():
        return {"directory": str(directory), "backbone": _backbone(directory), "heads": None, "tree": None}
    config = read_model_config(directory)
    return {
        "directory": str(directory),
        "backbone": _backbone(Path(base_model(directory))),
        "heads": _heads(directory, config),
        "tree": _tree(directory),
        "provenance": _json(directory / "gorgon.json"),
    }


def _backbone(directory: Path) -> dict[str, Any]:
    config = _json(directory / "config.json") or {}
    files = sorted(directory.glob("*.safetensors"))
    parameters, dtypes = 0, set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_slice(key)
                count = 1
                for size in tensor.get_shape():
                    count *= size
                parameters += count
                dtypes.add(str(tensor.get_dtype()))
    keep = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
            "max_position_embeddings", "sliding_window", "tie_word_embeddings")  # fmt: skip
    return {
        "directory": str(directory),
        "model_type": config.get("model_type"),
        "parameters": parameters,
        "stored_as": sorted(dtypes),
        **{key: config[key] for key in keep if key in config},
    }


def _heads(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    shapes = heads_summary(directory)
    found = len({key.split(".")[0] for key in shapes})
    if found != int(config["medusa_num_heads"]):
        raise ModelError(
            f"{HEADS_FILE} holds {found} heads, config.json says otherwise", field="medusa_num_heads",
            value=config["medusa_num_heads"], allowed=str(found),
        )  # fmt: skip
    evaluations = (_json(directory / "heads.json") or {}).get("evaluations", [])
    last = evaluations[-1]["accuracy"] if evaluations else []
    return {
        "count": found,
        "layers": config["medusa_num_layers"],
        "tensors": len(shapes),
        "parameters": sum(a * (b[0] if b else 1) for a, *b in shapes.values()),
        "top1": [round(head[0], 4) for head in last],
    }


def _tree(directory: Path) -> dict[str, Any] | None:
    if not (directory / "tree.json").is_file():
        return None
    document = read_tree_file(directory)
    return {
        "drafters": document["trees"],
        "tuned_on": document.get("device"),
        "dtype": document.get("dtype"),
        "quantization": document.get("quantization", "none"),
        "threads": document.get("threads"),
        "steps": document.get("steps"),
    }


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON", field=path.name) from error
    return loaded
