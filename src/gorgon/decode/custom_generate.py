"""transformers' own door: `model.generate(**inputs, custom_generate=CustomGenerate("my-model"))` runs our engine.

transformers prepares everything as for its own decoding and hands over logits processors and stopping criteria. They
say exactly what was asked, so they are read one by one, and one that the engine does not have is refused by name.
Shapes: B prompts, T tokens of the longest, padded on the left.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gorgon.core.sampling import Sampling
from gorgon.decode.drafts import Drafter
from gorgon.decode.engine import MOST_TOGETHER, Engine
from gorgon.decode.load import engine_on
from gorgon.errors import GorgonError, SamplingError
from gorgon.models.backbone import Backbone
from gorgon.models.families import refuse_other_results, refuse_unsupported

_OPTIONS = {
    "TemperatureLogitsWarper": ("temperature", "temperature"),
    "TopKLogitsWarper": ("top_k", "top_k"),
    "TopPLogitsWarper": ("top_p", "top_p"),
    "MinPLogitsWarper": ("min_p", "min_p"),
    "RepetitionPenaltyLogitsProcessor": ("penalty", "repetition_penalty"),
}
"""Class of a logits processor -> its attribute, our option."""
_ORDER = ["repetition_penalty", "temperature", "top_k", "top_p", "min_p"]
"""In which the engine applies them, and transformers when it makes the list itself."""
_REFUSED_SETTINGS: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1), "num_beam_groups": (None, 1), "constraints": (None,), "force_words_ids": (None,),
    "penalty_alpha": (None, 0, 0.0), "dola_layers": (None,), "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,), "use_mtp": (None, False), "token_healing": (None, False),
    "cache_implementation": (None, "dynamic"), "output_scores": (None, False), "output_logits": (None, False),
    "output_attentions": (None, False), "output_hidden_states": (None, False),
}  # fmt: skip
"""Setting of the generation config -> values that ask for nothing we lack."""
_PREPARED = frozenset({"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"})
"""Model arguments that transformers always prepares."""


class _NoTokenizer:
    """Ids in, ids out: no text is made."""

    eos_token_id = -1

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Nothing."""
        return ""


class CustomGenerate:
    """A callable for `generate`'s argument `custom_generate`: greedy or exact sampling through a directory's heads.

    Honours max_new_tokens or max_length, end and pad token, do_sample, temperature, top_p, top_k, min_p,
    repetition_penalty, num_return_sequences and return_dict_in_generate; `generate(..., seed=3)` reaches it too.
    Without a seed, sampling draws one from torch's global generator, so `torch.manual_seed` repeats a text.
    Invariant: greedy answers are those of the model's own `generate`, but for a repetition penalty's reading of padding
        tokens, which it leaves out; an answer also ends where the model's context ends.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        drafters: Drafter | Mapping[int, Drafter] | None = None,
        together: int = MOST_TOGETHER,
    ) -> None:
        """Args:
        directory: what `gorgon tune` wrote; its heads must fit the model that generates.
        drafters: in place of the tuned ones. together: rows decoded in one step.
        """
        self._directory, self._drafters, self._together = directory, drafters, together
        self._engine: Engine | None = None

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        *,
        generation_config: Any,
        logits_processor: Any = (),
        stopping_criteria: Any = (),
        seed: int | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """What `generate` calls in place of its own loop.

        Returns: ids [B, prompts and answers], padded, or transformers' output object when that was asked for.
        Raises: GorgonError for what the engine does not have, before any work; what `Engine.generate` raises.
        """
        _refuse_settings(generation_config)
        ends, limit = _read_criteria(stopping_criteria, input_ids.shape[1])
        sampling = _read_processors(logits_processor, bool(generation_config.do_sample), seed)
        prompts = _prompts(input_ids, model_kwargs)
        engine = self._engine_for(model)
        engine.backbone.end_ids = ends
        answers = engine.generate(prompts, max_new_tokens=limit, sampling=sampling, together=self._together)
        ids_BT = _padded(input_ids, [a.token_ids for a in answers], _pad(generation_config, ends))
        if not generation_config.return_dict_in_generate:
            return ids_BT
        from transformers.generation import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(sequences=ids_BT)

    def _engine_for(self, model: Any) -> Engine:
        """The engine on this model, kept for the next call."""
        if self._engine is None or self._engine.backbone.model is not model:
            name = str(model.config._name_or_path or type(model).__name__)
            refuse_unsupported(model.config, name)
            backbone = Backbone(name, model, _NoTokenizer(), model.device, model.dtype)
            refuse_other_results(backbone)
            self._engine = engine_on(backbone, self._directory, self._drafters)
        return self._engine


def _refuse(what: str, value: object, allowed: str) -> GorgonError:
    return GorgonError(f"'{what}' is not supported by Gorgon's engine", field=what, value=value, allowed=allowed,
                       hint="leave custom_generate out to use transformers' own decoding")  # fmt: skip


def _refuse_settings(config: Any) -> None:
    for name, fine in _REFUSED_SETTINGS.items():
        value = getattr(config, name, None)
        if value not in fine:
            raise _refuse(name, value, " or ".join(map(repr, fine)))


def _read_criteria(criteria: Any, length: int) -> tuple[frozenset[int], int]:
    """(end tokens, tokens that an answer may have), from transformers' stopping criteria."""
    ends: set[int] = set()
    limit = None
    for criterion in criteria:
        name = type(criterion).__name__
        if name == "EosTokenCriteria":
            ends |= set(criterion.eos_token_id.flatten().tolist())
        elif name == "MaxLengthCriteria":
            room = criterion.max_length - length
            limit = room if limit is None else min(limit, room)
        else:
            raise _refuse(name, None, "eos_token_id, max_length, max_new_tokens")
    if limit is None:
        raise GorgonError("no limit was given", field="max_new_tokens", hint="generate(..., max_new_tokens=256)")
    return frozenset(ends), limit


