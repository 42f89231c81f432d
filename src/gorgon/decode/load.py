"""Loads a model directory into an engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gorgon.artifacts import machine
from gorgon.config import Dtype, Quantization, StepMode
from gorgon.core.phrasebook import Phrasebook
from gorgon.decode.candidates import drafter_of
from gorgon.decode.drafts import Drafter
from gorgon.decode.engine import Engine
from gorgon.decode.threads import set_threads
from gorgon.errors import ModelError
from gorgon.models.backbone import Backbone, load_backbone
from gorgon.models.directory import base_model, load_heads, read_phrasebook, read_tree_file
from gorgon.progress import say


def load_engine(
    model: str | Path,
    *,
    dtype: Dtype = "auto",
    quantization: Quantization = "none",
    drafters: Drafter | Mapping[int, Drafter] | None = None,
    steps: StepMode = "eager",
) -> Engine:
    """Loads a model directory: backbone, heads, and its tuned drafters unless others are given.

    Drafters tuned elsewhere are used, with a warning: outputs are the same, but another machine, device, dtype or
    quantization has other step times, so another drafter may be faster.
    Args: steps: how steps are run; all but 'eager' spend seconds at the first steps to make later ones faster.
    Raises: ModelError for an incomplete directory, tensors that do not fit, or no tuned tree; as `load_backbone`.
    """
    backbone = load_backbone(base_model(model), dtype=dtype, quantization=quantization)
    engine = engine_on(backbone, model, drafters)
    backbone.run_steps(steps)
    return engine


def engine_on(backbone: Backbone, model: str | Path, drafters: Drafter | Mapping[int, Drafter] | None = None) -> Engine:
    """The engine of a model directory on a backbone that is loaded already.

    Raises: as `load_engine`.
    """
    heads = load_heads(model, hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size)
    heads = heads.to(device=backbone.device, dtype=backbone.dtype)
    if drafters is not None:
        return Engine(backbone, heads, drafters)
    document = read_tree_file(model)
    if backbone.device.type == "cpu" and document.get("machine") == machine():
        set_threads(int(document.get("threads", 0)))
    _warn_elsewhere(document, backbone)
    phrasebook = read_phrasebook(model, backbone.vocab_size)
    return Engine(backbone, heads, read_drafters(document, phrasebook), _vocabulary(document, backbone))


def read_drafters(document: Mapping[str, Any], phrasebook: Phrasebook) -> dict[int, Drafter]:
    """What to draft by batch size, from tree.json.

    Raises: ModelError when an entry is malformed; ShapeError when its paths are no tree.
    """
    try:
        return {int(entry["batch_size"]): drafter_of(entry, phrasebook) for entry in document["trees"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"tree.json: an entry of 'trees' is malformed: {error}", field="trees",
                         hint="run `gorgon tune` again") from error  # fmt: skip


def _vocabulary(document: Mapping[str, Any], backbone: Backbone) -> torch.Tensor | None:
    tokens = document.get("draft_vocabulary")
    if tokens is None:
        return None
    if not (isinstance(tokens, list) and tokens and all(isinstance(t, int) for t in tokens)):
        raise ModelError("tree.json: 'draft_vocabulary' must be a list of token ids", field="draft_vocabulary")
    if not 0 <= min(tokens) <= max(tokens) < backbone.vocab_size:
        raise ModelError("tree.json: a token of 'draft_vocabulary' is not in the vocabulary", field="draft_vocabulary",
                         value=max(tokens), allowed=f"0 to {backbone.vocab_size - 1}")  # fmt: skip
    return torch.tensor(tokens, device=backbone.device)


def _warn_elsewhere(document: Mapping[str, Any], backbone: Backbone) -> None:
    here: dict[str, Any] = {
        "dtype": str(backbone.dtype).removeprefix("torch."), "quantization": backbone.quantization
    }  # fmt: skip
    if backbone.device.type == "cuda":
        here["device"] = torch.cuda.get_device_name(backbone.device)
    else:
        here |= {"device": str(machine()["cpu"]), "threads": torch.get_num_threads()}
    there = {"quantization": "none", **document}  # files from before there was a choice do not say
    other = [f"{key} {there.get(key)}, here {value}" for key, value in here.items() if there.get(key) != value]
    if other:
        say(f"warning: the tree was tuned with {'; '.join(other)}: `gorgon tune` may find a faster one here")
