"""The model directory: the one contract between training and serving (DESIGN.md, "Steps").

It is what TGI and the AWS sample read (config.json, medusa_lm_head.safetensors, tokenizer, base-model/), plus
gorgon.json (head kind, format version, provenance) and, once tuned, tree.json and phrasebook.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from gorgon.artifacts import link_tree, write_json
from gorgon.core.heads import MedusaHeads
from gorgon.core.phrasebook import Phrasebook
from gorgon.errors import ModelError

HEADS_FILE = "medusa_lm_head.safetensors"
PHRASEBOOK_FILE = "phrasebook.json"
BASE = "base-model"
FORMAT = 1
TREE_FORMAT = 5
"""Of tree.json."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


def write_model_directory(
    out: Path, *, heads: MedusaHeads, backbone_dir: str | Path, provenance: dict[str, Any]
) -> None:
    """Writes heads and backbone in the published layout; the backbone's files are hard-linked where possible.

    Args: backbone_dir: a directory, or a hub id that transformers has in its cache.
    """
    source = local_backbone(backbone_dir)
    link_tree(source, out / BASE, skip=frozenset({"manifest.json", "tensorboard", "README.md"}))
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            (out / name).write_bytes((source / name).read_bytes())
    tensors = {key: value.detach().cpu().contiguous() for key, value in heads.state_dict().items()}
    save_file(tensors, out / HEADS_FILE, metadata={"format": "pt"})
    write_json(
        out / "config.json",
        {
            "medusa_num_heads": len(heads),
            "medusa_num_layers": heads.num_layers,
            "base_model_name_or_path": BASE,
            "hidden_size": heads.hidden_size,
            "vocab_size": heads.vocab_size,
            "version": "1",  # v1: every head has its own vocabulary projection
        },
    )
    write_json(out / "gorgon.json", {"format": FORMAT, "head_kind": "medusa", **provenance})


def local_backbone(name: str | Path) -> Path:
    """The backbone's directory; a hub id is fetched, or taken from the cache.

    Raises: ModelError when the hub does not give it.
    """
    if Path(name).is_dir():
        return Path(name)
    return fetch_from_hub(str(name), ["*.json", "*.safetensors", "*.model", "*.jinja"])


def fetch_from_hub(name: str, patterns: list[str]) -> Path:
    """Directory of a hub repository's files that match the patterns.

    Raises: ModelError when it cannot be fetched and is not in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ModelError(f"cannot fetch '{name}' from the hub", field="model", value=name) from error


def read_head_kind(directory: str | Path) -> str:
    """What gorgon.json says the heads are; 'medusa' for a published directory that has none.

    Raises: ModelError when gorgon.json is not valid.
    """
    return str(_read_own(directory).get("head_kind", "medusa"))


def is_imported(directory: str | Path) -> bool:
    """Whether `gorgon import` made the heads, so that nothing is known of their training.

    Raises: ModelError when gorgon.json is not valid.
    """
    return "imported_from" in _read_own(directory)


def _read_own(directory: str | Path) -> dict[str, Any]:
    path = Path(directory) / "gorgon.json"
    if not path.is_file():
        return {}
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON", field="gorgon.json") from error
    if not isinstance(loaded, dict):
        raise ModelError(f"{path} is not a JSON object", field="gorgon.json")
    return loaded


def read_model_config(directory: str | Path) -> dict[str, Any]:
    """The heads' config.json, checked.

    Raises: ModelError when this is not a model directory with heads.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ModelError(
            "not a model directory with heads: config.json is missing", field="model", value=str(directory),
            hint="give the output of `gorgon train-heads` or `gorgon tune`",
        )  # fmt: skip
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON", field="config.json") from error
    for key in ("medusa_num_heads", "medusa_num_layers", "base_model_name_or_path"):
        if key not in config:
            raise ModelError(
                f"{path} does not describe Medusa heads: '{key}' is missing", field=key,
                hint="a plain backbone has no heads; `gorgon train-heads` makes them",
            )  # fmt: skip
    return config


def base_model(directory: str | Path) -> str:
    """Where the backbone of a model directory is: relative names are relative to the directory."""
    name = str(read_model_config(directory)["base_model_name_or_path"])
    inside = Path(directory) / name
    return str(inside) if inside.is_dir() else name


def load_heads(directory: str | Path, *, hidden_size: int, vocab_size: int) -> MedusaHeads:
    """The heads of a model directory, every tensor accounted for.

    Args: hidden_size, vocab_size: the backbone's, which the heads must fit.
    Raises: ModelError naming the first missing, surplus or mis-shaped tensor, or an unreadable file.
    """
    config = read_model_config(directory)
    path = Path(directory) / HEADS_FILE
    if not path.is_file():
        raise ModelError(f"{HEADS_FILE} is missing", field="model", value=str(directory))
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"cannot read {path}: {error}", hint="the file is cut short or not safetensors") from error
    with torch.device("meta"):
        heads = MedusaHeads(int(config["medusa_num_heads"]), int(config["medusa_num_layers"]), hidden_size, vocab_size)
    expected = {key: tuple(value.shape) for key, value in heads.state_dict().items()}
    for key in sorted(expected.keys() - tensors.keys()):
        raise ModelError(
            f"{path} lacks the tensor '{key}'", field=key,
            hint="medusa_num_heads and medusa_num_layers in config.json must describe the file",
        )  # fmt: skip
    for key in sorted(tensors.keys() - expected.keys()):
        raise ModelError(
            f"{path} has the surplus tensor '{key}'", field=key,
            hint="medusa_num_heads and medusa_num_layers in config.json must describe the file",
        )  # fmt: skip
    for key, shape in expected.items():
        if tuple(tensors[key].shape) != shape:
            raise ModelError(
                f"the tensor '{key}' does not fit the backbone", field=key,
                value=tuple(tensors[key].shape), allowed=str(shape),
                hint="these heads were trained for another backbone",
            )  # fmt: skip
    heads.load_state_dict(tensors, assign=True)
    return heads.eval().requires_grad_(False)


def heads_summary(directory: str | Path) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of the heads' file, without loading it."""
    with safe_open(Path(directory) / HEADS_FILE, framework="pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def read_tree_file(directory: str | Path) -> dict[str, Any]:
    """tree.json as `tune` wrote it: what to draft at which batch size, and what that rests on.

    Raises: ModelError when there is none, or it is not JSON, or of another format.
    """
    path = Path(directory) / "tree.json"
    if not path.is_file():
        raise ModelError(
            "the model directory has no tuned tree: tree.json is missing", field="model", value=str(directory),
            hint="`gorgon tune` measures this machine and writes it",
        )  # fmt: skip
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        version = document["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is not a valid tree file: {error}", hint="run `gorgon tune` again") from error
    if version != TREE_FORMAT:
        raise ModelError(f"{path} has another format", field="format", value=version, allowed=str(TREE_FORMAT),
                         hint="run `gorgon tune` again")  # fmt: skip
    loaded: dict[str, Any] = document
    return loaded


def read_phrasebook(directory: str | Path, vocab_size: int) -> Phrasebook:
    """phrasebook.json as `tune` wrote it; an empty phrasebook where there is none: drafts are poorer, not wrong.

    Raises: ModelError when it is not one, or was made with another tokenizer.
    """
    path = Path(directory) / PHRASEBOOK_FILE
    if not path.is_file():
        return Phrasebook()
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(
            f"{path} is not valid JSON", field="phrasebook.json", hint="run `gorgon tune` again"
        ) from error
    return Phrasebook.of_json(document, vocab_size)
