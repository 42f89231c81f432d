"""Published layouts of Medusa heads: the names that other programs give the tensors, and what their config.json says.

Ours is FasterDecoding's v1, which TGI reads too: `{k}.{j}.linear.weight|bias`, `{k}.{L}.weight`. v2 leaves the last one
out, because its heads share the backbone's output layer. vLLM says `blocks.{k}.layers.{j}.weight|bias` and
`lm_heads.{k}.weight`, or one `lm_head.weight` for all. Reading trusts the tensors: published configurations are wrong
often enough (the reference's say 2 heads where there are 5).
Shapes: K heads, L layers, H hidden size, V vocabulary, U tokens of a truncated vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gorgon.errors import ModelError

PREFIXES = ("medusa_heads.", "medusa_head.")
"""What some trainers put in front of every name; vLLM strips the first one as well."""
OURS = re.compile(r"(\d+)\.(\d+)\.(?:linear\.(weight|bias)|(weight))")
VLLM = re.compile(r"blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)|lm_heads\.(\d+)\.weight")
SHARED, TOKEN_MAP = "lm_head.weight", "token_map"
VLLM_VERSIONS = "0.24 to 0.32"
TGI_VERSIONS = "1.4 to 3.3.7"


@dataclass
class PublishedHeads:
    """Heads as they were read, in our names.

    Attributes:
        layout: 'medusa v1', 'medusa v2' (no projections) or 'vllm'.
        tensors: what the file has of `{k}.{j}.linear.weight|bias` and `{k}.{L}.weight`.
        token_map_U: int64, the tokens that the projections' rows stand for; None when they stand for all.
        notes: what was not as config.json says, or could not be kept as it was.
    """

    layout: str
    heads: int
    layers: int
    tensors: dict[str, Tensor]
    token_map_U: Tensor | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def projections(self) -> list[str]:
        """Names of the heads' vocabulary projections."""
        return [f"{k}.{self.layers}.weight" for k in range(self.heads)]

    @property
    def shared(self) -> bool:
        """Whether the heads use the backbone's output layer."""
        return not any(name in self.tensors for name in self.projections)


