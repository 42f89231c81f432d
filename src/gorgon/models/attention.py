"""Attention of a step over spans of the cache, by our own kernels, as transformers lets models choose it.

A model asks transformers for the attention that its configuration names. Ours takes what each node sees as a span of
the context and the bits of its ancestors (`models.masks`), in the place of a mask. Given a mask, it is torch's.
Shapes: B sequences, A attention heads, G key-value heads, N nodes, S rows of the cache, D head size.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from gorgon.models.kernels import load_kernels

NAME = "gorgon"
"""What a model's configuration calls it."""
UNKNOWN = ("softcap", "s_aux", "position_bias")
"""Arguments of transformers' attention functions that our kernel knows nothing of."""


def register(device: torch.device) -> None:
    """Makes the device's kernel known to transformers.

    Raises: MissingDependencyError when it cannot be built.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if device.type == "cuda":
        importlib.import_module("gorgon.models.triton_kernels")
    else:
        load_kernels()
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """One layer's attention, [B, N, A, D].

    Args:
        query: [B, A, N, D]. key, value: [B, G, S, D].
        attention_mask: int64 spans [B, 1, N, 3], or a mask as for torch's own attention.
    Raises: ValueError for spans with an argument that the kernel knows nothing of.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return result
    if unknown := [name for name in UNKNOWN if options.get(name) is not None]:
        raise ValueError(f"attention over spans has no {', '.join(unknown)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernel = torch.ops.gorgon.span_attention if query.is_cuda else torch.ops.gorgon.tree_attention
    return kernel(query, key, value, attention_mask, scale), None
