"""How a backbone's steps run on a GPU: captured as CUDA graphs (`models.graphs`), the layers compiled before.

What is compiled are the layers alone, which steps and prompts share, and what a step decides (`decode.functions`). The
rest of a step is a handful of small kernels, and all of it is captured together. So a new shape is captured, in a
fraction of a second; it is not compiled.
Shapes: B sequences, N nodes or tokens of a prompt, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gorgon.errors import ModelError
from gorgon.models.cache import TreeCache
from gorgon.models.families import FAILURES, refuse_other_results, trial_tokens
from gorgon.models.graphs import CudaRecorder, Graphs
from gorgon.models.kernels import triton_works
from gorgon.models.siblings import lay_siblings_together
from gorgon.progress import say

if TYPE_CHECKING:
    from gorgon.models.backbone import Backbone

TRIAL_NODES, TRIAL_ROOM = 16, 300
"""Nodes of the tree for which the layers are compiled first, and rows of the cache there."""


def run_on_gpu(backbone: Backbone) -> None:
    """From now on the backbone's steps run as `Backbone.steps` says: captured in all modes but 'eager'."""
    backbone.graphs = None if backbone.steps == "eager" else Graphs(CudaRecorder(backbone.device))
    if backbone.graphs is not None and triton_works():
        backbone.attend_over_spans()
    if backbone.steps == "compiled":
        compile_layers(backbone)


def compile_layers(backbone: Backbone) -> None:
    """From now on the layers are compiled; captured as they are, with a warning, if what is compiled fails, or gives
    other results than the model."""
    lay_siblings_together(backbone.model)
    backbone.layers = backbone.step_function(layers)()
    try:
        _compile_for_trees(backbone)
        refuse_other_results(backbone)
    except (*FAILURES, ModelError) as error:
        backbone.layers, backbone.steps = None, "captured"
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        say(f"warning: this model's layers cannot be compiled, so its steps are captured as they are: {first}")


@torch.inference_mode()
def _compile_for_trees(backbone: Backbone) -> None:
    """Has the layers compiled for one sequence, first for a tree: code is fitted to what is seen first."""
    cache = TreeCache(int(backbone.text_config.num_hidden_layers), 1, TRIAL_ROOM)
    tokens_1N = trial_tokens(backbone, TRIAL_NODES)
    for part in (tokens_1N[:, :1], tokens_1N):  # the first one allocates
        backbone.forward_prompt(cache, part, part.new_zeros(1), backbone.visible(part.shape[1], cache.capacity))


def run_layers(backbone: Backbone, cache: TreeCache, tokens_BN: Tensor, positions_BN: Tensor, mask: Any) -> Tensor:
    """Hidden states [B, N, H], by transformers' own modules."""
    output = backbone.decoder(
        input_ids=tokens_BN, attention_mask=mask, position_ids=positions_BN, past_key_values=cache, use_cache=True
    )
    hidden_BNH: Tensor = output[0]
    return hidden_BNH


def layers(
    backbone: Backbone,
    tokens_BN: Tensor,
    positions_BN: Tensor,
    mask: Any,
    slots_BN: Tensor,
    visible: int,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
) -> tuple[Tensor]:
    """`run_layers` as a step function: the cache's place and its buffers are arguments."""
    cache = TreeCache.over(keys, values)
    cache.place(slots_BN, visible)
    return (run_layers(backbone, cache, tokens_BN, positions_BN, mask),)
