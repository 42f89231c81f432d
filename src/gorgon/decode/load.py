"""Loads a model directory into an engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from gorgon.config import Dtype, StepMode
from gorgon.decode.drafts import Drafter, StaticDrafter
from gorgon.decode.engine import Engine
from gorgon.models.backbone import load_backbone
from gorgon.models.directory import base_model, load_heads, read_draft_vocabulary, read_tree
from gorgon.models.linear import lay_out_linear_weights


def load_engine(
    model: str | Path,
    *,
    dtype: Dtype = "auto",
    drafters: Drafter | Mapping[int, Drafter] | None = None,
    steps: StepMode = "eager",
) -> Engine:
    """Loads a model directory: backbone, heads, and its tuned drafters unless others are given.

    Args: steps: how steps are run; all but 'eager' spend seconds at the first steps to make later ones faster.
    Raises: ModelError for an incomplete directory, tensors that do not fit, or no tuned tree.
    """
    backbone = load_backbone(base_model(model), dtype=dtype)
    heads = load_heads(model, hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size)
    heads = heads.to(device=backbone.device, dtype=backbone.dtype)
    lay_out_linear_weights(backbone.model)
    backbone.run_steps(steps)
    if drafters is not None:
        return Engine(backbone, heads, drafters)
    vocabulary = read_draft_vocabulary(model)
    vocabulary_U = None if vocabulary is None else torch.tensor(vocabulary, device=backbone.device)
    return Engine(backbone, heads, StaticDrafter(read_tree(model)), vocabulary_U)