def read_published(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> PublishedHeads:
    """Heads in any published layout.

    Args: config: their config.json; what it says of heads, layers, biases and version is compared with the tensors.
    Raises: ModelError naming the first tensor that is missing, surplus, or neither one layout's nor the other's.
    """
    named = {_stripped(key): (key, value) for key, value in tensors.items()}
    if len(named) != len(tensors):
        raise ModelError("two tensors have the same name but for their prefix", field="tensors", value=sorted(tensors))
    plain = {name: value for name, (_, value) in named.items()}
    kind = _vllm if any(VLLM.fullmatch(name) for name in plain) else _medusa
    heads = kind(plain, config)
    _compare_with_config(heads, config)
    return heads


def _stripped(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _medusa(tensors: dict[str, Tensor], config: Mapping[str, Any]) -> PublishedHeads:
    found = {name: OURS.fullmatch(name) for name in tensors}
    _refuse_surplus(name for name, match in found.items() if match is None)
    blocks = [m for m in found.values() if m is not None and m[3]]
    heads, layers = _counts([(int(m[1]), int(m[2])) for m in blocks])
    for k in range(heads):
        for j in range(layers):
            _require(tensors, f"{k}.{j}.linear.weight")
            _require(tensors, f"{k}.{j}.linear.bias")
    expected = [f"{k}.{layers}.weight" for k in range(heads)]
    projections = [name for name, match in found.items() if match is not None and match[4]]
    _refuse_surplus(name for name in projections if name not in expected)
    if projections:
        for name in expected:
            _require(tensors, name)
    return PublishedHeads("medusa v1" if projections else "medusa v2", heads, layers, dict(tensors))


def _vllm(tensors: dict[str, Tensor], config: Mapping[str, Any]) -> PublishedHeads:
    found = {name: VLLM.fullmatch(name) for name in tensors}
    _refuse_surplus(n for n, match in found.items() if match is None and n not in (SHARED, TOKEN_MAP))
    blocks = [m for m in found.values() if m is not None and m[3]]
    heads, layers = _counts([(int(m[1]), int(m[2])) for m in blocks])
    read: dict[str, Tensor] = {}
    biased = any(m[3] == "bias" for m in blocks)
    for k in range(heads):
        for j in range(layers):
            weight = _require(tensors, f"blocks.{k}.layers.{j}.weight")
            read[f"{k}.{j}.linear.weight"] = weight
            bias = _require(tensors, f"blocks.{k}.layers.{j}.bias") if biased else weight.new_zeros(weight.shape[0])
            read[f"{k}.{j}.linear.bias"] = bias
    notes = []
    if biased and not config.get("medusa_fc_bias", False):
        notes.append("config.json does not set medusa_fc_bias, so vLLM would have dropped the biases; they are kept")
    if config.get("medusa_fc_bias", False) and not biased:
        raise ModelError("config.json promises biases that are not there", field="blocks.0.layers.0.bias")
    scale = float(config.get("logit_scale", 1.0))
    if scale <= 0:
        raise ModelError("the heads' logits have a scale that is not positive", field="logit_scale", value=scale)
    if scale != 1:
        notes.append(f"logit_scale {scale:g} is left out; it changes the order of no head's choices")
    if config.get("original_lm_head", False):
        name = SHARED if SHARED in tensors else "lm_heads.0.weight"
        one = _require(tensors, name)
        _refuse_surplus(n for n in tensors if n.startswith(("lm_heads.", SHARED)) and n != name)
        read |= {f"{k}.{layers}.weight": one for k in range(heads)}
    else:
        _refuse_surplus([SHARED] if SHARED in tensors else [])
        read |= {f"{k}.{layers}.weight": _require(tensors, f"lm_heads.{k}.weight") for k in range(heads)}
        extra = [n for n, m in found.items() if m is not None and m[4] and int(m[4]) >= heads]
        _refuse_surplus(extra)
    return PublishedHeads("vllm", heads, layers, read, tensors.get(TOKEN_MAP), notes)


def _counts(places: list[tuple[int, int]]) -> tuple[int, int]:
    if not places:
        raise ModelError(
            "the file holds no Medusa heads", field="tensors",
            allowed="{k}.{j}.linear.weight (FasterDecoding, TGI) or blocks.{k}.layers.{j}.weight (vLLM)",
        )  # fmt: skip
    return 1 + max(k for k, _ in places), 1 + max(j for _, j in places)


def _require(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ModelError(f"the heads lack the tensor '{name}'", field=name, hint="is the file complete?")
    return tensors[name]


def _refuse_surplus(names: Any) -> None:
    for name in sorted(names):
        raise ModelError(
            f"the heads have the surplus tensor '{name}'", field=name,
            hint="no published layout of Medusa heads has it, so it is not known what it would do",
        )  # fmt: skip


def _compare_with_config(read: PublishedHeads, config: Mapping[str, Any]) -> None:
    """Notes every count in config.json that the tensors contradict; vLLM matches the same pieces of names."""
    for key, value in config.items():
        for word, count in (("heads", read.heads), ("layers", read.layers)):
            if "num" in key and word in key and "attention" not in key and value != count:
                read.notes.append(f"config.json says {key} = {value}, the tensors say {count}; the tensors are right")
    version = config.get("version")
    if read.layout != "vllm" and version is not None and str(version) != read.layout[-1]:
        read.notes.append(f"config.json says version {version}, the tensors are version {read.layout[-1]}")


def vllm_layout(tensors: Mapping[str, Tensor], heads: int, layers: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Our tensors in vLLM's names, and the config.json without which it would drop the biases without a word.

    The whole vocabulary is kept: vLLM 0.32 cannot load projections that a `token_map` has cut, unless heads share one.
    """
    named: dict[str, Tensor] = {}
    for k in range(heads):
        for j in range(layers):
            for part in ("weight", "bias"):
                named[f"blocks.{k}.layers.{j}.{part}"] = tensors[f"{k}.{j}.linear.{part}"]
        named[f"lm_heads.{k}.weight"] = tensors[f"{k}.{layers}.weight"]
    vocab_size, hidden_size = tensors[f"0.{layers}.weight"].shape
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "truncated_vocab_size": vocab_size,
        "num_heads": heads,
        "num_hidden_layers": layers,
        "medusa_fc_bias": True,
        "original_lm_head": False,
    }
    return named, config


def check_token_map(token_map_U: Tensor, vocab_size: int) -> Tensor:
    """The map as int64.

    Raises: ModelError unless it is a list of different tokens of the vocabulary.
    """
    whole = token_map_U.dim() == 1 and not token_map_U.is_floating_point() and token_map_U.dtype != torch.bool
    if not whole or len(token_map_U) == 0 or len(set(token_map_U.tolist())) != len(token_map_U):
        raise ModelError("the token map is not a list of different tokens", field=TOKEN_MAP)
    if int(token_map_U.min()) < 0 or int(token_map_U.max()) >= vocab_size:
        raise ModelError("the token map leaves the vocabulary", field=TOKEN_MAP, value=int(token_map_U.max()),
                         allowed=f"0 to {vocab_size - 1}")  # fmt: skip
    return token_map_U.long()
