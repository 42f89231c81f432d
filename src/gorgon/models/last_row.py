"""The last layer of a prompt: of what follows its attention only the last row is read, so only that is computed.

A prompt's other rows are there for their keys and values, and behind the last layer's attention nobody reads those. The
layer's feed-forward part, a fifth of a small model's work on a prompt, is given the last row alone; what it returns is
added to the rows that came past it, of which again the last one is read.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gorgon.models.cache import TreeCache
from gorgon.models.families import FAILURES, trial_tokens

if TYPE_CHECKING:
    from gorgon.models.backbone import Backbone

log = logging.getLogger(__name__)
TRIAL = 5
"""Tokens of the prompt that is tried."""


class LastRow:
    """Whether prompts are read for their last row alone, and the hook that sees to it.

    Invariant: the last row is what it was, up to rounding; by our own kernels to the last bit.
    """

    def __init__(self) -> None:
        self._wanted = False
        self._hook: Any = None

    @contextlib.contextmanager
    def wanted(self) -> Iterator[None]:
        """Meanwhile prompts have nothing but their last row. What is compiled is always called so, or never."""
        self._wanted = True
        try:
            yield
        finally:
            self._wanted = False

    def use(self, backbone: Backbone) -> None:
        """From now on less is computed, if the model's last row stays what it is."""
        layers = getattr(backbone.decoder, "layers", None)
        part = getattr(layers[-1], "mlp", None) if isinstance(layers, nn.ModuleList) and len(layers) else None
        if self._hook is not None or not isinstance(part, nn.Module):
            return
        whole_H = _last_of_prompt(backbone)
        self._hook = part.register_forward_pre_hook(self._shorten)
        try:
            with self.wanted():
                same = torch.allclose(_last_of_prompt(backbone), whole_H, rtol=1e-2, atol=1e-3, equal_nan=True)
        except FAILURES as error:
            log.info("prompts are computed in full: %s", error)
            same = False
        if not same:
            self._hook.remove()
            self._hook = None

    def _shorten(self, _part: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (given[0][:, -1:], *given[1:]) if self._wanted else None


@torch.inference_mode()
def _last_of_prompt(backbone: Backbone) -> Tensor:
    """Hidden state [H] after the last of a few tokens."""
    cache = TreeCache(int(backbone.text_config.num_hidden_layers), 1, TRIAL)
    tokens_1T = trial_tokens(backbone, TRIAL)
    return backbone.forward_prompt(cache, tokens_1T, tokens_1T.new_zeros(1), TRIAL)[0, -1]
