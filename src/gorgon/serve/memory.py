"""How much memory the key-value cache takes, worked out before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gorgon.decode.engine import Engine
from gorgon.errors import LimitError
from gorgon.models.backbone import Backbone
from gorgon.serve.settings import ServeConfig

LONGEST_DEFAULT = 4096
"""Context of a slot unless told otherwise: long-context models would reserve gigabytes for each."""
SHARE = 0.9
"""Part of the free memory that the cache may take; the rest is for activations."""


@dataclass(frozen=True)
class KvPlan:
    """The cache's size.

    Attributes:
        slots, context: as the server will have them.
        sequences: buffers of `capacity` rows: one per slot, one for the prompt that is being read, one for the race.
        bytes_per_token, total_bytes: keys and values of all layers.
    """

    slots: int
    context: int
    sequences: int
    capacity: int
    bytes_per_token: int

    @property
    def total_bytes(self) -> int:
        """All buffers together; nothing is added later."""
        return self.sequences * self.capacity * self.bytes_per_token

    def __str__(self) -> str:
        return (f"KV cache: {self.slots} slots of {self.context} tokens, {self.sequences} buffers, "
                f"{self.total_bytes / 2**20:.1f} MiB")  # fmt: skip


def plan_kv(engine: Engine, config: ServeConfig, free_bytes: int | None = None) -> KvPlan:
    """The plan for these settings.

    Args: free_bytes: memory that may be used; measured on the engine's device unless given.
    Raises: LimitError when the context exceeds the model's, or the cache does not fit, saying how many slots would.
    """
    backbone = engine.backbone
    context = config.context if config.context is not None else min(backbone.max_length, LONGEST_DEFAULT)
    if context > backbone.max_length:
        raise LimitError("the model's context is shorter", field="context", value=context,
                         allowed=f"at most {backbone.max_length}")  # fmt: skip
    extra = (config.slots > 1) + config.playground
    plan = KvPlan(
        config.slots, context, config.slots + extra, context + engine.most_nodes, kv_bytes_per_token(backbone)
    )
    free = int(free_memory(backbone.device) * SHARE) if free_bytes is None else free_bytes
    if plan.total_bytes > free:
        fits = free // (plan.capacity * plan.bytes_per_token) - extra
        raise LimitError(
            "the key-value cache does not fit into the free memory", field="slots",
            value=f"{config.slots} slots of {context} tokens, {plan.total_bytes / 2**20:.0f} MiB",
            allowed=f"{free / 2**20:.0f} MiB",
            hint=f"--slots {fits} fits" if fits >= 1 else "give a smaller --context",
        )  # fmt: skip
    return plan


def kv_bytes_per_token(backbone: Backbone) -> int:
    """Bytes of one token's keys and values in all layers."""
    config = backbone.text_config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    element = torch.empty((), dtype=backbone.dtype).element_size()
    return 2 * int(config.num_hidden_layers) * int(heads) * int(size) * element


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
