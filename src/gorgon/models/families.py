"""Which model families can be decoded with trees: refused by name before the weights are read, tried out afterwards.

A tree needs attention that a mask decides and positions that are given per token. A recurrent state follows one text
only, and ALiBi derives distances from rows of the cache, where siblings lie behind one another.
Shapes: N tokens of the trial, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gorgon.errors import ModelError
from gorgon.models.cache import TreeCache

if TYPE_CHECKING:
    from gorgon.models.backbone import Backbone

LAYERS = frozenset({"full_attention", "sliding_attention"})
"""Types of layers that our masks express."""
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""Relative error of the trial's logits: rounding stays far below, a wrong mask or position far above."""

FAILURES = (TypeError, ValueError, AttributeError, RuntimeError, IndexError, KeyError, AssertionError)
"""How a model's own code fails when it is called otherwise than it expects."""
TRIAL_WINDOW = 3
"""Length of a sliding window during the trial."""


def _class_of(config: Any) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def attention_of(config: Any) -> str:
    """torch's fused attention, or the plain one for classes that need more than it has (soft-capping, sinks)."""
    return "sdpa" if getattr(_class_of(config), "_supports_sdpa", True) else "eager"


def refuse_unsupported(config: Any, source: str) -> None:
    """Refuses families that cannot hold a tree of drafts.

    Raises: ModelError with the model's type and the reason.
    """
    who = f"'{source}' ({config.model_type})"
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{who} is an encoder-decoder model; Gorgon speeds up decoder-only models", field="model")
    decoder = config.get_text_config(decoder=True)
    others = sorted(set(getattr(decoder, "layer_types", None) or []) - LAYERS)
    if others:
        raise ModelError(
            f"{who} has layers whose state cannot hold a tree of drafts: {', '.join(others)}",
            field="model", allowed="softmax attention in every layer",
        )  # fmt: skip
    if getattr(_class_of(config), "_is_stateful", False):
        raise ModelError(
            f"{who} keeps a recurrent state, which follows one text and cannot hold a tree of drafts",
            field="model", allowed="softmax attention in every layer",
        )  # fmt: skip
    if config.model_type in ("bloom", "mpt") or getattr(decoder, "alibi", False):
        raise ModelError(
            f"{who} has ALiBi positions, which count rows of the cache and not a draft's depth in its tree",
            field="model", allowed="rotary or learned positions",
        )  # fmt: skip


def refuse_mismatch(report: dict[str, Any], source: str) -> None:
    """A checkpoint that does not fill the model, or holds more than the model, is not the model it claims to be.

    Raises: ModelError naming the first tensor.
    """
    for key, word in (("missing_keys", "missing"), ("unexpected_keys", "surplus"), ("mismatched_keys", "mis-shaped")):
        names = sorted(str(n) for n in report.get(key) or ())
        if names:
            raise ModelError(
                f"the checkpoint in '{source}' has {len(names)} {word} tensor(s)",
                field=names[0], hint="was the download or copy complete, and does config.json belong to these weights?",
            )  # fmt: skip


@contextlib.contextmanager
def _short_window(config: Any) -> Iterator[None]:
    """Sets a sliding window to a few tokens for the trial, where its own length would decide nothing."""
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int):
        yield
        return
    config.sliding_window = min(window, TRIAL_WINDOW)
    try:
        yield
    finally:
        config.sliding_window = window


@torch.inference_mode()
def refuse_other_results(backbone: Backbone) -> None:
    """Decodes a handful of tokens through a tree and compares with the model's own forward.

    Whatever our masks, positions, cache or `Backbone.logits` cannot express in this model shows here.
    Raises: ModelError with the model's type when something fails or comes out otherwise.
    Cost: four forwards of at most six tokens.
    """
    with _short_window(backbone.text_config):
        _try_a_tree(backbone)


def trial_tokens(backbone: Backbone, count: int) -> Tensor:
    """Different tokens [1, N] from all over the vocabulary."""
    return (torch.arange(1, count + 1, device=backbone.device) * (backbone.vocab_size // (count + 1)))[None]


def _try_a_tree(backbone: Backbone) -> None:
    who = f"'{backbone.name}' ({backbone.text_config.model_type})"
    try:
        ids_1N = trial_tokens(backbone, 6)
        wanted_NV = backbone.model(input_ids=ids_1N, use_cache=False).logits[0]
        if not torch.isfinite(wanted_NV).all():
            return  # said where it matters, with what can be done about it
        plain_NV = backbone.logits(backbone.hidden(ids_1N)[0])
        through_a_tree_NV = _through_a_tree(backbone, ids_1N)
    except FAILURES as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{who} cannot be decoded with trees: {first}", field="model") from error
    for ours_NV, what in (
        (plain_NV, "makes its logits from the hidden state in a way that is not known here"),
        (through_a_tree_NV, "gives other results when its drafts are verified as a tree"),
    ):
        difference = float((ours_NV.float() - wanted_NV.float()).norm() / wanted_NV.float().norm().clamp(min=1e-30))
        if not difference <= TOLERANCES.get(backbone.dtype, 0.1):
            raise ModelError(
                f"{who} {what}", field="model", value=f"relative difference {difference:.2g}",
                hint="please report the model; plain transformers can run it",
            )  # fmt: skip


def _through_a_tree(backbone: Backbone, ids_1N: Tensor) -> Tensor:
    """Logits after each of six tokens: three as a prompt, three as the right path of a tree with a wrong branch."""
    cache = TreeCache(int(backbone.text_config.num_hidden_layers), 1, 3 + 4)
    start_1, lengths_1 = torch.tensor([[0], [3]], device=backbone.device)
    prompt_1NH = backbone.forward_prompt(cache, ids_1N[:, :3], start_1, 3)
    wrong_11 = ids_1N[:, :1]
    tokens_1N = torch.cat((ids_1N[:, 3:4], wrong_11, ids_1N[:, 4:]), dim=1)
    depths_1N, bits_1N = torch.tensor([[[0, 1, 1, 2]], [[0b1, 0b11, 0b101, 0b1101]]], device=backbone.device)
    tree_1NH = backbone.forward_tree(cache, tokens_1N, depths_1N, bits_1N, lengths_1, 3 + 4)
    return backbone.logits(torch.cat((prompt_1NH[0], tree_1NH[0, [0, 2, 3]])))