def _read_processors(processors: Any, do_sample: bool, seed: int | None) -> Sampling:
    """The options that transformers' logits processors stand for."""
    options: dict[str, Any] = {}
    for processor in processors:
        name = type(processor).__name__
        if name not in _OPTIONS or getattr(processor, "prompt_ignore_length", None):
            raise _refuse(name, None, ", ".join(_ORDER))
        attribute, option = _OPTIONS[name]
        if option in options:
            raise SamplingError("the same logits processor stands twice in the list", field=name)
        options[option] = getattr(processor, attribute)
    if list(options) != [o for o in _ORDER if o in options]:
        raise SamplingError("logits processors in an order of their own are not supported", field="logits_processor",
                            value=list(options), allowed=f"the order {', '.join(_ORDER)}")  # fmt: skip
    if not do_sample:
        if set(options) - {"repetition_penalty"}:
            raise SamplingError("greedy decoding would ignore the logits processors given", field="logits_processor",
                                value=list(options), hint="set do_sample=True")  # fmt: skip
        return Sampling(**options)
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    return Sampling(**{"temperature": 1.0, **options}, seed=seed)


def _prompts(input_ids_BT: Tensor, model_kwargs: dict[str, Any]) -> list[list[int]]:
    """The prompts without their padding."""
    for name, value in model_kwargs.items():
        if value is not None and name not in _PREPARED:
            raise _refuse(name, None, "input_ids and attention_mask")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise _refuse("past_key_values", None, "an empty cache")
    mask_BT = model_kwargs.get("attention_mask")
    if mask_BT is None:
        mask_BT = torch.ones_like(input_ids_BT)
    kept_BT = mask_BT.bool()
    if (kept_BT[:, :-1] & ~kept_BT[:, 1:]).any() or not kept_BT[:, -1].all():
        raise GorgonError("the prompts are not padded on the left", field="attention_mask",
                          hint="set padding_side='left' in the tokenizer")  # fmt: skip
    positions_BT = model_kwargs.get("position_ids")
    if positions_BT is not None:
        expected_BT = (kept_BT.cumsum(-1) - 1).expand_as(kept_BT)
        if positions_BT.shape[-1] != kept_BT.shape[-1] or (positions_BT != expected_BT)[kept_BT].any():
            raise _refuse("position_ids", None, "positions that count from each prompt's first token")
    return [row[keep].tolist() for row, keep in zip(input_ids_BT, kept_BT, strict=True)]


def _pad(config: Any, ends: frozenset[int]) -> int:
    pad = config.pad_token_id
    return int(pad) if pad is not None else min(ends, default=0)


def _padded(input_ids_BT: Tensor, answers: list[list[int]], pad: int) -> Tensor:
    longest = max(map(len, answers))
    rows = [answer + [pad] * (longest - len(answer)) for answer in answers]
    return torch.cat((input_ids_BT, torch.tensor(rows, dtype=input_ids_BT.dtype, device=input_ids_BT.device)), dim=1)
