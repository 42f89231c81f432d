"""Weights of the backbone's layers in 8 or 4 bits, through torchao.

Only weights are quantised, and each row of a product is computed on its own: a token's logits do not depend on what
else is in the step. So drafts change no token, on these weights as on the full ones (docs/quantization.md). Schemes
that quantise activations by what else is in the batch, such as LLM.int8, would break that.
The output layer and the embeddings keep their precision: they decide the token, heads start as copies of the output
layer, and many models share it with the embeddings.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from gorgon.config import Quantization
from gorgon.errors import MissingDependencyError, ModelError

GROUPS = (64, 32)
"""Inputs that share a scale in 4 bits: the first that divides a layer's inputs."""
OUTPUTS = 16
"""torch's 4-bit products on a CPU want outputs in multiples of this."""
FIRST_INT4_GPU = (8, 0)
"""Compute capability from which torch's 4-bit products run on a GPU."""

CHATTY = ("torchao", "torch.utils._pytree")
"""Loggers that warn, while torchao is imported, of kernels for other devices and of a deprecation inside it."""

Quantizer = Callable[[Any], None]
_ConfigOf = Callable[[str, nn.Linear], Any]


def quantizer(quantization: Quantization, dtype: torch.dtype, device: torch.device) -> Quantizer:
    """What replaces the weights of every linear layer of a model's decoder, in place; 'none' leaves them as they are.

    Raises: MissingDependencyError without torchao, or on a GPU that has no 4-bit products; ModelError for a dtype that
        4 bits do not go with; all this before a model is loaded. The result raises ModelError, and changes nothing,
        for weights that are not linear layers and for a layer whose size does not fit.
    Invariant: products are those of the dequantised weights up to rounding, with activations in the backbone's dtype.
    """
    for chatty in CHATTY:  # also without quantisation: transformers imports torchao wherever it is installed
        logging.getLogger(chatty).setLevel(logging.ERROR)
    if quantization == "none":
        return lambda _model: None
    with _torchao(quantization):
        from torchao.quantization import quantize_

        config_of = _int8() if quantization == "int8" else _int4(dtype, device)

    def run(model: Any) -> None:
        decoder: nn.Module = model.get_decoder()
        layers = {name: m for name, m in decoder.named_modules() if type(m) is nn.Linear}
        _refuse_other_weights(decoder, quantization)
        configs = {name: config_of(name, layer) for name, layer in layers.items()}
        for name, config in configs.items():
            quantize_(layers[name], config, filter_fn=lambda _module, _name: True)

    return run


@contextlib.contextmanager
def _torchao(quantization: Quantization) -> Iterator[None]:
    """Says what to install where torchao is missing."""
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError(
            f"quantised weights need torchao: {error}", field="quantization", value=quantization, allowed="none",
            hint="pip install 'gorgon-llm[quantization]'",
        ) from error  # fmt: skip


def _refuse_other_weights(decoder: nn.Module, quantization: Quantization) -> None:
    """Some classes hold weights otherwise, such as all experts in one tensor: they would silently stay as they are.

    Raises: ModelError naming the first.
    """
    for name, module in decoder.named_modules():
        if type(module) is nn.Linear or isinstance(module, nn.Embedding):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                raise ModelError(
                    f"'{name}.{key}' is not the weight of a plain linear layer and would stay as it is",
                    field="quantization", value=f"{quantization}, {type(module).__name__}", allowed="none",
                )  # fmt: skip


def _int8() -> _ConfigOf:
    """One scale per output; any size fits."""
    from torchao.quantization import Int8WeightOnlyConfig

    return lambda _name, _layer: Int8WeightOnlyConfig(set_inductor_config=False)  # models/compiler.py sets what we want


def _int4(dtype: torch.dtype, device: torch.device) -> _ConfigOf:
    """A scale and a zero point per group of inputs, for torch's own 4-bit products, packed as the device wants them."""
    if device.type == "cuda":
        if dtype != torch.bfloat16:
            raise ModelError(
                "int4 on a GPU multiplies in bfloat16", field="dtype", value=str(dtype), allowed="bfloat16"
            )
        if torch.cuda.get_device_capability(device) < FIRST_INT4_GPU:
            raise MissingDependencyError(
                "this GPU has no 4-bit products", field="quantization", value="int4", allowed="none, int8",
                hint="an A100, A10G, L4 or newer has them",
            )  # fmt: skip
        from torchao.quantization import Int4WeightOnlyConfig

        return lambda name, layer: Int4WeightOnlyConfig(
            group_size=_group(name, layer, 1), int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return lambda name, layer: PrototypeInt4WeightOnlyConfig(
        group_size=_group(name, layer, OUTPUTS), set_inductor_config=False
    )


def _group(name: str, layer: nn.Linear, outputs: int) -> int:
    group = next((g for g in GROUPS if layer.in_features % g == 0), None)
    if group is None or layer.out_features % outputs:
        raise ModelError(
            f"the layer '{name}' does not fit into groups of 4-bit weights", field="quantization",
            value=f"int4, {layer.out_features} outputs, {layer.in_features} inputs",
            allowed=f"outputs in multiples of {outputs}, inputs of {GROUPS[-1]}", hint="int8 fits any size",
        )  # fmt: skip
    return group
